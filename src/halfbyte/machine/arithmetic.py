"""Which matrix products this CPU or a device computes fast, and how exactly."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from halfbyte.errors import first_line


@cache
def has_fast_bf16() -> bool:
    """Return whether the CPU has bf16 matrix instructions (AVX512_BF16, AMX or Arm's)."""
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    native = bool(words & {"avx512_bf16", "amx_bf16", "bf16"})
    return native and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


@cache
def sums_bf16_in_fp32() -> bool:
    """Return whether bf16 ``addmm`` is fast here and rounds only after the addition.

    Determined by a trial: some libraries round the product first, and then the difference of two
    nearly equal numbers is only noise.
    """
    if not has_fast_bf16():
        return False
    x = torch.arange(64.0 * 64).square().sin().reshape(64, 64).bfloat16()
    exact = x.double().t() @ x.double()
    rounded = exact.bfloat16()
    error = torch.addmm(rounded, x.t(), x, beta=-1).double() - (exact - rounded.double())
    # If the product is rounded first, the error is as large as the difference itself.
    return float(error.norm()) < 2**-6 * float((exact - rounded.double()).norm())


@cache
def find_fp32_sum_obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return why a device cannot multiply 16-bit matrices with fp32 accumulation and output.

    Determined by a trial, which also detects sums that are rounded in between.

    Args:
        device: The device.
        dtype: Dtype of the factors.

    Returns:
        The reason why ``torch.mm`` with ``out_dtype`` is not usable; None if it is.
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
    return "intermediate sums are rounded"


def fast_copy(matrix: torch.Tensor) -> torch.Tensor:
    """Cast a matrix to the dtype that multiplies fastest here, for approximate products."""
    use_bf16 = matrix.device.type != "cpu" or has_fast_bf16()
    return matrix.bfloat16() if use_bf16 else matrix
