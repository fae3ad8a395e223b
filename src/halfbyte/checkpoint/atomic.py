"""Write a file whole or not at all, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

from halfbyte.checkpoint.direct_io import write_direct
from halfbyte.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written; a leftover may be overwritten or removed."""

SYNC_BYTES = 32_000_000
"""Written before the disk is made to begin with it."""


def write_atomically(
    path: Path, chunks: Iterable[bytes | memoryview], *, bypass_cache: bool = False
) -> None:
    """Write beside the final name, bring it to the disk, then rename.

    After ``kill -9`` or a power cut there is the old file, or the new one, or none. A leftover of
    a killed run has a fixed name, which the next run overwrites.

    Args:
        path: The file. Its folder must exist.
        chunks: The content, in order.
        bypass_cache: For a large file that is not read again at once: straight to the disk.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written to.
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
    """Write and sync; the disk works on what is written while the next chunk is being made."""
    waiting = 0
    under_way: Future[None] | None = None
    with ThreadPoolExecutor(1) as behind:
        for chunk in chunks:
            handle.write(chunk)
            waiting += len(chunk)
            if waiting < SYNC_BYTES or not (under_way is None or under_way.done()):
                continue
            if under_way is not None:
                under_way.result()
            handle.flush()
            under_way = behind.submit(os.fsync, handle.fileno())
            waiting = 0
        handle.flush()
        if under_way is not None:
            under_way.result()
        os.fsync(handle.fileno())


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: a rename is durable only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
