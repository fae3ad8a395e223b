"""Rules for the files of a version; the same for a folder to add and for any manifest."""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath

from halfbyte.checkpoint.atomic import PARTIAL_SUFFIX
from halfbyte.checkpoint.identity import MANIFEST_FILE, VERDICT_FILE
from halfbyte.checkpoint.safe_path import check_model_file
from halfbyte.checkpoint.shards import check_shards
from halfbyte.errors import StoreError

UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".py", ".npy", ".npz")
"""Loading such a file can run arbitrary code."""
PUSHED_BESIDE = (MANIFEST_FILE, VERDICT_FILE)
"""Files that describe a version in a repository and are not part of it."""
_NOT_PLAIN = re.compile(r"[\\:\x00-\x1f\x7f]")


def check_member(path: str, what: str) -> str:
    """Refuse a path that leaves its folder or is not portable, and a file that can run code.

    Args:
        path: Relative to the version's folder, with slashes.
        what: The folder or the manifest, for messages.

    Returns:
        The path.

    Raises:
        StoreError: The path is hidden or not plain, or this type of file can run code.
    """
    if _NOT_PLAIN.search(path) or any(part[:1] in ("", ".") for part in path.split("/")):
        raise StoreError(
            f"Refusing {what}: the file {path[:80]!r} has no plain path. No part may be empty or "
            "begin with '.', and ':', '\\' and control characters are not allowed, because they "
            "have a special meaning on some systems. Rename the file."
        )
    if PurePosixPath(path).suffix.lower() in UNSAFE_SUFFIXES:
        raise StoreError(
            f"Refusing {what}: loading {path[:80]} can run a program. A version holds weights "
            "in safetensors or GGUF only; remove the file."
        )
    return path


def list_files(folder: Path) -> dict[str, Path]:
    """List the files of a model folder that go into a version.

    Args:
        folder: The model.

    Returns:
        Files by their path in the folder, sorted; without hidden files, and without the manifest
        and the verdict of the version that the folder was downloaded as.

    Raises:
        StoreError: There is no such folder, it has no weights, or a file is not allowed.
        CheckpointError: A file is a link to nowhere or out of the folder, or a shard is missing.
    """
    if not folder.is_dir():
        raise StoreError(f"Cannot add {folder}: there is no such folder. Check the path.")
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        hidden = any(part.startswith(".") for part in name.split("/"))
        if hidden or name in PUSHED_BESIDE or (path.is_dir() and not path.is_symlink()):
            continue
        if name.endswith(PARTIAL_SUFFIX):
            raise StoreError(
                f"Cannot add {folder}: {name} is unfinished. Let the run finish first."
            )
        found[check_member(name, str(folder))] = check_model_file(folder, name)
    if not any(name.endswith((".safetensors", ".gguf")) for name in found):
        raise StoreError(
            f"Cannot add {folder}: it has no .safetensors or .gguf file. Check the path."
        )
    check_shards(folder)
    return found
