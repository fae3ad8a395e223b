"""Memory of this process and of a GPU: measure it, limit it, release it."""

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
"""Parameters of glibc's mallopt, from malloc.h."""
LARGE_BYTES = 1 << 20


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process. Unit: bytes."""
    try:
        # getrusage may report the peak of the parent process: exec does not reset it.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # Linux counts in KiB, macOS in bytes.
    return peak if sys.platform == "darwin" else peak * 1024


def resident_memory_bytes() -> int:
    """Return the current resident memory of this process. Unit: bytes."""
    return int(psutil.Process().memory_info().rss)


def count_weight_bytes(model: torch.nn.Module) -> int:
    """Sum the bytes of a model's tensors, counting shared ones once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def map_large_blocks() -> None:
    """Make malloc use mmap for every large block, for the lifetime of this process.

    By default glibc raises its mmap threshold to up to 32 MB when blocks are freed, and keeps such
    blocks in its heap. Training allocates tensors of many sizes, which fragments the heap: a step
    of a 1.1B model on 1,024 tokens took 3.7 GB with 1.4 GB in use (docs/log.md). The cost is page
    faults for every block. A no-op if the C library is not glibc.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is not None:
        for name in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            set_option(name, LARGE_BYTES)


@contextmanager
def limit_device_memory(device: torch.device, num_bytes: int | None) -> Iterator[None]:
    """Limit the GPU memory that torch's caching allocator reserves.

    Near the limit the allocator releases cached blocks instead of reserving more.

    Args:
        device: The device; without effect unless it is a CUDA device.
        num_bytes: Limit in addition to the memory already reserved; None: no limit.

    Yields:
        Nothing.
    """
    if device.type != "cuda" or num_bytes is None:
        yield
        return
    total = torch.cuda.get_device_properties(device).total_memory
    limit = torch.cuda.memory_reserved(device) + num_bytes
    torch.cuda.set_per_process_memory_fraction(min(limit / total, 1.0), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def release_memory(device: torch.device | None = None) -> None:
    """Return freed memory to the operating system, which glibc would keep in its heap.

    Without this the resident memory grows block by block. A no-op if the C library is not glibc.

    Args:
        device: If given, collects reference cycles first, and on CUDA also empties torch's cache.
    """
    if device is not None:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
