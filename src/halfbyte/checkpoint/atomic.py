"""Atomic writes: after a crash, a file is complete or absent."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from halfbyte.checkpoint.direct_io import write_direct
from halfbyte.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
"""Suffix of a file that is being written; a leftover may be overwritten or removed."""

SYNC_BYTES = 32_000_000
"""Number of bytes written between two calls of fsync."""


def write_atomically(
    path: Path, chunks: Iterable[bytes | memoryview], *, bypass_cache: bool = False
) -> None:
    """Write to a temporary file beside the final one, sync it to disk, then rename it.

    After ``kill -9`` or a power failure there is the old file, the new one, or none. The temporary
    file has a fixed name, so that the next run overwrites a leftover.

    Args:
        path: The file. Its folder must exist.
        chunks: The content, in order.
        bypass_cache: Write without the page cache: for a large file that is not read soon.

    Raises:
        CheckpointError: The disk is full or the folder is not writable.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        if bypass_cache:
            with partial.open("wb", buffering=0) as file:
                write_direct(file, chunks)
        else:
            with partial.open("wb") as handle:
                _write(handle, chunks)
        partial.replace(path)
        sync_folder(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another "
            "folder."
        ) from error


def _write(handle: BinaryIO, chunks: Iterable[bytes | memoryview]) -> None:
    """Write and sync; a thread syncs what is written while the next chunks are produced."""
    unsynced_bytes = 0
    pending: Future[None] | None = None
    with ThreadPoolExecutor(1) as executor:
        for chunk in chunks:
            handle.write(chunk)
            unsynced_bytes += len(chunk)
            if unsynced_bytes < SYNC_BYTES or not (pending is None or pending.done()):
                continue
            if pending is not None:
                pending.result()
            handle.flush()
            pending = executor.submit(os.fsync, handle.fileno())
            unsynced_bytes = 0
        handle.flush()
        if pending is not None:
            pending.result()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Sync a directory to disk, which makes renames in it durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
