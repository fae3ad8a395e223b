"""The weight layout on GPUs: codes arranged as tensor core operand fragments.

A tile is 16 output channels by 64 inputs, 32 * bits words, tiles [in / 64, out / 16]. Lane ``4 g +
t`` of a warp owns the codes of channels ``g + 8 h`` and inputs ``16 s + 8 u + 2 t + p`` (h, u, p in
0..1, s in 0..3): those of the A operand of four ``mma.m16n8k16``, the same as of the register
operand of ``wgmma``. The codes of inputs p = 0 and p = 1 lie 16 bits apart, so that one shift and
one mask give the pair that a 32-bit register holds.

::

    4 bits   [tile][lane][s / 2, h]            word; code at 4 (2 (s % 2) + u) + 16 p
    8 bits   [tile][s / 2][lane][s % 2, h]     word; code at 8 u + 16 p
    2 bits   [tile][lane][h]                   word; code at 2 (2 s + u) + 16 p
    3 bits   [tile] of two planes: the low 2 bits as above, then [lane] with the high bit at
             8 h + 2 s + u + 16 p

A warp reads a 4-bit tile as 512 contiguous bytes, 16 bytes per lane. If groups are not contiguous
(act-order), the inputs are sorted by group first, and the activations are gathered to match.

Source:
    NVIDIA PTX ISA, "Matrix fragments for mma.m16n8k16" (A operand).
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.packing import pack_codes, unpack_codes, unpack_zeros

TILE_OUT = 16
TILE_IN = 64
PAIRS = 8
"""Pairs of codes per lane of one channel of a tile."""


def pack_fragments(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into fragments.

    Args:
        codes: uint8 [in, out]; in a multiple of 64, out of 16.
        bits: 2, 3, 4 or 8.

    Returns:
        int32 [in / 64, out / 16, 32 * bits].
    """
    if bits == 3:
        planes = (pack_fragments(codes & 3, 2), _pack_plane(codes >> 2))
        return torch.cat(planes, dim=-1)
    pairs = _split(codes)
    per_word = 16 // bits
    words = pairs.new_zeros(*pairs.shape[:2], PAIRS // per_word, *pairs.shape[3:-1])
    for index in range(PAIRS):
        word, place = divmod(index, per_word)
        low, high = pairs[:, :, index].unbind(-1)
        words[:, :, word] |= (low << bits * place) | (high << bits * place + 16)
    # [tile in, tile out, word, h, g, t] -> the words of a lane in runs of at most four.
    count = words.shape[2]
    run = min(count, 2)
    lanes = words.reshape(*words.shape[:2], count // run, run, *words.shape[3:])
    return lanes.permute(0, 1, 2, 5, 6, 3, 4).reshape(*words.shape[:2], 32 * bits)


def unpack_fragments(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`pack_fragments`.

    Args:
        words: int32 [in / 64, out / 16, 32 * bits].
        bits: 2, 3, 4 or 8.

    Returns:
        uint8 codes [in, out].
    """
    if bits == 3:
        low = unpack_fragments(words[..., :64], 2)
        return low | (_unpack_plane(words[..., 64:]) << 2)
    per_word = 16 // bits
    count = PAIRS // per_word
    run = min(count, 2)
    lanes = words.reshape(*words.shape[:2], count // run, 8, 4, run, 2)
    ordered = lanes.permute(0, 1, 2, 5, 6, 3, 4).flatten(2, 3)
    pairs = words.new_empty(*words.shape[:2], PAIRS, 2, 8, 4, 2, dtype=torch.uint8)
    for index in range(PAIRS):
        word, place = divmod(index, per_word)
        for p in range(2):
            shifted = ordered[:, :, word] >> (bits * place + 16 * p)
            pairs[:, :, index, ..., p] = shifted & (2**bits - 1)
    return _join(pairs)


def _split(codes: Tensor) -> Tensor:
    """Reorder codes [in, out] to int32 [tile in, tile out, s u, h, g, t, p]."""
    in_features, out_features = codes.shape
    parts = codes.reshape(in_features // TILE_IN, PAIRS, 4, 2, out_features // TILE_OUT, 2, 8)
    return parts.permute(0, 4, 1, 5, 6, 2, 3).to(torch.int32)


def _join(pairs: Tensor) -> Tensor:
    """Undo :func:`_split`."""
    tiles_in, tiles_out = pairs.shape[:2]
    parts = pairs.permute(0, 2, 5, 6, 1, 3, 4)
    return parts.reshape(tiles_in * TILE_IN, tiles_out * TILE_OUT)


def _pack_plane(codes: Tensor) -> Tensor:
    pairs = _split(codes)
    words = pairs.new_zeros(*pairs.shape[:2], 8, 4)
    for index in range(PAIRS):
        for h in range(2):
            low, high = pairs[:, :, index, h].unbind(-1)
            words |= (low << 8 * h + index) | (high << 8 * h + index + 16)
    return words.flatten(2)


def _unpack_plane(words: Tensor) -> Tensor:
    lanes = words.reshape(*words.shape[:2], 8, 4)
    pairs = words.new_empty(*words.shape[:2], PAIRS, 2, 8, 4, 2, dtype=torch.uint8)
    for index in range(PAIRS):
        for h in range(2):
            for p in range(2):
                pairs[:, :, index, h, ..., p] = (lanes >> (8 * h + index + 16 * p)) & 1
    return _join(pairs)


def find_layout_mismatch(spec: LinearSpec) -> str | None:
    """Return why the layout does not support a layer; None if it does."""
    if spec.dtype not in (torch.float16, torch.bfloat16):
        return f"computes in float16 and bfloat16, not {str(spec.dtype).removeprefix('torch.')}"
    if spec.in_features % TILE_IN:
        return f"needs in_features a multiple of {TILE_IN}, not {spec.in_features}"
    if spec.out_features % TILE_OUT:
        return f"needs out_features a multiple of {TILE_OUT}, not {spec.out_features}"
    if spec.group_size != TILE_IN // 2 and spec.group_size % TILE_IN:
        return f"supports group_size 32 and multiples of {TILE_IN}, not {spec.group_size}"
    return None


def prepare_fragments(stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
    """Repack a layer into fragments.

    Args:
        stored: The tensors as stored.
        spec: A layer for which :func:`find_layout_mismatch` returns None.

    Returns:
        The words; for an asymmetric layer also uint8 zeros [groups, out]; for act-order also the
        sorted order of the inputs, int32 [in].
    """
    codes = unpack_codes(stored.weight[0], spec.bits)
    parts = []
    if not spec.symmetric:
        zeros = unpack_zeros(stored.qzeros, spec.bits, spec.zero_offset)
        parts.append(zeros.t().to(torch.uint8).contiguous())
    if stored.g_idx is not None:
        order = torch.argsort(stored.g_idx, stable=True)
        codes = codes[order]
        parts.append(order.to(torch.int32))
    return pack_fragments(codes, spec.bits), *parts


def restore_fragments(operands: Operands, spec: LinearSpec) -> Tensor:
    """Return ``qweight`` as stored, bit for bit."""
    codes = unpack_fragments(operands.weight[0], spec.bits)
    order = find_order(operands, spec)
    if order is not None:
        codes = codes[torch.argsort(order)]
    return pack_codes(codes, spec.bits)


def split_inputs(spec: LinearSpec, max_weights: int) -> list[tuple[int, int]]:
    """Split a repacked layer's inputs, in packed order, into slices of whole tiles.

    Args:
        spec: The layer.
        max_weights: Maximum weights per slice, unless a single tile has more.

    Returns:
        (start, stop) of each slice, which contains whole groups or is part of one.
    """
    max_width = max(max_weights // spec.out_features // TILE_IN, 1) * TILE_IN
    size = math.lcm(spec.group_size, TILE_IN)
    if size <= max_width:
        width = max_width // size * size
    else:
        width = max(w for w in range(TILE_IN, max_width + 1, TILE_IN) if size % w == 0)
    ends = [*range(width, spec.in_features, width), spec.in_features]
    return list(zip([0, *ends], ends, strict=False))


def slice_fragments(
    operands: Operands, spec: LinearSpec, start: int, stop: int
) -> tuple[Operands, LinearSpec]:
    """Return a slice of a repacked layer's inputs, in packed order, as a separate layer.

    Args:
        operands: Operands of the layer.
        spec: The layer.
        start: From :func:`split_inputs`.
        stop: From :func:`split_inputs`.

    Returns:
        Views of the operands, and the spec of the slice.
    """
    groups = slice(start // spec.group_size, -(-stop // spec.group_size))
    zeros = find_zeros(operands, spec)
    words = operands.weight[0][start // TILE_IN : stop // TILE_IN]
    part = Operands(
        weight=(words,) if zeros is None else (words, zeros[groups]),
        qzeros=operands.qzeros[groups],
        scales=operands.scales[groups],
        g_idx=None,
    )
    size = min(spec.group_size, stop - start)
    return part, replace(spec, in_features=stop - start, group_size=size, act_order=False)


def dequantize_in_torch(operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """Dequantize a repacked weight to [out, in] in plain torch, each value rounded once."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    codes = unpack_fragments(operands.weight[0], spec.bits).to(wide)
    groups = torch.arange(spec.in_features, device=codes.device) // spec.group_size
    zeros, order = find_zeros(operands, spec), find_order(operands, spec)
    codes.sub_(2 ** (spec.bits - 1) if zeros is None else zeros[groups].to(wide))
    weight = codes.mul_(operands.scales[groups].to(wide)).to(dtype)
    return (weight if order is None else weight[torch.argsort(order)]).t().contiguous()


def find_zeros(operands: Operands, spec: LinearSpec) -> Tensor | None:
    """Return the zeros of a repacked layer, uint8 [groups, out]; None if it is symmetric."""
    return None if spec.symmetric else operands.weight[1]


def find_order(operands: Operands, spec: LinearSpec) -> Tensor | None:
    """Return the packed order of the inputs, int32 [in]; None if it is the stored order."""
    return operands.weight[-1] if spec.act_order else None
