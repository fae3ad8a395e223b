"""A file of a model lies in the model's folder: a link must not bring in what lies elsewhere."""

from __future__ import annotations

from pathlib import Path

from halfbyte.errors import CheckpointError


def check_model_file(folder: Path, name: str) -> Path:
    """Refuse a missing file, and a link that leaves the folder for other than the hub's blobs.

    Args:
        folder: The model's.
        name: The file's path in it.

    Returns:
        The file.

    Raises:
        CheckpointError: There is no such file, or it is a link to nowhere or out of the folder.
    """
    file = folder / name
    if not file.is_file():
        leads = f", which is a link to {file.readlink()}" if file.is_symlink() else ""
        raise CheckpointError(
            f"Checkpoint {folder} is missing the file {name}{leads}. "
            "The download is incomplete; download it again."
        )
    target, home = file.resolve(), folder.resolve()
    # The hub's cache is <repo>/snapshots/<revision>/<file> -> ../../blobs/<hash>.
    blobs = [up.parent / "blobs" for up in (home, *home.parents) if up.name == "snapshots"]
    if not any(target.is_relative_to(allowed) for allowed in (home, *blobs)):
        raise CheckpointError(
            f"Refusing {file}: it is a link to {target}, outside its folder. "
            "Copy the file into the folder if you mean it."
        )
    return file
