"""The reload check: loads the saved checkpoint and compares it with what the run computed.

It compares all bytes with their digests, every dequantized weight with the one used in the run, and
the outputs of every block and the logits with those of the run. Errors name the tensor, module or
block that differs. One block is in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.errors import CheckpointError, VerificationError
from halfbyte.kernels.torch_reference import TorchReference
from halfbyte.machine.memory import release_memory
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.nn.model_loading import collect_linears, untie
from halfbyte.nn.replace import quantized_linears, replace_linears
from halfbyte.quantize.probe import KEPT_LOGITS, Probe, ProbeTrace, run_tail
from halfbyte.quantize.rounding import weight_checksum

HIDDEN_TOLERANCE = 1e-2
"""Allowed relative difference of a block's output. The weights were already found identical, so
only the order of summation can differ: a few units in the last place of bfloat16 (2^-8)."""
LOGITS_TOLERANCE = 2e-2
READERS = 4
"""Threads that read linears for a GPU to dequantize."""


def check_bytes(folder: Path, checksums: Mapping[str, int], device: torch.device) -> None:
    """Compare the bytes and the dequantized weights of a checkpoint with what the run wrote.

    Args:
        folder: The checkpoint.
        checksums: Checksum of the fp32 weight of every quantized linear, by name on disk.
        device: Device to dequantize on.

    Raises:
        VerificationError: Something differs; names the module or the tensor.
    """
    with ThreadPoolExecutor(READERS) as pool:
        try:
            checkpoint = open_checkpoint(folder)
            verified = pool.submit(checkpoint.verify)
            found: Iterable[int] = ()
            if device.type != "cpu" and checksums.keys() == checkpoint.linears.keys():
                # A GPU dequantizes while the CPU hashes the files.
                found = pool.map(lambda n: _checksum(checkpoint, n, device), checksums)
            verified.result()
        except CheckpointError as error:
            pool.shutdown(cancel_futures=True)
            raise VerificationError(
                f"The saved checkpoint is not what was written: {error} The disk or another "
                "program changed it. Quantize again."
            ) from error
        missing = sorted(set(checksums) ^ set(checkpoint.linears))
        if missing:
            raise VerificationError(
                f"The saved checkpoint and the run differ in {len(missing)} quantized modules, "
                f"such as {missing[0]}. Please report this with the model's name."
            )
        if device.type == "cpu":
            found = (_checksum(checkpoint, name, device) for name in checksums)
        for name, here in zip(checksums, found, strict=True):
            if here != checksums[name]:
                pool.shutdown(cancel_futures=True)
                raise VerificationError(
                    f"The saved checkpoint does not reproduce the weight of {name} that the run "
                    "used. Please report this with the model's name."
                )


def _checksum(checkpoint: Checkpoint, name: str, device: torch.device) -> int:
    return weight_checksum(checkpoint.dequantize(name, device))


def check_outputs(
    folder: Path,
    probe: Probe,
    trace: ProbeTrace,
    logits: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Run the saved checkpoint on the first probe window and compare its outputs with the run's.

    Args:
        folder: The checkpoint.
        probe: The run's probe.
        trace: The run's outputs of every block.
        logits: The run's logits of the last positions, [positions, vocabulary].
        dtype: Dtype of the run's computation.
        device: Device to compute on.

    Returns:
        The relative difference of the logits (norm of the difference over norm).

    Raises:
        VerificationError: A block's output or the logits differ; names the block.
    """
    weights = ModelWeights(folder, device, dtype=dtype, prepare=_make_prepare(dtype))
    weights.load_outside()
    stream = BlockStream(weights.model, weights.blocks, dtype)
    ids = probe.ids[:1].to(device)
    hidden: Tensor | None = None
    for index in range(len(weights.blocks.modules)):
        block = weights.load_block(index)
        if device.type != "cpu" and index + 1 < len(weights.blocks.modules):
            weights.prefetch_block(index + 1)
        for _, linear in quantized_linears(block):
            linear.prepare(kernel=TorchReference.name)
        with stream.at(index):
            found = stream.run(ids, hidden)
        expected = trace.read(index).to(device)
        difference = _relative_difference(found, expected)
        if not difference <= HIDDEN_TOLERANCE:
            raise VerificationError(
                f"The saved {weights.blocks.name(index)} does not reproduce the run: its output "
                f"has a relative difference of {difference:.2g}, allowed is {HIDDEN_TOLERANCE:g}. "
                "Please report this with the model's name."
            )
        weights.drop_block(index)
        release_memory()
        hidden = expected
    for _, linear in quantized_linears(weights.model):
        if not linear.scales.is_meta:
            linear.prepare(kernel=TorchReference.name)
    with stream.at(len(weights.blocks.modules)):
        found = run_tail(stream, ids, hidden)[0, -KEPT_LOGITS:]  # type: ignore[arg-type]
    difference = _relative_difference(found, logits.to(device))
    if not difference <= LOGITS_TOLERANCE:
        raise VerificationError(
            "The saved checkpoint's logits have a relative difference from the run's of "
            f"{difference:.2g}, allowed is {LOGITS_TOLERANCE:g}. Its blocks agree, so the cause is "
            "the final norm or the head. Please report this with the model's name."
        )
    return difference


def _make_prepare(dtype: torch.dtype) -> Callable[[PreTrainedModel, TensorFiles], None]:
    def prepare(model: PreTrainedModel, files: TensorFiles) -> None:
        found = collect_linears(model, files.files)
        untie(model, found.stored)
        replace_linears(model, found.stored, dtype=dtype)

    return prepare


def _relative_difference(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    found, expected = found[finite], expected[finite]
    scale = float(expected.norm())
    return float((found - expected).norm()) / scale if scale else float(found.norm())
