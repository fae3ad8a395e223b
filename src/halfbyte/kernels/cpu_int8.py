"""The compiled CPU kernel with int8 activations: faster on CPUs without matrix units (AMX).

Each row of x is quantized symmetrically per group (the weight's groups) to integers -127..127 with
the scale max|x| / 127, and multiplied by the codes in exact integer arithmetic. Error: half a
quantization step per element of x, relative to the largest element of its group and not to the
element itself; plus fp32 sums over groups. A non-finite x makes its whole row NaN.
Only used on request: ``activations="int8"``, or ``HALFBYTE_KERNEL=cpu_int8``.
Measured: bench/measure_activations.py.
"""

from __future__ import annotations

import math

from halfbyte.kernels.contract import LinearSpec
from halfbyte.kernels.cpu_native import CpuNative

LARGEST = 127
"""Largest absolute value of a quantized activation, as in the library."""


class CpuInt8(CpuNative):
    """``csrc/integer_kernel.h`` over the same packed weight as :class:`CpuNative`."""

    name = "cpu_int8"
    activation_bits = 8

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the kernel cannot run a layer; None if it can."""
        if spec.bits == 3:
            return "needs bits of 2, 4 or 8"
        longest = spec.in_features if spec.num_groups == 1 else spec.group_size
        if longest * LARGEST * 2**spec.bits >= 2**31:
            return f"a group of {longest} columns overflows 32 bits at {spec.bits} bits"
        return super().find_mismatch(spec)

    def error_bound(self, spec: LinearSpec) -> float:
        """Infinite: the error depends on the largest element of a group, not on each element."""
        return math.inf
