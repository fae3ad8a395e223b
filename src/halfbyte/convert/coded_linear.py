"""A quantized linear as codes and a grid, independent of the format.

::

    weight[o, i] = scales[o, g(i)] * (code[o, i] - zeros[o, g(i)])
                 = scales[o, g(i)] * code[o, i] + minima[o, g(i)]   if no integer zero gives these

The codes stay packed in the most common order: a row of words per output, codes along ``in``,
lowest bits first. This is the order of MLX and compressed-tensors, and the transpose of a GPTQ
``qweight``.
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

FREE_MINIMA = "minima that are not integer multiples of its scales, so that it has no zero points"
"""Why a format with zero points cannot represent a linear."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedSpec:
    """The properties of a linear, without its codes, that decide which formats can represent it."""

    bits: int
    in_features: int
    out_features: int
    group_size: int
    """Nominal: the last group is smaller if this does not divide ``in_features``."""
    num_groups: int
    zero_low: int
    zero_high: int
    is_ordered: bool
    """Whether the groups are contiguous and in order along ``in``."""
    scales_fit_half: bool
    """Whether fp16 represents every scale exactly."""
    minima_fit_half: bool
    """Whether fp16 represents every minimum, the value of code 0, exactly."""
    bias: TensorSpec | None
    has_free_minima: bool = False
    """Whether the minima are stored, not derived from zeros; then all zeros are 0."""

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero is the middle code."""
        middle = 1 << (self.bits - 1)
        return self.zero_low == middle and self.zero_high == middle

    @property
    def even_group(self) -> int:
        """The largest size of equal groups into which these groups can be split."""
        if self.num_groups == 1:
            return self.in_features
        return math.gcd(self.group_size, self.in_features)

    def can_recenter(self, bits: int) -> bool:
        """Return whether every (code - zero) is in the signed range of ``bits`` bits."""
        zeros = {"zero_low": self.zero_low, "zero_high": self.zero_high}
        return not self.has_free_minima and can_recenter(self.bits, bits, **zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class CodedLinear:
    """One quantized linear in memory: packed codes, scales, zeros and maybe a bias."""

    words: Tensor
    """int32 [out, in * bits / 32], a little-endian stream of codes along ``in``. It may have any
    strides, which avoids transposing twice between formats with the transposed layout."""
    scales: Tensor
    """Float [out, groups], as stored."""
    zeros: Tensor
    """int16 [out, groups], each 0..2**bits-1."""
    bits: int
    group_size: int
    g_idx: Tensor | None
    """int32 [in]: the group of each input; None if the groups are contiguous and in order."""
    bias: Tensor | None
    free_minima: Tensor | None = None
    """Float [out, groups], as stored: the value of code 0; None if it follows from the zeros.
    Otherwise, all zeros are 0 and the groups are in order."""

    @property
    def in_features(self) -> int:
        """Number of inputs."""
        return self.words.shape[1] * 32 // self.bits

    @property
    def out_features(self) -> int:
        """Number of outputs."""
        return self.words.shape[0]

    def words_in_rows(self) -> Tensor:
        """Return the words as int32 [out, in * bits / 32], contiguous."""
        return self.words if self.words.is_contiguous() else transpose(self.words.t())

    def words_in_columns(self) -> Tensor:
        """Return the words as int32 [in * bits / 32, out], contiguous."""
        return transpose(self.words)

    def codes(self) -> Tensor:
        """Unpack the codes, uint8 [out, in]."""
        return unpack_rows(self.words_in_rows(), self.bits)

    def groups(self) -> Tensor:
        """Return the group of each input, int64 [in]."""
        if self.g_idx is not None:
            return self.g_idx.long()
        return torch.arange(self.in_features) // self.group_size

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Dequantize the weight; in float32 it is exact for fp16 scales.

        Args:
            dtype: float32, float16 or bfloat16; each weight is rounded once.

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
        """Return the value of code 0, float32 [out, groups]."""
        if self.free_minima is not None:
            return self.free_minima.float()
        return -(self.zeros.float() * self.scales.float())

    def describe(self) -> CodedSpec:
        """Return the properties that decide which formats can represent it."""
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
        """Replace the groups by ``groups`` of these, each of a new size; needs groups in order."""
        free = self.free_minima
        return replace(
            self,
            scales=self.scales[:, groups],
            zeros=self.zeros[:, groups],
            free_minima=None if free is None else free[:, groups],
            group_size=size,
        )

    def split_groups(self, size: int) -> CodedLinear:
        """Split groups into smaller ones with the same scales and zeros.

        Args:
            size: A divisor of :attr:`CodedSpec.even_group`.

        Returns:
            The same weight with groups of that size.
        """
        assert self.g_idx is None
        if size == self.group_size and self.in_features % size == 0:
            return self
        return self.select_groups(torch.arange(0, self.in_features, size) // self.group_size, size)

    def widen(self, bits: int) -> CodedLinear:
        """Store the same codes and zeros in more bits."""
        if bits == self.bits:
            return self
        return replace(self, words=pack_rows(self.codes(), bits), bits=bits)

    def recenter(self, bits: int) -> CodedLinear:
        """Shift codes and zeros so that every zero is the middle code of ``bits`` bits.

        Args:
            bits: A sufficient width: see :meth:`CodedSpec.can_recenter`.

        Returns:
            The same weight with symmetric zeros.
        """
        middle = 2 ** (bits - 1)
        if bits == self.bits and bool((self.zeros == middle).all()):
            return self
        shifts = (middle - self.zeros)[:, self.groups()]
        codes = (self.codes().to(torch.int16) + shifts).to(torch.uint8)
        zeros = torch.full_like(self.zeros, middle)
        return replace(self, words=pack_rows(codes, bits), zeros=zeros, bits=bits)

    def take_rows(self, order: Tensor) -> CodedLinear:
        """Select or reorder outputs: new row ``r`` is old row ``order[r]``."""
        return replace(
            self,
            words=self.words[order],
            scales=self.scales[order],
            zeros=self.zeros[order],
            free_minima=None if self.free_minima is None else self.free_minima[order],
            bias=None if self.bias is None else self.bias[order],
        )

    def take_columns(self, order: Tensor) -> CodedLinear:
        """Reorder the inputs so that the groups are contiguous.

        Args:
            order: New column ``c`` is old column ``order[c]``.

        Returns:
            The linear without ``g_idx``. The order of the groups may change too.
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
    """Compute the properties of a linear from its grid.

    Args:
        scales: Float [out, groups].
        zeros: Integers [out, groups], or [1, 1] if all are the same.
        bits: Width of a code.
        in_features: Number of inputs.
        group_size: Nominal.
        is_ordered: Whether the groups are contiguous and in order.
        bias: Type and shape of the bias; None if there is none.

    Returns:
        The properties.
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
    """Return whether fp16 represents every value exactly."""
    if values.dtype == torch.float16:
        return True
    return torch.equal(values.to(torch.float16).to(values.dtype), values)
