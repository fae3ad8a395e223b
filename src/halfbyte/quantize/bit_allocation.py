"""Measured losses by module and bits, and a budget -> bits for every module.

What readers fuse must have the same bits: the linears that share an input (q/k/v, gate/up), and all
experts of a layer. Such a unit gets bits as one.

Every unit starts at the fewest bits. Then, again and again, the step up that saves the most loss
per bit of storage is taken, as long as the budget allows. Along the lower convex hull of every
unit's losses this is the optimum for the storage that it ends at; what is lost to the optimum for
the budget itself is at most one step.
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
"""At most, of one tensor's entry in a file's header."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One way to store a unit."""

    bits: int
    stored_bits: int
    """What its linears take on disk: codes, scales, zeros."""
    loss: float
    """Predicted rise of the KL to the base model, nats per token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """Linears that must have the same bits."""

    linears: tuple[str, ...]
    """Names on disk; none where overrides fix the bits, which take storage all the same."""
    num_weights: int
    choices: tuple[Choice, ...]
    """By rising bits; at least one."""
    other_bits: int = 0
    """What g_idx and the tensors' names take on disk, whatever the choice; not counted in bits per
    weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Bits for every module that has none of its own."""

    bits: Mapping[str, int]
    """Of those that were chosen for, by name on disk."""
    bits_per_weight: float
    """As stored: codes, scales and zeros."""
    predicted_kl: float
    """Sum of the units' losses, nats per token."""


def stored_bits(scheme: Scheme, out_features: int, in_features: int) -> int:
    """Count what a linear takes on disk for its weights.

    Args:
        scheme: How it is rounded.
        out_features: Its outputs.
        in_features: Its inputs.

    Returns:
        Bits of codes, scales and zeros.
    """
    size = in_features if scheme.group_size == PER_CHANNEL else scheme.group_size
    groups = -(-in_features // size)
    return out_features * (in_features * scheme.bits + groups * (SCALE_BITS + scheme.bits))


def budget_for_bits(target: float, units: Sequence[Unit]) -> int:
    """Give the storage that a mean of bits per weight allows, scales and zeros included.

    Args:
        target: Bits per weight.
        units: All units.

    Returns:
        Bits in all.

    Raises:
        ConfigError: Even the fewest bits everywhere need more; says how much.
    """
    num_weights = sum(unit.num_weights for unit in units)
    least = sum(unit.choices[0].stored_bits for unit in units)
    budget = int(target * num_weights)
    if budget < least:
        raise ConfigError(
            f"target_bits is {target:g}; with scales and zeros, {least / num_weights:.3f} bits per "
            "weight is the least for this model and group size. Give at least that, or a larger "
            "group size."
        )
    return budget


def budget_for_size(target_bytes: int, dense_bytes: int, units: Sequence[Unit]) -> int:
    """Give the storage that a checkpoint's size leaves for quantized linears.

    Args:
        target_bytes: Of the whole checkpoint.
        dense_bytes: Of what stays in 16 bits.
        units: All units.

    Returns:
        Bits in all.

    Raises:
        ConfigError: Even the fewest bits everywhere need more; says how much.
    """
    least = sum(unit.choices[0].stored_bits for unit in units)
    fixed_bytes = dense_bytes + sum(unit.other_bits for unit in units) // 8
    budget = 8 * (target_bytes - fixed_bytes)
    if budget < least:
        raise ConfigError(
            f"target_size is {format_bytes(target_bytes)}; what is not rounded takes "
            f"{format_bytes(fixed_bytes)} and the rest at least {format_bytes(least / 8)}. Give at "
            f"least {format_bytes(fixed_bytes + least / 8)}, or a larger group size."
        )
    return budget


def allocate(units: Sequence[Unit], budget: int) -> Allocation:
    """Choose bits for every unit.

    Args:
        units: With their measured losses.
        budget: Bits of storage, at least what the fewest bits everywhere need.

    Returns:
        The choice.
    """
    hulls = [_lower_hull(unit.choices) for unit in units]
    chosen = [0] * len(units)
    used = sum(hull[0].stored_bits for hull in hulls)
    waiting: list[tuple[float, int]] = []

    def offer(index: int) -> None:
        hull, place = hulls[index], chosen[index]
        if place + 1 < len(hull):
            here, there = hull[place], hull[place + 1]
            gain = (here.loss - there.loss) / (there.stored_bits - here.stored_bits)
            heapq.heappush(waiting, (-gain, index))

    for index in range(len(units)):
        offer(index)
    while waiting:
        _, index = heapq.heappop(waiting)
        hull, place = hulls[index], chosen[index]
        cost = hull[place + 1].stored_bits - hull[place].stored_bits
        # One that does not fit is dropped with all its later steps; a smaller unit may still fit.
        if used + cost <= budget:
            used += cost
            chosen[index] += 1
            offer(index)
    final = [hull[place] for hull, place in zip(hulls, chosen, strict=True)]
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
    """Keep the choices between which loss falls ever more slowly as storage grows."""
    hull: list[Choice] = []
    for choice in choices:
        if hull and choice.loss >= hull[-1].loss:
            continue  # more storage, no less loss
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(one: Choice, two: Choice) -> float:
    """Loss saved per bit."""
    return (one.loss - two.loss) / (two.stored_bits - one.stored_bits)
