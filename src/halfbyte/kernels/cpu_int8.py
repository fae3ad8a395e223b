"""The compiled CPU kernel with activations of 8 bits: faster where there are no matrix units.

Each row of x is rounded group by group (the weight's groups) to whole multiples, -127 to 127, of
its largest number / 127, and multiplied by the codes in integers, exactly. Error: half such a
multiple for each number of x, so it is relative to the largest number of a group and not to each;
beside it, what fp32 makes of the sums of groups. An x that is not finite makes its row
not-a-number.
Never chosen unless asked for: ``activations="int8"``, or ``HALFBYTE_KERNEL=cpu_int8``.
Measured: bench/measure_activations.py.
"""

from __future__ import annotations

import math

from halfbyte.kernels.contract import LinearSpec
from halfbyte.kernels.cpu_native import CpuNative

LARGEST = 127
"""Of the whole numbers; the library's own."""


class CpuInt8(CpuNative):
    """``csrc/integer_kernel.h`` over the same packed weight as :class:`CpuNative`."""

    name = "cpu_int8"
    activation_bits = 8

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Say why it cannot run such a layer, or None."""
        if spec.bits == 3:
            return "needs bits of 2, 4 or 8"
        longest = spec.in_features if spec.num_groups == 1 else spec.group_size
        if longest * LARGEST * 2**spec.bits >= 2**31:
            return f"a group of {longest} columns leaves 32 bits at {spec.bits} bits"
        return super().find_mismatch(spec)

    def error_bound(self, spec: LinearSpec) -> float:
        """Infinite: the error goes with the largest number of a group, not with each (above)."""
        return math.inf
