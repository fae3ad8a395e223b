"""What a conversion did: what is exact, what is not and by how much, where it is, how big."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SAMPLED_ROWS = 128
ROW_BLOCK = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedTensor:
    """One tensor that the target could not hold exactly, and what that cost.

    Measured on :data:`SAMPLED_ROWS` rows from all over it where it has more.
    """

    name: str
    how: str
    relative_error: float
    """Root of the squared error over the squared weights. Unitless."""
    largest_error: float
    """Largest absolute error over the largest absolute weight. Unitless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """A finished conversion."""

    source: str
    source_format: str
    target_format: str
    output: Path
    num_linears: int
    holds: Mapping[str, int]
    """How many linears are held in which way, such as "Q4_0" or "4 bits, group 64"."""
    rounded: tuple[RoundedTensor, ...]
    folded: int
    """Linears whose act-order was folded into their neighbours."""
    num_bytes: int
    """Of the weight files."""
    seconds: float
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every weight is bit for bit what the source's codes stand for."""
        return not self.rounded

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "output": str(self.output), "is_exact": self.is_exact}


def sample_rows(number: int) -> Tensor:
    """Choose rows to measure on: all, or blocks of 32 from beginning to end.

    Args:
        number: Of rows.

    Returns:
        int64, ascending.
    """
    if number <= SAMPLED_ROWS:
        return torch.arange(number)
    starts = torch.linspace(0, number // ROW_BLOCK - 1, SAMPLED_ROWS // ROW_BLOCK).long()
    return (starts[:, None] * ROW_BLOCK + torch.arange(ROW_BLOCK)).flatten()


def sort_by_error(rounded: Iterable[RoundedTensor]) -> tuple[RoundedTensor, ...]:
    """Order measurements by their error: they come in whatever order they were made."""
    return tuple(sorted(rounded, key=lambda found: (-found.relative_error, found.name)))


def measure_rounding(name: str, how: str, weight: Tensor, held: Tensor) -> RoundedTensor:
    """Compare what is held with what it stands for.

    Args:
        name: The tensor.
        how: What was done to it.
        weight: As it should be, float.
        held: As it is, of the same shape.

    Returns:
        The errors; both 0 where they are equal.
    """
    weight = weight.to(torch.float32)
    difference = held.to(torch.float32) - weight
    size = float(weight.norm()) or 1.0
    largest = float(weight.abs().max()) or 1.0
    return RoundedTensor(
        name=name,
        how=how,
        relative_error=float(difference.norm()) / size,
        largest_error=float(difference.abs().max()) / largest,
    )
