"""Reorder packed codes between the bit orders of the formats.

::

    words along ``in``, a row per output  <-> transpose     <-> a row per word      (GPTQ)
    words along ``in``, a row per word    <-> to_awq        <-> words along ``out`` (AWQ)
    words along ``in``, a row per output  <-> to_blocks     <-> blocks of 32        (GGUF)
    words along ``in``, a row per output   -> expand         -> floats

Each function has an implementation in torch; the compiled library (``csrc/respell.cpp``) computes
the same bits several times faster, and is used if it is available.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from halfbyte.kernels.native_library import DTYPES, Blocks, Codes, open_library
from halfbyte.packing import row_tiles, unpack_rows

BLOCK = 32
"""Number of codes in a GGUF block."""

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AWQ's order: nibble i of a word belongs to the ORDER[i]-th of eight outputs."""
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)

TILE_WORDS = 2**14
"""Number of words transposed at a time: with two temporaries they fit a core's private cache."""

_LOW = 0x0F0F0F0F0F0F0F0F
_HIGH = -0x0F0F0F0F0F0F0F10  # 0xF0F0... as a signed integer


def transpose(words: Tensor) -> Tensor:
    """Transpose a matrix of words.

    Args:
        words: int32 [rows, columns], of any strides.

    Returns:
        int32 [columns, rows], contiguous; a view of ``words`` if possible.
    """
    if words.t().is_contiguous():
        return words.t()
    native = open_library().functions
    if native is None:
        return words.t().contiguous()
    words = words.contiguous()
    transposed = torch.empty(words.t().shape, dtype=torch.int32)
    native.hb_transpose(words.data_ptr(), *words.shape, transposed.data_ptr())
    return transposed


def to_awq(words: Tensor) -> Tensor:
    """Repack words along ``in`` as words along ``out``, in AWQ's order.

    Args:
        words: int32 [in / 8, out], contiguous; ``out`` is a multiple of 8.

    Returns:
        int32 [in, out / 8].
    """
    native = open_library().functions
    depth, out = words.shape
    if native is not None:
        repacked = torch.empty((8 * depth, out // 8), dtype=torch.int32)
        native.hb_to_awq(words.data_ptr(), depth, out, repacked.data_ptr())
        return repacked
    squares = torch.empty((depth, 8, out // 8), dtype=torch.int32)
    for part in row_tiles(words.shape, TILE_WORDS):
        square = words[part].view(-1, out // 8, 8).permute(2, 0, 1)
        squares[part] = transpose_nibbles(square[ORDER, :]).transpose(0, 1)
    return squares.view(-1, out // 8)


def from_awq(words: Tensor) -> Tensor:
    """Invert :func:`to_awq`: int32 [in, out / 8], contiguous, to [in / 8, out]."""
    native = open_library().functions
    depth, out = words.shape[0] // 8, words.shape[1] * 8
    if native is not None:
        repacked = torch.empty((depth, out), dtype=torch.int32)
        native.hb_from_awq(words.data_ptr(), depth, out, repacked.data_ptr())
        return repacked
    blocks = words.view(depth, 8, out // 8)
    columns = torch.empty((depth, out // 8, 8), dtype=torch.int32)
    for part in row_tiles((depth, out), TILE_WORDS):
        squares = transpose_nibbles(blocks[part].transpose(0, 1).contiguous())
        columns[part] = squares[INVERSE, :].permute(1, 2, 0)
    return columns.view(depth, out)


def transpose_nibbles(words: Tensor) -> Tensor:
    """Transpose 8 x 8 squares of nibbles in place: swap nibble i of word k with nibble k of word i.

    Args:
        words: int32 [8, ...], contiguous.

    Returns:
        The same memory.

    Source:
        Warren, Hacker's Delight, 2nd ed., section 7-3: swap halves, then quarters, then eighths.
    """
    for half, shift, mask in ((4, 16, 0x0000FFFF), (2, 8, 0x00FF00FF), (1, 4, 0x0F0F0F0F)):
        pairs = words.view(4 // half, 2, half, *words.shape[1:])
        first, second = pairs[:, 0], pairs[:, 1]
        change = ((first >> shift) ^ second) & mask
        second ^= change
        first ^= change << shift
    return words


def to_blocks(words: Tensor, grid: Tensor, bits: int) -> Tensor:
    """Repack codes as GGUF blocks of 32, each preceded by the grid of its group.

    Args:
        words: int32 [out, in * bits / 32], contiguous.
        grid: uint8 [out, groups, bytes]: header of every block of a group; groups have equal
            sizes, a multiple of 32.
        bits: 4: byte j contains codes j and j + 16; 8: int8, code - 128.

    Returns:
        uint8 [out, blocks, bytes per block].
    """
    native = open_library().functions
    out, groups, head = grid.shape
    blocks = words.shape[1] * 32 // bits // BLOCK
    packed_blocks = torch.empty((out, blocks, head + 4 * bits), dtype=torch.uint8)
    if native is not None:
        sizes = Blocks(out * blocks, blocks // groups, head, bits)
        pointers = (words.data_ptr(), grid.contiguous().data_ptr(), packed_blocks.data_ptr())
        native.hb_to_blocks(ctypes.byref(sizes), *pointers)
        return packed_blocks
    packed_blocks[..., :head] = grid.repeat_interleave(blocks // groups, dim=1)
    for rows in row_tiles((out, blocks * BLOCK)):
        packed = words[rows].view(-1).view(torch.uint8)
        codes = packed ^ 128 if bits == 8 else _join_halves(packed.view(-1, BLOCK // 2))
        packed_blocks[rows, :, head:] = codes.view(-1, blocks, 4 * bits)
    return packed_blocks


def from_blocks(blocks: Tensor, head: int, bits: int) -> Tensor:
    """Invert :func:`to_blocks`, without the grids.

    Args:
        blocks: uint8 [out, blocks, bytes per block], contiguous.
        head: Size of the grid before each block's codes. Unit: bytes.
        bits: 4 or 8.

    Returns:
        int32 [out, in * bits / 32].
    """
    native = open_library().functions
    out, number, _ = blocks.shape
    if native is not None:
        words = torch.empty((out, number * bits), dtype=torch.int32)
        sizes = Blocks(out * number, 1, head, bits)
        native.hb_from_blocks(ctypes.byref(sizes), blocks.data_ptr(), words.data_ptr())
        return words
    codes = blocks[..., head:].contiguous()
    packed = codes ^ 128 if bits == 8 else _split_halves(codes)
    return packed.reshape(out, -1).contiguous().view(torch.int32)


def expand(
    words: Tensor, scales: Tensor, zeros: Tensor, *, bits: int, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Dequantize packed codes; each weight is rounded once.

    Args:
        words: int32 [out, in * bits / 32], contiguous.
        scales: Float [out, groups].
        zeros: int16 [out, groups].
        bits: 2 to 8.
        group_size: Groups are contiguous; the last may be smaller.
        dtype: float32, float16 or bfloat16.

    Returns:
        [out, in] of ``dtype``.
    """
    native = open_library().functions
    out, columns = words.shape[0], words.shape[1] * 32 // bits
    assert words.is_contiguous()
    assert zeros.dtype == torch.int16
    if native is not None:
        scales, zeros = scales.contiguous(), zeros.contiguous()
        weight = torch.empty((out, columns), dtype=dtype)
        pointers = (words.data_ptr(), scales.data_ptr(), zeros.data_ptr())
        sizes = (out, columns, scales.shape[1], group_size)
        codes = Codes(*pointers, *sizes, bits, DTYPES[scales.dtype])
        native.hb_expand(ctypes.byref(codes), DTYPES[dtype], weight.data_ptr())
        return weight
    weight = unpack_rows(words, bits).to(torch.float32)
    if columns % group_size == 0:
        grouped = weight.view(*scales.shape, group_size)
        grouped.sub_(zeros.float()[..., None]).mul_(scales.float()[..., None])
    else:
        groups = torch.arange(columns) // group_size
        weight.sub_(zeros.float()[:, groups]).mul_(scales.float()[:, groups])
    return weight.to(dtype)


def _join_halves(packed: Tensor) -> Tensor:
    """Repack bytes of codes (2k, 2k + 1) as bytes of codes (j, j + 16), uint8 [blocks, 16]."""
    lanes = packed.view(torch.int64)  # eight bytes at a time: [blocks, 2]
    low, high = lanes[:, 0], lanes[:, 1]
    even = (low & _LOW) | ((high & _LOW) << 4)
    odd = ((low >> 4) & _LOW) | (high & _HIGH)
    # Interleaved as 16-bit integers, because writing single bytes would be strided.
    wide = odd.view(torch.uint8).to(torch.int16) << 8
    wide |= even.view(torch.uint8)
    return wide.view(torch.uint8)


def _split_halves(paired: Tensor) -> Tensor:
    """Invert :func:`_join_halves`."""
    parts = paired.view(*paired.shape[:-1], 8, 2)
    even = parts[..., 0].contiguous().view(torch.int64)
    odd = parts[..., 1].contiguous().view(torch.int64)
    low = (even & _LOW) | ((odd & _LOW) << 4)
    high = ((even >> 4) & _LOW) | (odd & _HIGH)
    return torch.cat([low, high], dim=-1).view(torch.uint8)
