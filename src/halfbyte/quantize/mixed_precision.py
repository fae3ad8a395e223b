"""Mixed precision: survey the base model once, then give every module its bits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.bit_allocation import (
    HEADER_BYTES,
    Allocation,
    Unit,
    allocate,
    budget_for_bits,
    budget_for_size,
)
from halfbyte.quantize.block_work import BlockWork
from halfbyte.quantize.progress import Progress
from halfbyte.quantize.sensitivity import Survey, survey_batches
from halfbyte.units import parse_size

ALLOCATION_FILE = "allocation.json"


def choose_bits(
    weights: ModelWeights,
    stream: BlockStream,
    work: BlockWork,
    config: QuantConfig,
    *,
    batches: Sequence[Tensor],
    seed: int,
    folder: Path,
    progress: Progress,
) -> tuple[QuantConfig, tuple[str, ...]]:
    """Choose bits for every module, or read what an earlier process of this run chose.

    Args:
        weights: The base model; what is outside the blocks is loaded.
        stream: Runs blocks.
        work: Loads blocks.
        config: What was asked for.
        batches: Calibration ids, of which a part is used.
        seed: Draws tokens from the model's predictions.
        folder: The run's work folder.
        progress: Told what is done.

    Returns:
        The config with an override for every module that had none, and notes for the report.

    Raises:
        ConfigError: The target is below what the fewest bits need, or overrides fix linears that
            runtimes fuse differently.
    """
    path = folder / ALLOCATION_FILE
    if path.exists():
        allocation = Allocation(**json.loads(path.read_text(encoding="utf-8")))
    else:
        target_bytes = None
        if config.target_size is not None:
            target_bytes = parse_size(config.target_size, "target_size")
        progress.phase("measuring what each module's bits cost")
        survey = Survey(weights, stream, work, config, seed=seed)
        units = survey.measure(survey_batches(batches))
        if target_bytes is not None:
            budget = budget_for_size(target_bytes, _dense_bytes(weights, units), units)
        else:
            assert config.target_bits is not None
            budget = budget_for_bits(config.target_bits, units)
        allocation = allocate(units, budget)
        write_atomically(path, [json.dumps(asdict(allocation)).encode()])
    counts = Counter(allocation.bits.values())
    told = ", ".join(f"{counts[bits]} in {bits}" for bits in sorted(counts))
    note = (
        f"bits chosen by what they measurably cost: {told} bits, "
        f"{allocation.bits_per_weight:.3f} per weight; predicted KL {allocation.predicted_kl:.4f}"
    )
    progress.phase(note)
    return config.with_bits(allocation.bits), (note,)


def _dense_bytes(weights: ModelWeights, units: Sequence[Unit]) -> int:
    """Count what is written as it is: everything but the weights that are rounded."""
    whole = sum(info.num_bytes + HEADER_BYTES for info in weights.files.infos.values())
    return whole - weights.dtype.itemsize * sum(unit.num_weights for unit in units)
