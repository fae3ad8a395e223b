"""What this processor is fast at."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch


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
        return first_line_of(error)
    if float((found.double() - exact).norm()) < 2**-16 * float(exact.norm()):
        return None
    return "sums are rounded on the way"


def first_line_of(error: Exception) -> str:
    """What went wrong, in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def fast_copy(matrix: torch.Tensor) -> torch.Tensor:
    """Give a matrix in the type in which this machine multiplies fastest, for rough products."""
    fast = matrix.device.type != "cpu" or has_fast_bf16()
    return matrix.bfloat16() if fast else matrix


MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's settings, from its malloc.h."""
LARGE_BYTES = 1 << 20


def map_large_blocks() -> None:
    """Let the C library map every large block for itself, for as long as this process lives.

    glibc takes to keeping blocks of up to 32 MB in its heap once some were freed. Training frees
    and takes tensors of ever other sizes, and the holes grow: a step of a 1.1B model on 1,024
    tokens took 3.7 GB where 1.4 are in use (docs/log.md). Mapping costs fresh pages each time.
    Does nothing where the C library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for name in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            set_option(name, LARGE_BYTES)


@contextmanager
def limit_device_memory(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """Let torch take no more of a GPU's memory, freed memory that it keeps in reserve included.

    Near the limit it gives its reserve back instead of taking more.

    Args:
        device: Which one; nothing is limited but on CUDA.
        num_bytes: Beside what torch had taken before; None: no limit.

    Yields:
        Nothing.
    """
    if device.type != "cuda" or num_bytes is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    most = torch.cuda.memory_reserved(device) + num_bytes
    torch.cuda.set_per_process_memory_fraction(min(most / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def release_memory(device: torch.device | None = None) -> None:
    """Give freed memory back to the system, where the C library would keep it in fragments.

    Without this the resident size creeps up block by block. Does nothing where the C library is
    not glibc.

    Args:
        device: Whose memory is given back too, with what only cycles of objects still hold.
    """
    if device is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
