"""Encode and decode GGUF blocks: a scale, followed by the codes of 32 or 256 weights.

::

    Q4_0  fp16 d, 16 bytes         weight = d * (code - 8)     byte j: codes j and j + 16
    Q4_1  fp16 d, fp16 m, 16 bytes weight = d * code + m
    Q8_0  fp16 d, 32 int8          weight = d * value
    Q6_K  256 weights: 128 bytes low nibbles, 64 bytes high pairs, 16 int8 scales, fp16 d

Source:
    ggml ``ggml-common.h`` (layouts) and ``ggml-quants.c`` (order within a block).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from halfbyte.convert.bit_order import BLOCK, from_blocks, to_blocks
from halfbyte.convert.coded_linear import CodedLinear
from halfbyte.convert.gguf_file import BF16, F16, F32, Q4_0, Q4_1, Q6_K, Q8_0, BlockType
from halfbyte.convert.mlx import find_zeros
from halfbyte.errors import CheckpointError

PLAIN: Mapping[BlockType, torch.dtype] = {
    F32: torch.float32,
    F16: torch.float16,
    BF16: torch.bfloat16,
}


def encode_blocks(linear: CodedLinear, kind: BlockType) -> Tensor:
    """Encode a linear as blocks.

    Args:
        linear: Symmetric in 4 bits for Q4_0, symmetric in 8 bits for Q8_0, any in 4 bits for
            Q4_1; all groups have the same size, a multiple of 32.
        kind: Q4_0, Q4_1 or Q8_0.

    Returns:
        uint8 [out, in / 32 * bytes per block].
    """
    if linear.in_features % linear.group_size:
        linear = linear.split_groups(BLOCK)
    scales = linear.scales.to(torch.float16)
    grid = [scales]
    if kind == Q4_1:
        grid.append(linear.minima().to(torch.float16))
    heads = torch.stack(grid, dim=-1).view(torch.uint8)
    blocks = to_blocks(linear.words_in_rows(), heads, 8 if kind == Q8_0 else 4)
    return blocks.view(linear.out_features, -1)


def decode_blocks(name: str, data: Tensor, kind: BlockType, shape: tuple[int, ...]) -> CodedLinear:
    """Decode blocks to a linear with groups of 32.

    Args:
        name: For messages.
        data: uint8 [bytes].
        kind: Q4_0, Q4_1 or Q8_0.
        shape: [out, in].

    Returns:
        The linear.

    Raises:
        CheckpointError: A scale or a minimum is not finite.
    """
    blocks = data.view(shape[0], -1, kind.num_bytes)
    grid = 2 if kind == Q4_1 else 1
    values = [
        blocks[..., 2 * i : 2 * i + 2].contiguous().view(torch.float16).squeeze(-1)
        for i in range(grid)
    ]
    scales = values[0]
    if not all(bool(torch.isfinite(part).all()) for part in values):
        raise CheckpointError(
            f"{name} has scales that are infinite or not a number. The file is damaged; download "
            "it again."
        )
    bits = 8 if kind == Q8_0 else 4
    zeros, free_minima = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16), None
    if kind == Q4_1:
        zeros, free_minima = find_zeros(scales, values[1], bits)
    return CodedLinear(
        words=from_blocks(blocks, 2 * grid, bits),
        scales=scales,
        zeros=zeros,
        bits=bits,
        group_size=BLOCK,
        g_idx=None,
        bias=None,
        free_minima=free_minima,
    )


def decode_plain(name: str, data: Tensor, kind: BlockType, shape: tuple[int, ...]) -> Tensor:
    """Decode a tensor: floats as they are, Q6_K, Q8_0, Q4_0 and Q4_1 to float32.

    Args:
        name: Name of the tensor, for messages.
        data: uint8 [bytes].
        kind: Type of the tensor.
        shape: Outermost dimension first.

    Returns:
        The tensor.
    """
    if kind in PLAIN:
        return data.view(PLAIN[kind]).view(shape)
    if kind == Q6_K:
        return _decode_q6_k(data, shape)
    blocks = data.view(-1, kind.num_bytes)
    scales = blocks[:, :2].contiguous().view(torch.float16).float()
    if kind == Q8_0:
        return (blocks[:, 2:].contiguous().view(torch.int8).float() * scales).view(shape)
    start = 4 if kind == Q4_1 else 2
    codes = torch.cat([blocks[:, start:] & 15, blocks[:, start:] >> 4], dim=1).float()
    if kind == Q4_0:
        return ((codes - 8) * scales).view(shape)
    return (codes * scales + blocks[:, 2:4].contiguous().view(torch.float16).float()).view(shape)


def encode_plain(tensor: Tensor, kind: BlockType) -> Tensor:
    """Encode a float tensor as floats, Q8_0 or Q6_K, rounding to nearest.

    Args:
        tensor: Float, any shape whose last dimension is a multiple of the type's block size.
        kind: F32, F16, BF16, Q8_0 or Q6_K.

    Returns:
        uint8 [bytes].
    """
    if kind in PLAIN:
        return tensor.to(PLAIN[kind]).contiguous().view(-1).view(torch.uint8)
    return (_encode_q8_0 if kind == Q8_0 else _encode_q6_k)(tensor.float())


def _encode_q8_0(values: Tensor) -> Tensor:
    blocks = values.reshape(-1, BLOCK)
    scales = (blocks.abs().amax(dim=1, keepdim=True) / 127).to(torch.float16)
    codes = torch.where(scales == 0, 0.0, blocks / scales.float()).round().clamp(-127, 127)
    parts = [scales.view(torch.uint8), codes.to(torch.int8).view(torch.uint8)]
    return torch.cat(parts, dim=1).view(-1)


def _encode_q6_k(values: Tensor) -> Tensor:
    """Encode as Q6_K: 16 sub-blocks of 16, each with the best of five candidate scales."""
    blocks = values.reshape(-1, 16, 16)
    largest = blocks.gather(-1, blocks.abs().argmax(dim=-1, keepdim=True))
    best = torch.zeros_like(largest)
    smallest = torch.full_like(largest, torch.inf)
    for divisor in (-32.0, -31.5, -31.0, -30.5, -30.0):
        scale = largest / divisor
        codes = torch.where(scale == 0, 0.0, blocks / scale).round().clamp(-32, 31)
        error = (codes * scale - blocks).square().sum(dim=-1, keepdim=True)
        best = torch.where(error < smallest, scale, best)
        smallest = torch.minimum(error, smallest)
    extreme = best.gather(1, best.abs().argmax(dim=1, keepdim=True))
    d = (extreme / -128).to(torch.float16)
    sub = torch.where(d == 0, 0.0, best / d.float()).round().clamp(-128, 127)
    steps = sub * d.float()
    codes = torch.where(steps == 0, 0.0, blocks / steps).round().clamp(-32, 31) + 32
    quants = codes.to(torch.uint8).view(-1, 2, 4, 32)  # two halves of four quarters of 32
    low = (quants[:, :, :2] & 15) | ((quants[:, :, 2:] & 15) << 4)
    high = quants >> 4
    pairs = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    parts = [
        low.reshape(-1, 128),
        pairs.reshape(-1, 64),
        sub.to(torch.int8).view(torch.uint8).view(-1, 16),
        d.view(-1, 1).view(torch.uint8),
    ]
    return torch.cat(parts, dim=1).view(-1)


def _decode_q6_k(data: Tensor, shape: tuple[int, ...]) -> Tensor:
    blocks = data.view(-1, Q6_K.num_bytes)
    low = blocks[:, :128].view(-1, 2, 2, 32)
    pairs = blocks[:, 128:192].view(-1, 2, 1, 32)
    sub = blocks[:, 192:208].contiguous().view(torch.int8).float()
    d = blocks[:, 208:].contiguous().view(torch.float16).float()
    nibbles = torch.cat([low & 15, low >> 4], dim=2)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (nibbles | (((pairs >> shifts) & 3) << 4)).float() - 32
    return (codes.view(-1, 16, 16) * (sub * d)[..., None]).view(shape)
