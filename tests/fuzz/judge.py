"""Read a damaged checkpoint in every possible way, and judge the result."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.fuzz.bases import Base, Files
from tests.fuzz.damage import Damage

from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.errors import HalfbyteError

Weights = Mapping[str, str]


def digest_weights(checkpoint: Checkpoint) -> Weights:
    """Compute a digest of every linear's weight and bias."""
    digests = {}
    for name in checkpoint.linears:
        bias = checkpoint.load_linear(name).bias
        parts = [checkpoint.dequantize(name), torch.zeros(0) if bias is None else bias.float()]
        content = torch.cat([part.flatten() for part in parts]).numpy().tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
    return digests


def write_files(folder: Path, files: Files) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def judge(folder: Path, base: Base, intact: Weights, done: Damage, files: Files) -> str:
    """Write the damaged checkpoint and read it.

    Args:
        folder: Where to write it; existing content is removed.
        base: The checkpoint before the mutation.
        intact: :func:`digest_weights` of the base.
        done: The mutation.
        files: The damaged checkpoint.

    Returns:
        "refused", "same" (weights unchanged), "digest" (weights changed, detected by the digests)
        or "fooled" (weights changed in a file that is still valid).

    Raises:
        AssertionError: The weights changed without an error, although it was detectable.
    """
    write_files(folder, files)
    try:
        checkpoint = open_checkpoint(folder)
        weights = digest_weights(checkpoint)
        check_consumers(checkpoint)
    except HalfbyteError:
        return "refused"
    if base.has_digests and _should_not_verify(base, files, checkpoint):
        try:
            checkpoint.verify()
        except HalfbyteError:
            return "same" if weights == intact else "digest"
        raise AssertionError(f"{base.name}: {done}: not detected by the digests")
    if weights == intact:
        return "same"
    assert done.may_fool, f"{base.name}: {done}: the weights changed without an error"
    return "fooled"


def _should_not_verify(base: Base, files: Files, checkpoint: Checkpoint) -> bool:
    """Return whether weight files or the config differ from the original."""
    config = json.loads(base.files["config.json"])["quantization_config"]
    return checkpoint.labels.raw != config or any(
        files.get(name) != base.files[name] for name in base.weight_files
    )
