"""The interface that every kernel implements, and the layer description it is selected by.

::

    LinearSpec (sizes, grid, dtype, device) ──> Kernel.find_mismatch ──> None, or why it cannot run
    Operands (stored tensors) ──> Kernel.prepare ──> repacked weight (or the stored one unchanged)
    x, Operands ──> Kernel.apply ──> x @ dequantize(weight).T + bias

A kernel is a stateless object; everything it needs is in its arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.quant_config import SUPPORTED_BITS


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearSpec:
    """The properties of a quantized linear that decide which kernels can run it."""

    bits: int
    group_size: int
    """Input columns per group, in 1..in_features; the last group may be shorter."""
    in_features: int
    out_features: int
    symmetric: bool
    """Whether every zero is the middle code."""
    act_order: bool
    """Whether groups are not contiguous, so that ``g_idx`` is needed."""
    zero_offset: int
    """What was subtracted from the zeros before storing: 1 in v1, 0 in v2."""
    dtype: torch.dtype
    """Of the input and the output."""
    device_type: str

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ConfigError(
                f"Cannot run a quantized linear of bits={self.bits}; allowed: {SUPPORTED_BITS}."
            )
        if min(self.in_features, self.out_features) < 1:
            raise ConfigError(
                f"Cannot run a quantized linear {self.in_features} -> {self.out_features}; "
                "both sizes must be at least 1."
            )
        if not 1 <= self.group_size <= self.in_features:
            raise ConfigError(
                f"Cannot run a quantized linear with group_size={self.group_size} and "
                f"in_features={self.in_features}; allowed group sizes: 1..{self.in_features}."
            )
        if self.zero_offset not in (0, 1):
            raise ConfigError(
                f"Cannot run a quantized linear of zero_offset={self.zero_offset}; allowed: 0, 1."
            )
        if not self.dtype.is_floating_point:
            raise ConfigError(
                f"Cannot run a quantized linear in {self.dtype}; it needs a floating dtype."
            )

    @property
    def num_groups(self) -> int:
        """Number of groups, the rows of ``scales``."""
        return -(-self.in_features // self.group_size)

    @property
    def is_ragged(self) -> bool:
        """Whether the last group is shorter than the others."""
        return self.in_features % self.group_size != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The tensors of a quantized linear; only the layout of the weight differs between kernels."""

    weight: tuple[Tensor, ...]
    """(qweight,) as stored, or the tensors that the kernel's ``prepare`` returned."""
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    """Group of each input column; None if groups are contiguous."""


class Kernel(Protocol):
    """An implementation of ``x @ dequantize(weight).T``."""

    @property
    def name(self) -> str:
        """Name in the registry and in ``HALFBYTE_KERNEL``."""

    @property
    def repacks(self) -> bool:
        """Whether ``prepare`` converts to another layout, so that ``qweight`` need not be kept."""

    def find_obstacle(self) -> str | None:
        """Return why this machine or torch build cannot run the kernel; None if it can."""

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the kernel cannot run a layer; None if it can."""

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Convert the stored weight to the layout of ``apply``; other operands stay as stored."""

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Undo ``prepare``: return ``qweight`` as stored, bit for bit."""

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Compute [..., in] -> [..., out] in ``spec.dtype``; no gradient is recorded."""

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in]; each value is exact except for one rounding to ``dtype``."""

    def error_bound(self, spec: LinearSpec) -> float:
        """Bound ``|apply - exact|`` as a multiple of ``|x| @ |W|.T + |bias|``, elementwise."""


@runtime_checkable
class RowTieredKernel(Protocol):
    """A kernel that runs different code depending on the number of rows of x."""

    def describe_row_tiers(self, spec: LinearSpec) -> str:
        """Describe which code runs up to how many rows, for ``halfbyte doctor``."""


@runtime_checkable
class GradientKernel(Protocol):
    """A kernel that can also compute the gradient of its input, one tile of weights at a time.

    For other kernels the whole weight is dequantized for the duration of one product.
    """

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Compute ``gradient @ dequantize(W)``: [..., out] -> [..., in] in the gradient's dtype."""
