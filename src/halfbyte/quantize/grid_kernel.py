"""The search for scales and zeros as a Triton kernel.

Every group is tried with about forty grids. As separate torch operations, that reads and writes the
weight about three hundred times; here a group stays in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Adding and subtracting this rounds to the nearest integer, halves to even, like torch.round, for
# numbers far smaller than it.
MAGIC = tl.constexpr(1.5 * 2**23)


@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def _stored(scales, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Round scales to fp16, as ``grid.round_to_stored`` does."""
    size = tl.minimum(tl.maximum(tl.abs(scales), SMALLEST), LARGEST)
    size = tl.where(scales == 0, 1.0, size)
    return tl.where(scales < 0, -size, size).to(tl.float16).to(tl.float32)


@triton.jit
def _loss(x, weights, scales, lowest, highest):
    """Return the weighted squared error of rounding groups [rows, size] to grids [rows]."""
    quotient = x * (1.0 / scales)[:, None]
    # Clamped first, because rounding with MAGIC needs small numbers.
    nearest = tl.minimum(tl.maximum(quotient, lowest[:, None] - 1), highest[:, None] + 1)
    code = tl.minimum(tl.maximum((nearest + MAGIC) - MAGIC, lowest[:, None]), highest[:, None])
    error = x - code * scales[:, None]
    return tl.reduce(error * error * weights[None, :], 1, _add)


@triton.jit
def grid_kernel(
    grouped,
    curvature,
    coarse,
    fine,
    scales,
    zeros,
    num_rows,
    num_groups,
    size,
    COARSE: tl.constexpr,
    FINE: tl.constexpr,
    TOP: tl.constexpr,
    SYMMETRIC: tl.constexpr,
    SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """Search the grid of one group in ROWS output rows, as ``grid.py`` defines it."""
    # grouped is fp32 [rows, groups, size], curvature [groups, size], zero where a group is shorter;
    # coarse and fine are fp32 fractions of the span; scales and zeros are [rows, groups].
    group = tl.program_id(0)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    lane = tl.arange(0, SIZE)
    inside = row < num_rows
    place = (row[:, None].to(tl.int64) * num_groups + group) * size + lane[None, :]
    x = tl.load(grouped + place, mask=inside[:, None] & (lane[None, :] < size), other=0.0)
    weights = tl.load(curvature + group * size + lane, mask=lane < size, other=0.0)
    best_loss = tl.full([ROWS], float("inf"), tl.float32)
    best_share = tl.full([ROWS], 0.0, tl.float32)
    if SYMMETRIC:
        half: tl.constexpr = (TOP + 1) // 2
        span = tl.reduce(tl.abs(x), 1, _larger) / half
        lowest = tl.full([ROWS], -half, tl.float32)
        highest = tl.full([ROWS], half - 1, tl.float32)
        best_scales = _stored(span, SMALLEST, LARGEST)
        best_zeros = tl.full([ROWS], half, tl.float32)
        for i in range(COARSE):
            share = tl.load(coarse + i)
            tried = _stored(span * share, SMALLEST, LARGEST)
            loss = _loss(x, weights, tried, lowest, highest)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best_scales = tl.where(better, tried, best_scales)
            best_share = tl.where(better, share, best_share)
        center = best_share
        for i in range(FINE):
            tried = _stored(span * (center + tl.load(fine + i)), SMALLEST, LARGEST)
            loss = _loss(x, weights, tried, lowest, highest)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best_scales = tl.where(better, tried, best_scales)
    else:
        # Padding and missing rows are zeros, which the range includes anyway.
        low = -tl.maximum(tl.reduce(-x, 1, _larger), 0.0)
        high = tl.maximum(tl.reduce(x, 1, _larger), 0.0)
        span = (high - low) / TOP
        exact = tl.minimum(tl.maximum(-low / tl.maximum(span, SMALLEST), 0.0), TOP)
        down = tl.minimum(tl.maximum(tl.floor(exact), 1.0), TOP)
        up = tl.minimum(tl.maximum(tl.ceil(exact), 1.0), TOP)
        best_scales = _stored(span, SMALLEST, LARGEST)
        best_zeros = down
        for i in range(2 * COARSE):
            share = tl.load(coarse + i // 2)
            zero = tl.where(i % 2 == 0, down, up)
            tried = _stored(span * share, SMALLEST, LARGEST)
            loss = _loss(x, weights, tried, -zero, TOP - zero)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best_scales = tl.where(better, tried, best_scales)
            best_zeros = tl.where(better, zero, best_zeros)
            best_share = tl.where(better, share, best_share)
        center = best_share
        for i in range(2 * FINE):
            zero = tl.where(i % 2 == 0, down, up)
            tried = _stored(span * (center + tl.load(fine + i // 2)), SMALLEST, LARGEST)
            loss = _loss(x, weights, tried, -zero, TOP - zero)
            better = loss < best_loss
            best_loss = tl.where(better, loss, best_loss)
            best_scales = tl.where(better, tried, best_scales)
            best_zeros = tl.where(better, zero, best_zeros)
    at = row.to(tl.int64) * num_groups + group
    tl.store(scales + at, best_scales, mask=inside)
    tl.store(zeros + at, best_zeros, mask=inside)
