"""Which model a folder holds: the digests of the files that its answers depend on.

A comparison writes them down, its cache is ordered by them, and the store holds a verdict against
the version that it is to be attached to.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

FILES = (
    "*.safetensors",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "additional_chat_templates/*.jinja",
)
"""What decides about a model's answers. Pickled weights do not: they are never read."""
MANIFEST_FILE = "halfbyte_manifest.json"
"""What a store's version is made of, beside its files where it was pushed to."""
VERDICT_FILE = "halfbyte_verdict.json"
"""The verdict of the store that a version was pushed from, beside its manifest."""
REPORTS = (
    "checksums.json",
    "quantization_report.json",
    "report.json",
    MANIFEST_FILE,
    VERDICT_FILE,
)
"""What is said about a model and may lie beside it."""
CONFIG = "config.json"


def name_folder(folder: str | Path) -> str:
    """Give the name that a model's folder was called by; of a link that is not what it leads to."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100 - resolve() follows links


def digest_file(path: Path) -> str:
    """Give a file's sha256 in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """Digest every file in a model's folder that its answers depend on.

    Args:
        folder: A Hugging Face folder.

    Returns:
        sha256 in hex by path in the folder, sorted.
    """
    found = [path for pattern in FILES for path in folder.glob(pattern)]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: digest_file(files[name]) for name in sorted(files) if name not in REPORTS}


def is_weights(name: str) -> bool:
    """Say whether a file holds weights."""
    return name.endswith(".safetensors")


def digest_weights(files: Mapping[str, str]) -> str:
    """Give one digest of a model: of the names and digests of its weights and config.

    Args:
        files: As :func:`digest_files` gives them.

    Returns:
        sha256 in hex; the same for the same model with another tokenizer or card.
    """
    counted = sorted(name for name in files if is_weights(name) or name == CONFIG)
    text = "".join(f"{files[name]}  {name}\n" for name in counted)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_all(files: Mapping[str, str]) -> str:
    """Give one digest of everything in ``files``; sha256 in hex."""
    text = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
