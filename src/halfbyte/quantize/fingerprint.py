"""Fingerprint a model folder without reading its weight files completely."""

from __future__ import annotations

import hashlib

from halfbyte.checkpoint.shards import TensorFiles

SAMPLES = 64
SAMPLE_BYTES = 4096


def fingerprint_model(files: TensorFiles) -> str:
    """Hash a model folder: its configuration, and the size and 64 samples of each weight file.

    Args:
        files: The open folder.

    Returns:
        SHA-256 in hex, independent of the folder's location.
    """
    digest = hashlib.sha256((files.folder / "config.json").read_bytes())
    for path in files.files:
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(size - SAMPLE_BYTES, 0) // (SAMPLES - 1))
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
