"""One linear as whole numbers and a grid: what every format here is a spelling of.

::

    weight[o, i] = scales[o, g(i)] * (code[o, i] - zeros[o, g(i)])
                 = scales[o, g(i)] * code[o, i] + minima[o, g(i)]   where no whole zero gives these

The codes stay packed as they are most often needed: a row of words per output, codes along ``in``,
lowest bits first. That is a GPTQ ``qweight`` turned over, and MLX's and compressed-tensors' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from halfbyte.checkpoint.consumers import can_recenter
from halfbyte.checkpoint.write import TensorSpec, spec_of
from halfbyte.convert.bit_order import expand, transpose
from halfbyte.packing import pack_rows, unpack_rows

FREE_MINIMA = "minima that are no whole multiples of its scales, so that it has no zero points"
"""Why a format with zero points cannot hold a linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSpec:
    """What must be known of a linear to tell who can hold it, without its codes."""

    bits: int
    in_features: int
    out_features: int
    group_size: int
    """Nominal: the last group is shorter where this does not divide ``in_features``."""
    num_groups: int
    zero_low: int
    zero_high: int
    is_ordered: bool
    """Whether the groups lie one after another along ``in``."""
    scales_fit_half: bool
    """Whether fp16 holds every scale exactly."""
    minima_fit_half: bool
    """Whether fp16 holds every minimum exactly: what a code of 0 stands for."""
    bias: TensorSpec | None
    has_free_minima: bool = False
    """Whether its minima are no products of zero and scale; its zeros are all 0 then."""

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero is the middle code."""
        middle = 1 << (self.bits - 1)
        return self.zero_low == middle and self.zero_high == middle

    @property
    def even_group(self) -> int:
        """The largest size of equal groups that none of these groups straddles."""
        if self.num_groups == 1:
            return self.in_features
        return math.gcd(self.group_size, self.in_features)

    def can_recenter(self, bits: int) -> bool:
        """Whether all of (code - zero) lies within what ``bits`` bits hold around their middle."""
        zeros = {"zero_low": self.zero_low, "zero_high": self.zero_high}
        return not self.has_free_minima and can_recenter(self.bits, bits, **zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLinear:
    """One linear: packed codes, scales, zeros and maybe a bias, in memory of its own."""

    words: Tensor
    """int32 [out, in * bits / 32], a little-endian stream of codes along ``in``; of any strides, so
    that what GPTQ stores the other way need not be turned for those that store it so too."""
    scales: Tensor
    """Float [out, groups], as stored."""
    zeros: Tensor
    """int16 [out, groups], each 0..2**bits-1."""
    bits: int
    group_size: int
    g_idx: Tensor | None
    """int32 [in]: the group of each input; None where the groups lie one after another."""
    bias: Tensor | None
    free_minima: Tensor | None = None
    """Float [out, groups], as stored: what a code of 0 stands for; None where the zeros say that.
    With these the zeros are all 0 and the groups in order."""

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.words.shape[1] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.words.shape[0]

    def words_in_rows(self) -> Tensor:
        """Give the words as they are, contiguous."""
        return self.words if self.words.is_contiguous() else transpose(self.words.t())

    def words_in_columns(self) -> Tensor:
        """Give the words turned over, int32 [in * bits / 32, out], contiguous."""
        return transpose(self.words)

    def codes(self) -> Tensor:
        """Unpack the codes, uint8 [out, in]."""
        return unpack_rows(self.words_in_rows(), self.bits)

    def groups(self) -> Tensor:
        """Give the group of each input, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the weight that the codes stand for; in float32 it is exact for fp16 scales.

        Args:
            dtype: float32, float16 or bfloat16; each weight is rounded to it once.

        Returns:
            [out, in].
        """
        if self.free_minima is not None:
            weight = replace(self, free_minima=None).dequantize()
            return weight.add_(self.minima()[:, self.groups()]).to(dtype)
        if self.g_idx is None:
            return expand(
                self.words_in_rows(),
                self.scales,
                self.zeros,
                bits=self.bits,
                group_size=self.group_size,
                dtype=dtype,
            )
        groups = self.groups()
        weight = self.codes().to(torch.float32)
        weight.sub_(self.zeros.float()[:, groups]).mul_(self.scales.float()[:, groups])
        return weight.to(dtype)

    def minima(self) -> Tensor:
        """Give what a code of 0 stands for, float32 [out, groups]."""
        if self.free_minima is not None:
            return self.free_minima.float()
        return -(self.zeros.float() * self.scales.float())

    def describe(self) -> CodedSpec:
        """Give the facts that decide who can hold it."""
        spec = describe_grid(
            self.scales,
            self.zeros,
            bits=self.bits,
            in_features=self.in_features,
            group_size=self.group_size,
            is_ordered=self.g_idx is None,
            bias=None if self.bias is None else spec_of(self.bias),
        )
        if self.free_minima is None:
            return spec
        return replace(spec, has_free_minima=True, minima_fit_half=fits_half(self.free_minima))

    def select_groups(self, groups: Tensor, size: int) -> CodedLinear:
        """Give the linear the grid of those groups, each of another size; in order only."""
        free = self.free_minima
        return replace(
            self,
            scales=self.scales[:, groups],
            zeros=self.zeros[:, groups],
            free_minima=None if free is None else free[:, groups],
            group_size=size,
        )

    def split_groups(self, size: int) -> CodedLinear:
        """Repeat scales and zeros over smaller groups; the weight stays the same.

        Args:
            size: Divides ``in_features`` and straddles no group: a divisor of
                :attr:`CodedSpec.even_group`.

        Returns:
            The linear with groups of that size.
        """
        assert self.g_idx is None
        if size == self.group_size and self.in_features % size == 0:
            return self
        return self.select_groups(torch.arange(0, self.in_features, size) // self.group_size, size)

    def widen(self, bits: int) -> CodedLinear:
        """Store the same codes and zeros in more bits; the weight stays the same."""
        if bits == self.bits:
            return self
        return replace(self, words=pack_rows(self.codes(), bits), bits=bits)

    def recenter(self, bits: int) -> CodedLinear:
        """Move every code by its group's zero, so that the zero is the middle of ``bits`` bits.

        Args:
            bits: Wide enough: see :meth:`CodedSpec.can_recenter`.

        Returns:
            The same weight with symmetric zeros.
        """
        middle = 2 ** (bits - 1)
        if bits == self.bits and bool((self.zeros == middle).all()):
            return self
        moves = (middle - self.zeros)[:, self.groups()]
        codes = (self.codes().to(torch.int16) + moves).to(torch.uint8)
        zeros = torch.full_like(self.zeros, middle)
        return replace(self, words=pack_rows(codes, bits), zeros=zeros, bits=bits)

    def take_rows(self, order: Tensor) -> CodedLinear:
        """Put the outputs into another order: new row ``r`` is old row ``order[r]``."""
        return replace(
            self,
            words=self.words[order],
            scales=self.scales[order],
            zeros=self.zeros[order],
            free_minima=None if self.free_minima is None else self.free_minima[order],
            bias=None if self.bias is None else self.bias[order],
        )

    def take_columns(self, order: Tensor) -> CodedLinear:
        """Put the inputs into an order in which the groups lie one after another.

        Args:
            order: New column ``c`` is old column ``order[c]``.

        Returns:
            The linear without ``g_idx``. The groups themselves may change places.
        """
        groups = self.groups()[order]
        labels = groups[:: self.group_size]
        assert torch.equal(labels.repeat_interleave(self.group_size)[: len(order)], groups)
        return replace(
            self,
            words=pack_rows(self.codes()[:, order], self.bits),
            scales=self.scales[:, labels],
            zeros=self.zeros[:, labels],
            g_idx=None,
        )


def describe_grid(
    scales: Tensor,
    zeros: Tensor,
    *,
    bits: int,
    in_features: int,
    group_size: int,
    is_ordered: bool,
    bias: TensorSpec | None,
) -> CodedSpec:
    """Work out the facts of a linear from its grid.

    Args:
        scales: Float [out, groups].
        zeros: Integers [out, groups], or [1, 1] where all are the same.
        bits: Width of a code.
        in_features: Width of the input.
        group_size: Nominal.
        is_ordered: Whether the groups lie one after another.
        bias: Of its bias, where it has one.

    Returns:
        The facts.
    """
    return CodedSpec(
        bits=bits,
        in_features=in_features,
        out_features=scales.shape[0],
        group_size=group_size,
        num_groups=scales.shape[1],
        zero_low=int(zeros.min()),
        zero_high=int(zeros.max()),
        is_ordered=is_ordered,
        scales_fit_half=fits_half(scales),
        minima_fit_half=fits_half(scales.float() * zeros.float()),
        bias=bias,
    )


def fits_half(values: Tensor) -> bool:
    """Tell whether fp16 holds every value exactly."""
    if values.dtype == torch.float16:
        return True
    return torch.equal(values.to(torch.float16).to(values.dtype), values)
