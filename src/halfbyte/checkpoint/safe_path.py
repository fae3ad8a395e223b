"""Prevent symbolic links in a model folder from including files outside it."""

from __future__ import annotations

from pathlib import Path

from halfbyte.errors import CheckpointError


def check_model_file(folder: Path, name: str) -> Path:
    """Check that a file exists inside a model folder, or in the blobs of the Hub's cache.

    Args:
        folder: The model folder.
        name: Path of the file, relative to the folder.

    Returns:
        The file.

    Raises:
        CheckpointError: The file is missing, or is a link that is broken or leaves the folder.
    """
    file = folder / name
    if not file.is_file():
        target = f", which is a link to {file.readlink()}" if file.is_symlink() else ""
        raise CheckpointError(
            f"Checkpoint {folder} is missing the file {name}{target}. "
            "The download is incomplete; download it again."
        )
    resolved, root = file.resolve(), folder.resolve()
    # The Hub's cache is <repo>/snapshots/<revision>/<file> -> ../../blobs/<hash>.
    blobs = [up.parent / "blobs" for up in (root, *root.parents) if up.name == "snapshots"]
    if not any(resolved.is_relative_to(allowed) for allowed in (root, *blobs)):
        raise CheckpointError(
            f"Refusing {file}: it is a link to {resolved}, outside its folder. "
            "If this is intended, copy the file into the folder."
        )
    return file
