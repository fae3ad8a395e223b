"""Which files a version may hold: one rule for a folder that is added, and for any manifest."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from halfbyte.checkpoint.atomic import PARTIAL_SUFFIX
from halfbyte.checkpoint.identity import MANIFEST_FILE
from halfbyte.checkpoint.safe_path import check_model_file
from halfbyte.checkpoint.shards import check_shards
from halfbyte.errors import StoreError

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".npy", ".npz")
"""Reading or importing one can run any program."""
_NOT_PLAIN = re.compile(r"[\\:\x00-\x1f\x7f]")


def check_member(path: str, what: str) -> str:
    """Refuse a file that could leave its folder, is not written alike everywhere, or can run.

    Args:
        path: In a version's folder, with slashes.
        what: For messages: the folder or the manifest.

    Returns:
        The path.

    Raises:
        StoreError: It is hidden, no plain path, or its kind of file can run a program.
    """
    if _NOT_PLAIN.search(path) or any(part[:1] in ("", ".") for part in path.split("/")):
        raise StoreError(
            f"Refusing {what}: the file {path[:80]!r} has no plain path. No part may be empty or "
            "begin with '.', and ':', '\\' and control characters mean something else on some "
            "systems. Rename the file."
        )
    if PurePosixPath(path).suffix.lower() in UNSAFE_SUFFIXES:
        raise StoreError(
            f"Refusing {what}: {path[:80]} can run a program when it is read. A version holds "
            "safetensors or GGUF weights; remove the file."
        )
    return path


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model folder that go into a version.

    Args:
        folder: The model.

    Returns:
        Files by their path in the folder, sorted; hidden ones are left out, and the manifest of the
        version that the folder was downloaded as.

    Raises:
        StoreError: There is no folder or no weights in it, or a file that a version cannot hold.
        CheckpointError: A file is a link to nowhere or out of the folder, or a shard is missing.
    """
    if not folder.is_dir():
        raise StoreError(f"Cannot add {folder}: there is no such folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or name == MANIFEST_FILE or (path.is_dir() and not path.is_symlink()):
            continue
        if name.endswith(PARTIAL_SUFFIX):
            raise StoreError(f"Cannot add {folder}: {name} is unfinished. Let the run end.")
        found[check_member(name, str(folder))] = check_model_file(folder, name)
    if not any(name.endswith((".safetensors", ".gguf")) for name in found):
        raise StoreError(f"Cannot add {folder}: it has no .safetensors or .gguf file.")
    check_shards(folder)
    return found
