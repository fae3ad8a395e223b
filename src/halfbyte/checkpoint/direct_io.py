"""Write a large file straight to the disk: the page cache neither copies it nor gives room for it.

::

    chunks -> gathered in one of two buffers -> written past the cache by a thread while the other
    fills -> the last, odd part through the cache
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
"""Of each buffer: whole blocks of any disk, as the system asks of what goes past the cache."""

_DIRECT = getattr(os, "O_DIRECT", 0)
"""Linux has it; elsewhere everything goes through the cache."""


def write_direct(handle: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Write chunks one after another and bring them to the disk.

    Args:
        handle: An empty file, open for writing without a buffer.
        chunks: The content, in order.
    """
    buffers = [mmap.mmap(-1, BUFFER_BYTES) for _ in range(2)]
    filled = 0
    under_way: Future[None] | None = None
    _set_direct(handle, wanted=True)
    with ThreadPoolExecutor(1) as behind:
        for chunk in chunks:
            content = np.frombuffer(chunk, dtype=np.uint8)
            while len(content):
                part = content[: BUFFER_BYTES - filled]
                # By numpy, which lets Python's other threads run meanwhile.
                np.copyto(np.frombuffer(buffers[0], np.uint8, len(part), filled), part)
                content = content[len(part) :]
                filled += len(part)
                if filled < BUFFER_BYTES:
                    continue
                if under_way is not None:
                    under_way.result()
                under_way = behind.submit(_write_all, handle, memoryview(buffers[0]))
                buffers.reverse()
                filled = 0
        if under_way is not None:
            under_way.result()
    _set_direct(handle, wanted=False)
    _write_all(handle, memoryview(buffers[0])[:filled])
    os.fsync(handle.fileno())


def _write_all(handle: BinaryIO, content: memoryview) -> None:
    while content:
        try:
            content = content[handle.write(content) :]
        except OSError as error:
            # A file system that asks for more than whole blocks, or a disk that filled up in one.
            if error.errno != errno.EINVAL or not _set_direct(handle, wanted=False):
                raise


def _set_direct(handle: BinaryIO, *, wanted: bool) -> bool:
    """Send what is written past the cache from here on, or no longer; False: nothing changed."""
    if not _DIRECT:
        return False
    import fcntl  # Windows has neither

    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    if bool(flags & _DIRECT) == wanted:
        return False
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags ^ _DIRECT)
    except OSError:  # the file system cannot
        return False
    return True
