"""Read a damaged checkpoint in every way there is, and judge what came of it."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from tests.fuzz.bases import Base, Files
from tests.fuzz.mutations import Damage

from halfbyte.checkpoint.check import check_consumers
from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.errors import HalfbyteError

Weights = Mapping[str, str]


def digest_weights(checkpoint: Checkpoint) -> Weights:
    """Digest what every linear computes with: its weight and its bias."""
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
        folder: Is emptied and filled.
        base: What was damaged.
        intact: :func:`digest_weights` of the base.
        done: How it was damaged.
        files: The result.

    Returns:
        "refused", "same" (all weights as before), "digest" (other weights, and the digests told)
        or "fooled" (other weights in a file that is as valid as before).

    Raises:
        AssertionError: Other weights came out and nothing told, though something could.
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
        raise AssertionError(f"{base.name}: {done}: the digests did not tell")
    if weights == intact:
        return "same"
    assert done.may_fool, f"{base.name}: {done}: other weights, and nothing told"
    return "fooled"


def _should_not_verify(base: Base, files: Files, checkpoint: Checkpoint) -> bool:
    """Whether weight files or the config are not what was written."""
    config = json.loads(base.files["config.json"])["quantization_config"]
    return checkpoint.labels.raw != config or any(
        files.get(name) != base.files[name] for name in base.weight_files
    )
