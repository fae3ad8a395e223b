"""The reference kernel, which defines correct results: dequantize in plain torch and multiply.

Layout: as stored, without repacking. Arithmetic: code - zero is exact; its product with the
scale is formed in fp32 (exact for fp16 and bf16 scales), then rounded once to the dtype of x; the
matrix product is torch's. Error: that one rounding and the error of the matrix product. Runs on
every device and supports every bit width, group size, group order and dtype.

Source:
    The GPTQ format: :mod:`halfbyte.checkpoint.layout`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.packing import unpack_codes, unpack_zeros

TILE_WEIGHTS, DEVICE_TILE_WEIGHTS = 2**20, 2**24
"""Weights dequantized at a time, so that a layer is never fully dense: on a CPU; elsewhere.

On a CPU a quarter of it is up to 2x slower, four times as much 20% slower (AMD EPYC, 1 thread).
"""

MAX_STEP = 1024
"""Tiles of input columns start at group boundaries, unless that makes them wider than this."""

TILE_COLUMNS = 32
"""Tiles start at multiples of this, where a word starts at every bit width."""


def dequantize_weight(
    qweight: Tensor,
    qzeros: Tensor,
    scales: Tensor,
    g_idx: Tensor | None,
    *,
    bits: int,
    zero_offset: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dequantize a weight as stored.

    Args:
        qweight: int32 [in * bits / 32, out].
        qzeros: int32 [groups, out * bits / 32].
        scales: Float [groups, out].
        g_idx: Group of each input column, [in]; None: contiguous groups of ``group_size``.
        bits: 2, 3, 4 or 8.
        zero_offset: What was subtracted from the zeros before storing: 1 in v1, 0 in v2.
        group_size: Used if ``g_idx`` is None.
        dtype: Dtype of the result; each weight is rounded to it once.

    Returns:
        The weight [out, in]; not contiguous.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_codes(qweight, bits)
    # Contiguous: otherwise the subtraction below takes ten times as long.
    zeros = unpack_zeros(qzeros, bits, zero_offset).t().to(wide).contiguous()
    scales = scales.to(wide)
    in_features, out_features = codes.shape
    if g_idx is None and in_features % group_size == 0:
        grouped = codes.view(-1, group_size, out_features).to(wide)
        weight = grouped.sub_(zeros[:, None]).mul_(scales[:, None]).view(in_features, out_features)
    else:
        if g_idx is None:
            g_idx = torch.arange(in_features, device=codes.device) // group_size
        rows = g_idx.long()
        weight = codes.to(wide).sub_(zeros[rows]).mul_(scales[rows])
    return weight.to(dtype).t()


class TorchReference:
    """Dequantizes one tile of output channels at a time and multiplies by it."""

    name = "torch_reference"
    repacks = False

    def find_obstacle(self) -> str | None:
        """Return None: the kernel runs wherever torch does."""
        return None

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return None: the kernel runs every layer."""
        return None

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Return the stored weight."""
        return stored.weight

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Return the stored weight."""
        return operands.weight[0]

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply by the dequantized weight, tile by tile."""
        width = max(_tile_weights(spec) // spec.in_features // TILE_COLUMNS, 1) * TILE_COLUMNS
        if spec.out_features <= width:
            return functional.linear(x, self.dequantize(operands, spec, x.dtype), bias)
        result = x.new_empty(*x.shape[:-1], spec.out_features)
        for start in range(0, spec.out_features, width):
            stop = min(start + width, spec.out_features)
            weight = self.dequantize(
                _slice_columns(operands, spec.bits, start, stop), spec, x.dtype
            )
            part = None if bias is None else bias[start:stop]
            result[..., start:stop] = functional.linear(x, weight, part)
        return result

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Multiply by the dequantized weight, one tile of input columns at a time."""
        # Tiles of columns, not rows: each entry is then a single sum, rounded once.
        step = math.lcm(TILE_COLUMNS, spec.group_size)
        if operands.g_idx is not None or step > MAX_STEP:
            step = TILE_COLUMNS
        width = max(_tile_weights(spec) // spec.out_features // step, 1) * step
        if spec.in_features <= width:
            return gradient @ self.dequantize(operands, spec, gradient.dtype)
        result = gradient.new_empty(*gradient.shape[:-1], spec.in_features)
        for start in range(0, spec.in_features, width):
            stop = min(start + width, spec.in_features)
            tile = _slice_inputs(operands, spec, start, stop)
            result[..., start:stop] = gradient @ self.dequantize(tile, spec, gradient.dtype)
        return result

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight [out, in]."""
        return dequantize_weight(
            operands.weight[0],
            operands.qzeros,
            operands.scales,
            operands.g_idx,
            bits=spec.bits,
            zero_offset=spec.zero_offset,
            group_size=spec.group_size,
            dtype=dtype,
        )

    def error_bound(self, spec: LinearSpec) -> float:
        """One rounding of each weight, one of the result, and fp32 sums in any order."""
        unit = torch.finfo(spec.dtype).eps / 2
        sums = torch.finfo(torch.float32).eps * spec.in_features
        return 3 * unit + sums


def _tile_weights(spec: LinearSpec) -> int:
    return TILE_WEIGHTS if spec.device_type == "cpu" else DEVICE_TILE_WEIGHTS


def _slice_columns(operands: Operands, bits: int, start: int, stop: int) -> Operands:
    """Slice output channels start..stop; both are multiples of TILE_COLUMNS, or the end."""
    words = slice(start * bits // 32, -(-stop * bits // 32))
    return Operands(
        weight=(operands.weight[0][:, start:stop],),
        qzeros=operands.qzeros[:, words],
        scales=operands.scales[:, start:stop],
        g_idx=operands.g_idx,
    )


def _slice_inputs(operands: Operands, spec: LinearSpec, start: int, stop: int) -> Operands:
    """Slice input columns start..stop; both are multiples of TILE_COLUMNS, or the end."""
    words = slice(start * spec.bits // 32, stop * spec.bits // 32)
    g_idx = operands.g_idx
    if g_idx is None and start % spec.group_size == 0:
        groups = slice(start // spec.group_size, -(-stop // spec.group_size))
        return Operands(
            weight=(operands.weight[0][words],),
            qzeros=operands.qzeros[groups],
            scales=operands.scales[groups],
            g_idx=None,
        )
    if g_idx is None:
        g_idx = torch.arange(spec.in_features, device=operands.scales.device) // spec.group_size
    return Operands(
        weight=(operands.weight[0][words],),
        qzeros=operands.qzeros,
        scales=operands.scales,
        g_idx=g_idx[start:stop],
    )
