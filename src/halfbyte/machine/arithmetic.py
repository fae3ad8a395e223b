"""What this processor and a device are fast at, and exact in."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from halfbyte.errors import first_line


@cache
def has_fast_bf16() -> bool:
    """Say whether the CPU multiplies bf16 matrices in hardware (AVX512_BF16, AMX, or Arm's)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    native = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return native and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def sums_bf16_in_fp32() -> bool:
    """Say whether bf16 matrix products are fast here and add their addend before they round.

    Tried, not looked up: a library may round the product first, and the difference of two nearly
    equal numbers would be noise.
    """
    if not has_fast_bf16():
        return False
    x = torch.arange(64.0 * 64).square().sin().reshape(64, 64).bfloat16()
    exact = x.double().t() @ x.double()
    rounded = exact.bfloat16()
    error = torch.addmm(rounded, x.t(), x, beta=-1).double() - (exact - rounded.double())
    # Rounded first, the error would be as large as the difference itself.
    return float(error.norm()) < 2**-6 * float((exact - rounded.double()).norm())


@cache
def find_fp32_sum_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a device does not multiply 16-bit matrices and give the sums in fp32.

    Tried, not looked up: a sum that was rounded on the way would show.

    Args:
        device: Which one.
        dtype: Of the factors.

    Returns:
        What ``torch.mm`` with ``out_dtype`` lacks there; None where it does.
    """
    if device.type == "cpu":
        return "torch has no such product for CPUs"
    x = torch.arange(64.0 * 256, device=device).square().sin().reshape(256, 64).to(dtype)
    exact = x.double().t() @ x.double()
    try:
        found = torch.mm(x.t(), x, out_dtype=torch.float32)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return f"{type(error).__name__}: {first_line(error)}"
    if float((found.double() - exact).norm()) < 2**-16 * float(exact.norm()):
        return None
    return "sums are rounded on the way"


def fast_copy(matrix: torch.Tensor) -> torch.Tensor:
    """Give a matrix in the type in which this machine multiplies fastest, for rough products."""
    fast = matrix.device.type != "cpu" or has_fast_bf16()
    return matrix.bfloat16() if fast else matrix
