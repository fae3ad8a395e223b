"""The report of a conversion: location, size, representations, and rounding errors."""

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
    """A tensor that the target could not represent exactly, and its error.

    Measured on a sample of :data:`SAMPLED_ROWS` rows if it has more.
    """

    name: str
    how: str
    relative_error: float
    """Norm of the error divided by the norm of the weights. Unitless."""
    largest_error: float
    """Largest absolute error divided by the largest absolute weight. Unitless."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionReport:
    """The result of a conversion."""

    source: str
    source_format: str
    target_format: str
    output: Path
    num_linears: int
    holds: Mapping[str, int]
    """Number of linears by representation, such as "Q4_0" or "4 bits, symmetric"."""
    rounded: tuple[RoundedTensor, ...]
    folded: int
    """Number of linears whose act-order was folded into their neighbors."""
    num_bytes: int
    """Size of the weight files."""
    seconds: float
    notes: tuple[str, ...]

    @property
    def is_exact(self) -> bool:
        """Whether every weight is bit-identical to the dequantized source."""
        return not self.rounded

    def to_dict(self) -> dict[str, Any]:
        """Convert to plain values for JSON."""
        return {**asdict(self), "output": str(self.output), "is_exact": self.is_exact}


def sample_rows(number: int) -> Tensor:
    """Choose the rows to measure: all, or evenly spaced blocks of 32.

    Args:
        number: Number of rows.

    Returns:
        Row indices, int64, ascending.
    """
    if number <= SAMPLED_ROWS:
        return torch.arange(number)
    starts = torch.linspace(0, number // ROW_BLOCK - 1, SAMPLED_ROWS // ROW_BLOCK).long()
    return (starts[:, None] * ROW_BLOCK + torch.arange(ROW_BLOCK)).flatten()


def sort_by_error(rounded: Iterable[RoundedTensor]) -> tuple[RoundedTensor, ...]:
    """Sort measurements by error, largest first: threads make them in any order."""
    return tuple(sorted(rounded, key=lambda found: (-found.relative_error, found.name)))


def measure_rounding(name: str, how: str, weight: Tensor, rounded: Tensor) -> RoundedTensor:
    """Measure the error of a rounded weight.

    Args:
        name: Name of the tensor.
        how: How it was rounded.
        weight: The exact weight, float.
        rounded: The rounded weight, of the same shape.

    Returns:
        The errors; both are 0 if the weights are equal.
    """
    weight = weight.to(torch.float32)
    difference = rounded.to(torch.float32) - weight
    norm = float(weight.norm()) or 1.0
    largest = float(weight.abs().max()) or 1.0
    return RoundedTensor(
        name=name,
        how=how,
        relative_error=float(difference.norm()) / norm,
        largest_error=float(difference.abs().max()) / largest,
    )
