"""Write large files with direct I/O, without evicting other data from the page cache.

::

    chunks -> collected in one of two buffers -> written with O_DIRECT by a thread, while the other
    buffer fills -> the last, incomplete block written through the page cache
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO

import numpy as np

BUFFER_BYTES = 1 << 23
"""Size of each buffer: a multiple of any disk's block size, as direct I/O requires."""

_DIRECT = getattr(os, "O_DIRECT", 0)
"""Exists on Linux only; 0 elsewhere, where everything is written through the page cache."""


def write_direct(handle: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Write chunks in order and sync them to disk.

    Args:
        handle: An empty file, opened for unbuffered writing.
        chunks: The content, in order.
    """
    buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
    filled = 0
    pending: Future[None] | None = None
    _set_direct(handle, enabled=True)
    with ThreadPoolExecutor(1) as executor:
        for chunk in chunks:
            content = np.frombuffer(chunk, dtype=np.uint8)
            while len(content):
                part = content[: BUFFER_BYTES - filled]
                # numpy releases the GIL while it copies.
                np.copyto(np.frombuffer(buffers[0], np.uint8, len(part), filled), part)
                content = content[len(part) :]
                filled += len(part)
                if filled < BUFFER_BYTES:
                    continue
                if pending is not None:
                    pending.result()
                pending = executor.submit(_write_all, handle, memoryview(buffers[0]))
                buffers.reverse()
                filled = 0
        if pending is not None:
            pending.result()
    _set_direct(handle, enabled=False)
    _write_all(handle, memoryview(buffers[0])[:filled])
    os.fsync(handle.fileno())


def _write_all(handle: BinaryIO, content: memoryview) -> None:
    while content:
        try:
            content = content[handle.write(content) :]
        except OSError as error:
            # The file system has further requirements, or a full disk ended a write within a block.
            if error.errno != errno.EINVAL or not _set_direct(handle, enabled=False):
                raise


def _set_direct(handle: BinaryIO, *, enabled: bool) -> bool:
    """Switch direct I/O on or off; returns whether this changed anything."""
    if not _DIRECT:
        return False
    import fcntl  # does not exist on Windows, where _DIRECT is 0

    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if bool(flags & _DIRECT) == enabled:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags ^ _DIRECT)
    except OSError:  # not supported by the file system
        return False
    return True
