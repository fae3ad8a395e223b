"""The Triton kernels that sort tokens by expert, and add up the results of each token's experts.

EARLY: as in :mod:`halfbyte.kernels.triton_decode_kernels`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# Triton's sum and cumsum do not run in the interpreter if Triton was imported before it.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit(do_not_specialize=["tokens", "row_blocks"])
def route_kernel(
    experts,
    block_experts,
    block_counts,
    sources,
    places,
    tokens,
    num_experts,
    row_blocks,
    PER_TOKEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Give each expert whole blocks of rows, one row per token, in one program.

    Reads ``experts`` [tokens, PER_TOKEN] and writes what
    :class:`~halfbyte.kernels.triton_experts.Routing` describes. TOKENS, EXPERTS and BLOCKS are
    powers of two that the numbers of each fit in.
    """
    t = tl.arange(0, TOKENS)
    e = tl.arange(0, EXPERTS)
    chosen = tl.full((TOKENS, EXPERTS), 0, tl.int32)
    for k in tl.static_range(PER_TOKEN):
        expert = tl.load(experts + t * PER_TOKEN + k, mask=t < tokens, other=-1).to(tl.int32)
        chosen = tl.where((expert[:, None] == e[None, :]) & (e < num_experts)[None, :], 1, chosen)
    counts = tl.reduce(chosen, 0, _add)
    blocks = (counts + BLOCK_ROWS - 1) // BLOCK_ROWS
    ends = tl.associative_scan(blocks, 0, _add)
    firsts = ends - blocks
    earlier = tl.associative_scan(chosen, 0, _add) - chosen
    rows = firsts[None, :] * BLOCK_ROWS + earlier
    tokens_of_rows = tl.where(chosen > 0, t[:, None], 0)
    tl.store(sources + rows, tokens_of_rows, mask=chosen > 0)
    for k in tl.static_range(PER_TOKEN):
        expert = tl.load(experts + t * PER_TOKEN + k, mask=t < tokens, other=-1).to(tl.int32)
        place = tl.reduce(tl.where(expert[:, None] == e[None, :], rows, 0), 1, _add)
        exists = (expert >= 0) & (expert < num_experts)
        tl.store(places + t * PER_TOKEN + k, tl.where(exists, place, -1), mask=t < tokens)
    b = tl.arange(0, BLOCKS)
    # Blocks beyond the last used one belong to no expert and have no rows.
    expert = tl.reduce(tl.where(ends[None, :] <= b[:, None], 1, 0), 1, _add)
    own = expert[:, None] == e[None, :]
    left = tl.where(own, counts[None, :] - (b[:, None] - firsts[None, :]) * BLOCK_ROWS, 0)
    left = tl.minimum(tl.reduce(left, 1, _add), BLOCK_ROWS)
    tl.store(block_experts + b, expert, mask=b < row_blocks)
    tl.store(block_counts + b, left, mask=b < row_blocks)


@triton.jit
def combine_kernel(
    parts,
    places,
    weights,
    result,
    width,
    PER_TOKEN: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write result [tokens, width] = the weighted sum of each token's rows of ``parts``."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    token = tl.program_id(1)
    inside = column < width
    total = tl.full((BLOCK,), 0.0, tl.float32)
    for k in tl.static_range(PER_TOKEN):
        row = tl.load(places + token * PER_TOKEN + k)
        weight = tl.load(weights + token * PER_TOKEN + k).to(tl.float32)
        part = tl.load(
            parts + row.to(tl.int64) * width + column, mask=inside & (row >= 0), other=0.0
        )
        total += weight * part.to(tl.float32)
    tl.store(result + token * width + column, total.to(result.dtype.element_ty), mask=inside)
