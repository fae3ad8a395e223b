"""How the Triton programs are cut for a layer on a GPU: measured where measured, else by rule.

A table per architecture is shipped (``triton_configs/sm_90.json``), made by
``bench/measure_gpu_kernels.py``; nothing is tuned at import or at first use.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources

ROW_BUCKETS = (1, 16, 32, 64)
"""A configuration serves all row counts up to its bucket; more rows are dequantized first."""


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """One way to cut a product into programs."""

    block_out: int
    """Output channels of a program."""
    block_rows: int
    """Rows of x of a program; 16 or more, the tensor core's own."""
    splits: int
    """Programs that share the inputs of a channel."""
    warps: int
    stages: int
    """Depth of the pipeline of loads."""


@functools.cache
def load_table(architecture: str) -> dict[tuple[int, int, int], TritonConfig]:
    """Load the measured configurations of an architecture.

    Args:
        architecture: ``sm_90`` and the like.

    Returns:
        By (in_features, out_features, rows bucket); empty where none were measured.
    """
    file = resources.files("halfbyte.kernels") / "triton_configs" / f"{architecture}.json"
    if not file.is_file():
        return {}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {
        (entry["in_features"], entry["out_features"], entry["rows"]): TritonConfig(*entry["config"])
        for entry in table["entries"]
    }


def choose_config(
    architecture: str, num_processors: int, in_features: int, out_features: int, rows: int
) -> TritonConfig:
    """Choose how to cut a product.

    Args:
        architecture: ``sm_90`` and the like; of another maker, any name.
        num_processors: Multiprocessors of the device.
        in_features: Of the layer.
        out_features: Of the layer.
        rows: Of x, 1 or more.

    Returns:
        The measured configuration of the layer's own shape, else of the nearest shape (its splits
        made to fit), else one by rule.
    """
    bucket = next((size for size in ROW_BUCKETS if rows <= size), ROW_BUCKETS[-1])
    table = load_table(architecture)
    exact = table.get((in_features, out_features, bucket))
    if exact is not None:
        return exact
    block_rows = max(16, min(bucket, 64))
    block_out = 64 if bucket <= 16 else 128
    warps, stages = 4, 5 if bucket <= 16 else 4
    tiles = -(-out_features // block_out)
    splits = choose_splits(tiles, in_features // 64, num_processors)
    return TritonConfig(block_out, block_rows, splits, warps, stages)


def choose_splits(tiles: int, steps: int, num_processors: int) -> int:
    """Choose how many programs share a channel's inputs.

    Args:
        tiles: Programs over the output channels.
        steps: Steps of 64 inputs.
        num_processors: Multiprocessors of the device.

    Returns:
        A power of two: as few as give every multiprocessor four programs, of at least four steps.
    """
    splits = 1
    while splits < 16 and tiles * splits < 4 * num_processors and steps // (2 * splits) >= 4:
        splits *= 2
    return splits
