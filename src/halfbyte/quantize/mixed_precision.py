"""Mixed precision: measures the sensitivity of every module once, then assigns bits."""

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
from halfbyte.quantize.sensitivity import SensitivityAnalysis, select_batches
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
    """Choose the bits of every module, or load the choice of an earlier process of this run.

    Args:
        weights: The base model; the weights outside the blocks must be loaded.
        stream: Runs blocks.
        work: Loads blocks.
        config: The requested configuration, with the target.
        batches: Calibration ids, of which a subset is used.
        seed: Seed for sampling tokens from the model's predictions.
        folder: The run's work folder, where the choice is kept.
        progress: Reports the phase.

    Returns:
        The config with an override for every module that had none, and notes for the report.

    Raises:
        ConfigError: The target is too small even for the fewest bits, or overrides assign different
            bits to linears that runtimes fuse.
    """
    path = folder / ALLOCATION_FILE
    if path.exists():
        allocation = Allocation(**json.loads(path.read_text(encoding="utf-8")))
    else:
        target_bytes = None
        if config.target_size is not None:
            target_bytes = parse_size(config.target_size, "target_size")
        progress.phase("measuring the sensitivity of each module")
        analysis = SensitivityAnalysis(weights, stream, work, config, seed=seed)
        units = analysis.measure(select_batches(batches))
        if target_bytes is not None:
            budget = budget_for_size(target_bytes, _dense_bytes(weights, units), units)
        else:
            assert config.target_bits is not None
            budget = budget_for_bits(config.target_bits, units)
        allocation = allocate(units, budget)
        write_atomically(path, [json.dumps(asdict(allocation)).encode()])
    counts = Counter(allocation.bits.values())
    summary = ", ".join(f"{counts[bits]} in {bits}" for bits in sorted(counts))
    note = (
        f"bits chosen by measured sensitivity: {summary} bits, "
        f"{allocation.bits_per_weight:.3f} per weight; predicted KL {allocation.predicted_kl:.4f}"
    )
    progress.phase(note)
    return config.with_bits(allocation.bits), (note,)


def _dense_bytes(weights: ModelWeights, units: Sequence[Unit]) -> int:
    """Return the bytes that are written unquantized: all tensors except the rounded weights."""
    total = sum(info.num_bytes + HEADER_BYTES for info in weights.files.infos.values())
    return total - weights.dtype.itemsize * sum(unit.num_weights for unit in units)
