"""Write a file whole or not at all, whatever stops the program."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from halfbyte.errors import CheckpointError

PARTIAL_SUFFIX = ".partial"
"""Ends the name of a file that is being written; a leftover may be overwritten or removed."""


def write_atomically(path: Path, chunks: Iterable[bytes | memoryview]) -> None:
    """Write beside the final name, bring it to the disk, then rename.

    After ``kill -9`` or a power cut there is the old file, or the new one, or none. A leftover of
    a killed run has a fixed name, which the next run overwrites.

    Args:
        path: The file. Its folder must exist.
        chunks: The content, in order.

    Raises:
        CheckpointError: The disk is full or the folder cannot be written to.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as handle:
            for chunk in chunks:
                handle.write(chunk)
            handle.flush()
            os.fsync(handle.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"Cannot write {path}: {error.strerror or error}. Free some space or choose another "
            "folder."
        ) from error


def sync_folder(folder: Path) -> None:
    """Bring a folder's list of names to the disk: a rename is durable only then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
