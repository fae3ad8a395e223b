"""Read the saved checkpoint again and compute with it what the run computed in memory.

Three comparisons, each of which names what differs: every byte with its digest (tensor), every
dequantized weight with the one that the run computed with (module), and the hidden states behind
every block and the logits with the run's own (block). One block is in memory at a time.
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
from halfbyte.quantize.probe import KEPT_LOGITS, Probe, Trail, run_tail
from halfbyte.quantize.rounding import weight_checksum

HIDDEN_TOLERANCE = 1e-2
"""Relative difference of a block's output. The weights are compared bit by bit before; what is
left is the order in which sums are taken, a few units of bfloat16's last place (2^-8)."""
LOGITS_TOLERANCE = 2e-2
READERS = 4
"""Linears that are read at the same time for a GPU to take apart."""


def check_bytes(folder: Path, checksums: Mapping[str, int], device: torch.device) -> None:
    """Compare a saved checkpoint's bytes and weights with what the run wrote.

    Args:
        folder: The checkpoint.
        checksums: Of the fp32 weight of every quantized linear, by name on disk.
        device: Where weights are taken apart again.

    Raises:
        VerificationError: Something differs; names the module or the tensor.
    """
    with ThreadPoolExecutor(READERS) as pool:
        try:
            checkpoint = open_checkpoint(folder)
            verified = pool.submit(checkpoint.verify)
            found: Iterable[int] = ()
            if device.type != "cpu" and checksums.keys() == checkpoint.linears.keys():
                # A GPU takes weights apart while the CPU digests files.
                found = pool.map(lambda n: _checksum(checkpoint, n, device), checksums)
            verified.result()
        except CheckpointError as error:
            pool.shutdown(cancel_futures=True)
            raise VerificationError(
                f"The saved checkpoint is not what was written: {error} The disk or another "
                "program changed it; quantize again."
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
                    f"The saved checkpoint does not give back the weight of {name} that the run "
                    "computed with. Please report this with the model's name."
                )


def _checksum(checkpoint: Checkpoint, name: str, device: torch.device) -> int:
    return weight_checksum(checkpoint.dequantize(name, device))


def check_outputs(
    folder: Path,
    probe: Probe,
    trail: Trail,
    logits: Tensor,
    dtype: torch.dtype,
    device: torch.device,
) -> float:
    """Run the saved checkpoint on the first probe window and compare with the run.

    Args:
        folder: The checkpoint.
        probe: What was run.
        trail: The run's hidden states behind every block.
        logits: The run's logits of the last positions, [positions, vocabulary].
        dtype: In which the run computed.
        device: Where to compute.

    Returns:
        The largest difference of the logits, relative to their spread.

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
        expected = trail.read(index).to(device)
        difference = _relative(found, expected)
        if not difference <= HIDDEN_TOLERANCE:
            raise VerificationError(
                f"The saved {weights.blocks.name(index)} does not compute what the run computed: "
                f"its output differs by {difference:.2g} relative, allowed is "
                f"{HIDDEN_TOLERANCE:g}. Please report this with the model's name."
            )
        weights.drop_block(index)
        release_memory()
        hidden = expected
    for _, linear in quantized_linears(weights.model):
        if not linear.scales.is_meta:
            linear.prepare(kernel=TorchReference.name)
    with stream.at(len(weights.blocks.modules)):
        found = run_tail(stream, ids, hidden)[0, -KEPT_LOGITS:]  # type: ignore[arg-type]
    difference = _relative(found, logits.to(device))
    if not difference <= LOGITS_TOLERANCE:
        raise VerificationError(
            f"The saved checkpoint's logits differ from the run's by {difference:.2g} relative, "
            f"allowed is {LOGITS_TOLERANCE:g}; its blocks agree, so the difference lies behind "
            "them (final norm or head). Please report this with the model's name."
        )
    return difference


def _make_prepare(dtype: torch.dtype) -> Callable[[PreTrainedModel, TensorFiles], None]:
    def prepare(model: PreTrainedModel, files: TensorFiles) -> None:
        found = collect_linears(model, files.files)
        untie(model, found.stored)
        replace_linears(model, found.stored, dtype=dtype)

    return prepare


def _relative(found: Tensor, expected: Tensor) -> float:
    found, expected = found.double(), expected.double()
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(found)):
        return math.inf
    found, expected = found[finite], expected[finite]
    scale = float(expected.norm())
    return float((found - expected).norm()) / scale if scale else float(found.norm())
