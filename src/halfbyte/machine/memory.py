"""Memory of this process and of a GPU: how much is in use, how to limit it and give it back."""

from __future__ import annotations

import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Names of glibc's settings, from its malloc.h."""
LARGE_BYTES = 1 << 20


def peak_memory_bytes() -> int:
    """Give the largest resident size that this process has had. Unit: bytes."""
    try:
        # What getrusage says may be of the process that started this one: exec does not reset it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Give the present resident size of this process. Unit: bytes."""
    return int(psutil.Process().memory_info().rss)


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
