"""Identify a model by the digests of the files that its outputs depend on.

A comparison records them, its cache uses them as keys, and the store checks by them that a verdict
is about the version it is attached to.
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
"""Patterns of the files that affect a model's outputs. Pickled weights are never read."""
MANIFEST_FILE = "halfbyte_manifest.json"
"""Manifest of a store's version, among its files where it was pushed."""
VERDICT_FILE = "halfbyte_verdict.json"
"""Verdict of the store that a version was pushed from, beside its manifest."""
REPORTS = (
    "checksums.json",
    "quantization_report.json",
    "report.json",
    MANIFEST_FILE,
    VERDICT_FILE,
)
"""Files about a model, which do not affect its outputs."""
CONFIG = "config.json"


def name_folder(folder: str | Path) -> str:
    """Return a folder's own name; for a symbolic link, that of the link, not of its target."""
    return Path(os.path.abspath(folder)).name  # noqa: PTH100 - resolve() follows links


def digest_file(path: Path) -> str:
    """Compute a file's SHA-256, in hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def digest_files(folder: Path) -> dict[str, str]:
    """Compute the digest of every file in a model folder that its outputs depend on.

    Args:
        folder: A Hugging Face model folder.

    Returns:
        SHA-256 in hex by path relative to the folder, sorted.
    """
    found = [path for pattern in FILES for path in folder.glob(pattern)]
    files = {path.relative_to(folder).as_posix(): path for path in found}
    return {name: digest_file(files[name]) for name in sorted(files) if name not in REPORTS}


def is_weights(name: str) -> bool:
    """Return whether a file contains weights."""
    return name.endswith(".safetensors")


def digest_weights(files: Mapping[str, str]) -> str:
    """Compute one digest of a model's weights and config.

    Args:
        files: Digests by path, from :func:`digest_files`.

    Returns:
        SHA-256 in hex of their names and digests; independent of tokenizer and model card.
    """
    counted = sorted(name for name in files if is_weights(name) or name == CONFIG)
    text = "".join(f"{files[name]}  {name}\n" for name in counted)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_all(files: Mapping[str, str]) -> str:
    """Compute one digest of all ``files``; SHA-256 in hex."""
    text = "".join(f"{name} {files[name]}\n" for name in sorted(files))
    return hashlib.sha256(text.encode()).hexdigest()
