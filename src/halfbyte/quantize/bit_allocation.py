"""Choose the bits of every module from measured losses and a storage budget.

Linears that runtimes fuse must have the same bits: those that share an input (q/k/v, gate/up), and
all experts of a layer. Each such set is a unit, which gets its bits as a whole.

The allocation is greedy: every unit starts at its fewest bits, then the upgrade that reduces the
loss most per bit of storage is taken, as long as the budget allows. On the lower convex hull of
each unit's losses this is optimal up to the first upgrade that does not fit. Smaller upgrades use
what is left; the result misses the optimum for the full budget by that one upgrade at most.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from halfbyte.errors import ConfigError
from halfbyte.quant_config import PER_CHANNEL, Scheme
from halfbyte.units import format_bytes

SCALE_BITS = 16
HEADER_BYTES = 160
"""Upper bound on one tensor's entry in a file's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to store a unit."""

    bits: int
    stored_bits: int
    """Storage of its linears on disk: codes, scales, zeros."""
    loss: float
    """Predicted increase of the KL to the base model, nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Linears that must have the same bits."""

    linears: tuple[str, ...]
    """Names on disk; empty where overrides fix the bits, although the storage still counts."""
    num_weights: int
    choices: tuple[Choice, ...]
    """In order of increasing bits; at least one."""
    other_bits: int = 0
    """Storage of g_idx and the tensors' names, the same for all choices; not counted in bits per
    weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """The chosen bits of every module whose bits no override fixes."""

    bits: Mapping[str, int]
    """By name on disk."""
    bits_per_weight: float
    """Including scales and zeros."""
    predicted_kl: float
    """Sum of the units' losses, nats per token."""


def stored_bits(scheme: Scheme, out_features: int, in_features: int) -> int:
    """Count the bits of storage that a linear's weights take on disk.

    Args:
        scheme: How it is rounded.
        out_features: Rows of the weight.
        in_features: Columns of the weight.

    Returns:
        Bits of codes, scales and zeros.
    """
    size = in_features if scheme.group_size == PER_CHANNEL else scheme.group_size
    groups = -(-in_features // size)
    return out_features * (in_features * scheme.bits + groups * (SCALE_BITS + scheme.bits))


def budget_for_bits(target: float, units: Sequence[Unit]) -> int:
    """Return the storage budget for a mean number of bits per weight, scales and zeros included.

    Args:
        target: Bits per weight.
        units: All units.

    Returns:
        Total bits of storage.

    Raises:
        ConfigError: Even the fewest bits for every unit exceed the budget; says the minimum.
    """
    num_weights = sum(unit.num_weights for unit in units)
    minimum = sum(unit.choices[0].stored_bits for unit in units)
    budget = int(target * num_weights)
    if budget < minimum:
        raise ConfigError(
            f"target_bits is {target:g}; the minimum for this model and group size is "
            f"{minimum / num_weights:.3f} bits per weight, including scales and zeros. Use at "
            "least that, or a larger group size."
        )
    return budget


def budget_for_size(target_bytes: int, dense_bytes: int, units: Sequence[Unit]) -> int:
    """Return the storage that a checkpoint size leaves for the quantized linears.

    Args:
        target_bytes: Size of the whole checkpoint.
        dense_bytes: Size of the tensors that stay in 16 bits.
        units: All units.

    Returns:
        Total bits of storage.

    Raises:
        ConfigError: Even the fewest bits for every unit exceed the budget; says the minimum.
    """
    minimum = sum(unit.choices[0].stored_bits for unit in units)
    fixed_bytes = dense_bytes + sum(unit.other_bits for unit in units) // 8
    budget = 8 * (target_bytes - fixed_bytes)
    if budget < minimum:
        raise ConfigError(
            f"target_size is {format_bytes(target_bytes)}; the tensors that are not quantized take "
            f"{format_bytes(fixed_bytes)}, and the quantized ones at least "
            f"{format_bytes(minimum / 8)}. Use at least "
            f"{format_bytes(fixed_bytes + minimum / 8)}, or a larger group size."
        )
    return budget


def allocate(units: Sequence[Unit], budget: int) -> Allocation:
    """Choose the bits of every unit within a budget.

    Args:
        units: With their measured losses.
        budget: Bits of storage; enough for the fewest bits of every unit.

    Returns:
        The allocation.
    """
    hulls = [_lower_hull(unit.choices) for unit in units]
    chosen = [0] * len(units)
    used = sum(hull[0].stored_bits for hull in hulls)
    upgrades: list[tuple[float, int]] = []

    def push_upgrade(index: int) -> None:
        hull, position = hulls[index], chosen[index]
        if position + 1 < len(hull):
            gain = _slope(hull[position], hull[position + 1])
            heapq.heappush(upgrades, (-gain, index))

    for index in range(len(units)):
        push_upgrade(index)
    while upgrades:
        _, index = heapq.heappop(upgrades)
        hull, position = hulls[index], chosen[index]
        cost = hull[position + 1].stored_bits - hull[position].stored_bits
        # A unit whose upgrade does not fit is done; the upgrade of a smaller one may still fit.
        if used + cost <= budget:
            used += cost
            chosen[index] += 1
            push_upgrade(index)
    final = [hull[position] for hull, position in zip(hulls, chosen, strict=True)]
    return Allocation(
        bits={
            name: choice.bits
            for unit, choice in zip(units, final, strict=True)
            for name in unit.linears
        },
        bits_per_weight=used / max(sum(unit.num_weights for unit in units), 1),
        predicted_kl=sum(choice.loss for choice in final),
    )


def _lower_hull(choices: Sequence[Choice]) -> list[Choice]:
    """Return the choices on the lower convex hull of loss over storage."""
    hull: list[Choice] = []
    for choice in choices:
        if hull and choice.loss >= hull[-1].loss:
            continue  # more storage, no less loss
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(small: Choice, large: Choice) -> float:
    """Return the loss saved per additional bit of storage."""
    return (small.loss - large.loss) / (large.stored_bits - small.stored_bits)
