"""How the Triton programs are cut for a layer on a GPU: measured where measured, else by rule."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.kernels.gpu_table import load_table


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


@dataclass(frozen=True, slots=True)
class _Rule:
    """The cut with the best geometric mean over the measured shapes of an H100."""

    block_out: int
    block_rows: int
    warps: int
    stages: int
    programs: float
    """Programs for each multiprocessor, below which the inputs are split further."""


RULES = {
    16: _Rule(64, 16, 4, 4, 3.75),
    32: _Rule(64, 32, 4, 5, 3.75),
    64: _Rule(64, 64, 4, 4, 1.9),
    128: _Rule(128, 64, 4, 4, 1.2),
}
"""By rows of x, up to so many. It splits as was fastest on 31 of the 32 measured cases."""

MOST_SPLITS = 8
FEWEST_STEPS = 4
"""Steps of 64 inputs of a program that shares its channels."""


def choose_config(
    architecture: str, num_processors: int, in_features: int, out_features: int, rows: int
) -> TritonConfig:
    """Choose how to cut a product.

    Args:
        architecture: ``sm_90`` and the like; of another maker, any name.
        num_processors: Multiprocessors of the device.
        in_features: Of the layer.
        out_features: Of the layer.
        rows: Of x, 1 to the last of RULES.

    Returns:
        The fastest one measured for the layer's shape, else one by rule.
    """
    bucket = next((size for size in RULES if rows <= size), max(RULES))
    measured = load_table(architecture).triton.get(((in_features, out_features), bucket))
    if measured is not None:
        return TritonConfig(**measured)
    rule = RULES[bucket]
    programs = -(-out_features // rule.block_out) * -(-bucket // rule.block_rows)
    splits = choose_splits(programs, in_features // 64, rule.programs * num_processors)
    return TritonConfig(rule.block_out, rule.block_rows, splits, rule.warps, rule.stages)


def choose_splits(programs: int, steps: int, wanted: float) -> int:
    """Choose how many programs share a channel's inputs.

    Args:
        programs: Without sharing.
        steps: Steps of 64 inputs.
        wanted: Programs that keep the device busy.

    Returns:
        A power of two: as few as give the wanted programs, of at least FEWEST_STEPS steps.
    """
    splits = 1
    while (
        splits < MOST_SPLITS
        and programs * splits < wanted
        and steps // (2 * splits) >= FEWEST_STEPS
    ):
        splits *= 2
    return splits
