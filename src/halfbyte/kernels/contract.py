"""What a kernel is given, what it must offer, and the checks that it need not repeat.

::

    LinearSpec (sizes, grid, dtype, device) ──> Kernel.find_mismatch  may it run this layer?
    Operands (stored tensors) ──> Kernel.prepare ──> repacked weight (or the stored one)
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
    """Everything about a quantized linear that decides which kernels can run it."""

    bits: int
    group_size: int
    """Input columns per group, in 1..in_features; the last group may be shorter."""
    in_features: int
    out_features: int
    symmetric: bool
    """Every zero is the middle code."""
    act_order: bool
    """The groups do not lie one after another: ``g_idx`` counts."""
    zero_offset: int
    """What the stored zeros lack: 1 in v1, 0 in v2."""
    dtype: torch.dtype
    """Of the input and the output."""
    device_type: str

    def __post_init__(self) -> None:
        if self.bits not in SUPPORTED_BITS:
            raise ConfigError(f"A kernel was asked for bits={self.bits}; allowed: {SUPPORTED_BITS}")
        if min(self.in_features, self.out_features) < 1:
            raise ConfigError(
                f"A kernel was asked for a {self.in_features} -> {self.out_features} linear; "
                "both must be 1 or more."
            )
        if not 1 <= self.group_size <= self.in_features:
            raise ConfigError(
                f"A kernel was asked for group_size={self.group_size} on {self.in_features} inputs;"
                f" allowed are 1..{self.in_features}."
            )
        if self.zero_offset not in (0, 1):
            raise ConfigError(f"A kernel was asked for zero_offset={self.zero_offset}; 0 or 1.")
        if not self.dtype.is_floating_point:
            raise ConfigError(f"A kernel was asked for {self.dtype}; a floating dtype is needed.")

    @property
    def num_groups(self) -> int:
        """Rows of ``scales``."""
        return -(-self.in_features // self.group_size)

    @property
    def is_ragged(self) -> bool:
        """Whether the last group is shorter than the others."""
        return self.in_features % self.group_size != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Operands:
    """The tensors of one quantized linear; only the weight's layout differs between kernels."""

    weight: tuple[Tensor, ...]
    """(qweight,) as stored, or what the kernel's ``prepare`` made of it."""
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    """None where the groups lie one after another."""


class Kernel(Protocol):
    """One way to compute ``x @ dequantize(weight).T``."""

    @property
    def name(self) -> str:
        """Its name in the registry and in ``HALFBYTE_KERNEL``."""

    @property
    def repacks(self) -> bool:
        """Whether ``prepare`` makes another layout, so that the stored ``qweight`` is dropped."""

    def find_obstacle(self) -> str | None:
        """Say why this machine or this torch cannot run the kernel; None where it can."""

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Say why the kernel cannot run such a layer; None where it can."""

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Turn the stored weight into what ``apply`` reads; the other operands stay beside it."""

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Undo ``prepare``: give back ``qweight`` as stored, bit for bit."""

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Compute [..., in] -> [..., out] in ``spec.dtype``; no gradient is recorded."""

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Give the weight [out, in] as numbers; each is exact but for one rounding to ``dtype``."""

    def error_bound(self, spec: LinearSpec) -> float:
        """Bound ``|apply - exact|`` as a multiple of ``|x| @ |W|.T + |bias|``, elementwise."""


@runtime_checkable
class DividesByRows(Protocol):
    """A kernel that multiplies few rows of x in another way than many."""

    def describe_division(self, spec: LinearSpec) -> str:
        """Say up to how many rows what runs; for ``halfbyte doctor``."""


@runtime_checkable
class GradientKernel(Protocol):
    """A kernel that can also take the gradient back to the input, a tile of weights at a time.

    For any other, the whole weight is dequantized for as long as its one product takes.
    """

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Compute ``gradient @ dequantize(W)``: [..., out] -> [..., in] in the gradient's dtype."""
