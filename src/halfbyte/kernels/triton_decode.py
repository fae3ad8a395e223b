"""The operations of a decode step between its linears, one launch each: norm, attention, gate.

Kernels: :mod:`halfbyte.kernels.triton_decode_kernels`. Each row is one token of a sequence.
Arithmetic as in Transformers' Llama-like models: fp32 internally, rounded to the model's dtype at
the same points, except that rotary embedding rounds once instead of three times.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.kernels.gpu_device import (
    count_processors,
    early_options,
    find_arrivals,
    is_amd,
    on_device,
)
from halfbyte.kernels.triton_configs import next_power_of_two

MIN_DOT_ROWS = 16
"""Minimum rows of a ``tl.dot``."""
BLOCK_POSITIONS = 32
AMD_BLOCK_POSITIONS = 16
"""With 32, registers do not fit on RDNA 3."""
MAX_SPLITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes and constants of a block's attention."""

    heads: int
    key_heads: int
    width: int
    """Head dimension."""
    scale: float
    """Factor of the attention scores."""
    epsilon: float
    """Epsilon of the query and key norms, if any."""


def add_norm(
    x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Add to the residual stream and apply an RMS norm to the sum.

    Args:
        x: [rows, width], the residual stream.
        delta: [rows, width] to add, or None.
        weight: [width], the weight of the norm.
        epsilon: Epsilon of the norm.

    Returns:
        The updated residual stream and its norm: [rows, width] each, in the dtype of x.
    """
    from halfbyte.kernels.triton_decode_kernels import add_norm_kernel

    rows, width = x.shape
    total = x if delta is None else torch.empty_like(x)
    result = torch.empty_like(x)
    with on_device(x.device):
        add_norm_kernel[(rows,)](
            x,
            delta,
            weight,
            total,
            result,
            width,
            epsilon,
            HAS_DELTA=delta is not None,
            BLOCK=next_power_of_two(width),
            num_warps=min(max(next_power_of_two(width) // 512, 1), 16),
            **early_options(x.device),
        )
    return total, result


def gate(gate_up: Tensor) -> Tensor:
    """Compute silu(gate) * up.

    Args:
        gate_up: [rows, 2 width]; gate first, then up.

    Returns:
        [rows, width].
    """
    from halfbyte.kernels.triton_decode_kernels import gate_kernel

    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    result = gate_up.new_empty(rows, width)
    block = 256
    with on_device(gate_up.device):
        gate_kernel[(-(-width // block), rows)](
            gate_up, result, width, BLOCK=block, num_warps=2, **early_options(gate_up.device)
        )
    return result


def attend(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    rotary: tuple[Tensor, Tensor],
    positions: Tensor,
    tables: Tensor,
    cache: tuple[Tensor, Tensor],
    shape: AttentionShape,
) -> Tensor:
    """Apply rotary embedding, write key and value to the cache, and attend to all positions so far.

    Args:
        qkv: [rows, (heads + 2 key_heads) * width]: queries, key, value of each token.
        norms: Weights [width] of the query and key norms, or None.
        rotary: Cosines and sines [positions, rotary width].
        positions: int64 [rows], positions of the tokens; all earlier ones are in the cache.
        tables: int32 [rows, max pages], the page table of each row's sequence.
        cache: Keys and values [pages, key_heads, page tokens, width]; updated in place.
        shape: Sizes and constants of the attention.

    Returns:
        [rows, heads * width].
    """
    from halfbyte.kernels.triton_decode_kernels import attend_kernel

    keys, values = cache
    assert keys.is_contiguous()
    assert values.is_contiguous()
    rows = qkv.shape[0]
    splits = choose_splits(qkv.device, shape.key_heads * rows)
    amd = is_amd(qkv.device)
    result = qkv.new_empty(rows, shape.heads * shape.width)
    sums = sizes = arrivals = None
    if splits > 1:
        sums = qkv.new_empty(splits, rows, shape.heads, shape.width, dtype=torch.float32)
        sizes = qkv.new_empty(splits, rows, shape.heads, 2, dtype=torch.float32)
        arrivals = find_arrivals(qkv.device)
    with on_device(qkv.device):
        attend_kernel[(shape.key_heads, splits, rows)](
            qkv,
            None if norms is None else norms[0],
            None if norms is None else norms[1],
            *rotary,
            positions,
            tables,
            keys,
            values,
            result,
            sums,
            sizes,
            arrivals,
            shape.scale,
            shape.epsilon,
            keys.shape[2],
            tables.shape[1],
            HEADS=shape.heads,
            KEY_HEADS=shape.key_heads,
            WIDTH=shape.width,
            ROTARY=rotary[0].shape[-1],
            HAS_NORMS=norms is not None,
            ROWS=max(next_power_of_two(shape.heads // shape.key_heads), MIN_DOT_ROWS),
            BLOCK=AMD_BLOCK_POSITIONS if amd else BLOCK_POSITIONS,
            BLOCK_WIDTH=max(next_power_of_two(shape.width), MIN_DOT_ROWS),
            PAGE=keys.shape[2] if tables.shape[1] > 1 else 0,
            SPLITS=splits,
            num_warps=8 if amd else 4,
            num_stages=2 if amd else 3,
            **early_options(qkv.device),
        )
    return result


@functools.cache
def choose_splits(device: torch.device, programs: int) -> int:
    """Choose how many programs split the positions of a sequence, to occupy all multiprocessors.

    Args:
        device: Device of the launch.
        programs: Programs without splitting: key heads of all rows.

    Returns:
        A power of two.
    """
    splits = min(max(count_processors(device) // programs, 1), MAX_SPLITS)
    return 1 << (splits.bit_length() - 1)
