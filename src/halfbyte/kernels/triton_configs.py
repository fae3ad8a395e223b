"""Tile sizes of the Triton kernels for a layer: measured if available, otherwise by rule.

A program is one instance of a kernel, as in Triton's ``tl.program_id``.
"""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.kernels.gpu_table import load_table


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """Tile sizes of a product."""

    block_out: int
    """Output channels per program."""
    block_rows: int
    """Rows of x per program; at least 16, as tensor cores require."""
    splits: int
    """Programs that split the inputs of a channel (split-K)."""
    warps: int
    stages: int
    """Depth of the software pipeline of loads."""


@dataclass(frozen=True, slots=True)
class _Rule:
    """The tile sizes with the best geometric mean over the measured shapes on an H100."""

    block_out: int
    block_rows: int
    warps: int
    stages: int
    programs: float
    """Programs per multiprocessor below which the inputs are split further."""


RULES = {
    16: _Rule(64, 16, 4, 4, 3.75),
    32: _Rule(64, 32, 4, 5, 3.75),
    64: _Rule(64, 64, 4, 4, 1.9),
    128: _Rule(128, 64, 4, 4, 1.2),
}
"""By maximum rows of x. The rule picks the fastest split in 31 of the 32 measured cases."""

AMD_RULES = {
    16: _Rule(64, 16, 4, 2, 3.75),
    32: _Rule(64, 32, 8, 2, 3.75),
    64: _Rule(64, 64, 8, 2, 1.9),
    128: _Rule(64, 64, 8, 2, 1.9),
}
"""Not measured: large tiles whose registers fit, on CDNA 3, RDNA 3 and RDNA 4."""

MAX_SPLITS = 8
MIN_STEPS = 4
"""Minimum steps of 64 inputs per program if inputs are split."""


def choose_config(
    architecture: str, num_processors: int, in_features: int, out_features: int, rows: int
) -> TritonConfig:
    """Choose the tile sizes of a product.

    Args:
        architecture: Such as ``sm_90`` or ``gfx942``; any name for other vendors.
        num_processors: Multiprocessors of the device.
        in_features: Inputs of the layer.
        out_features: Outputs of the layer.
        rows: Rows of x, from 1 to the last key of RULES.

    Returns:
        The fastest measured configuration for the layer's shape; otherwise one by rule.
    """
    bucket = next((size for size in RULES if rows <= size), max(RULES))
    measured = load_table(architecture).triton.get(((in_features, out_features), bucket))
    if measured is not None:
        return TritonConfig(**measured)
    rule = _find_rules(architecture)[bucket]
    programs = -(-out_features // rule.block_out) * -(-bucket // rule.block_rows)
    splits = choose_splits(programs, in_features // 64, rule.programs * num_processors)
    return TritonConfig(rule.block_out, rule.block_rows, splits, rule.warps, rule.stages)


def choose_experts_config(
    architecture: str,
    num_processors: int,
    in_features: int,
    out_features: int,
    row_blocks: int,
    block_rows: int,
) -> TritonConfig:
    """Choose the tile sizes of the products of a mixture of experts, by the same rules.

    Args:
        architecture: As in :func:`choose_config`.
        num_processors: Multiprocessors of the device.
        in_features: Inputs of each expert.
        out_features: Outputs of each expert.
        row_blocks: Blocks of rows, each of one expert.
        block_rows: Rows per block, a key of RULES.

    Returns:
        The configuration.
    """
    rule = _find_rules(architecture)[block_rows]
    programs = -(-out_features // rule.block_out) * row_blocks
    splits = choose_splits(programs, in_features // 64, rule.programs * num_processors)
    return TritonConfig(rule.block_out, block_rows, splits, rule.warps, rule.stages)


def choose_splits(programs: int, steps: int, wanted: float) -> int:
    """Choose how many programs split a channel's inputs.

    Args:
        programs: Programs without splitting.
        steps: Steps of 64 inputs.
        wanted: Programs that keep the device busy.

    Returns:
        The smallest power of two that gives the wanted number of programs, limited to MAX_SPLITS
        and to MIN_STEPS steps per program.
    """
    splits = 1
    while splits < MAX_SPLITS and programs * splits < wanted and steps // (2 * splits) >= MIN_STEPS:
        splits *= 2
    return splits


def _find_rules(architecture: str) -> dict[int, _Rule]:
    return AMD_RULES if architecture.startswith("gfx") else RULES


def next_power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least a number, as sizes of tiles must be."""
    return 1 << (number - 1).bit_length()
