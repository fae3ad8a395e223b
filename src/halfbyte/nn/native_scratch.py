"""How much memory the compiled decoder allocates for a step, to plan it before it is allocated.

The formulas are those of ``csrc/decoder.cpp``, ``csrc/experts.h`` and ``csrc/amx_attention.h``; a
test compares them with what the library allocates.
"""

from __future__ import annotations

from halfbyte.kernels.native_library import Decoder

LANES = 16
TILE_ROWS, TILE_COLUMNS = 32, 32
"""Rows and columns to which the inputs of matrix units are padded."""
ROWS_AT_A_TIME, MOST_TILED_ROWS, WORK_FLOATS = 128, 512, 16 << 20
ROWS_TOGETHER, QUERIES_TOGETHER, KEYS_TOGETHER = 8, 256, 128
"""Rows, or on matrix units queries and keys, that attend together."""
STRIPE_BYTES = 4 << 20
"""Sums of a thread on matrix units."""
LISTS_BYTES = 1 << 17
"""Lists of products and routes, and buffers rounded to whole pages."""


def plan_scratch_bytes(sizes: Decoder, rows: int, length: int, *, tiles: bool, threads: int) -> int:
    """Return an upper bound of the memory that the library keeps for a step.

    Args:
        sizes: The model's sizes; its pointers are not used.
        rows: Tokens of the step.
        length: Positions that a token attends to at most.
        tiles: Whether the step runs on matrix units.
        threads: Threads of the library.

    Returns:
        Bytes.
    """
    per_row = _count_row_floats(sizes)
    most = ROWS_AT_A_TIME
    if tiles:
        most = max(ROWS_AT_A_TIME, min(MOST_TILED_ROWS, WORK_FLOATS // per_row))
    rows = min(rows, most)
    floats = rows * per_row + _count_input_floats(sizes, rows, tiles=tiles)
    return 4 * floats + threads * _count_thread_bytes(sizes, length, tiles=tiles)


def _count_row_floats(sizes: Decoder) -> int:
    """Return the floats per row between products."""
    queries, keys = sizes.heads * sizes.head_dim, sizes.kv_heads * sizes.head_dim
    routed = sizes.experts_per_token * sizes.expert_width
    middle = max(routed, sizes.intermediate)
    floats: int = sizes.experts_per_token * sizes.hidden + sizes.experts
    floats += 2 * (sizes.hidden + queries + keys + middle)
    return floats


def _count_input_floats(sizes: Decoder, rows: int, *, tiles: bool) -> int:
    """Return the floats for the prepared inputs of the products that run together."""
    queries = sizes.heads * sizes.head_dim
    widest = max(sizes.hidden, sizes.intermediate, queries, sizes.expert_width)
    if tiles:
        return _pad(rows, TILE_ROWS) * _pad(widest, TILE_COLUMNS) // 2
    routed = rows * sizes.experts_per_token
    of_experts = max(2 * sizes.hidden, sizes.expert_width) * 5 // 2 * routed
    of_experts += 4 * LANES * min(routed, sizes.experts)
    floats: int = max(3 * (widest * 5 // 2 * rows + 2 * LANES), of_experts)
    return floats


def _count_thread_bytes(sizes: Decoder, length: int, *, tiles: bool) -> int:
    """Return the bytes that each thread keeps for itself."""
    shared = sizes.heads // sizes.kv_heads
    if not tiles:
        widest = max(sizes.hidden, sizes.intermediate, sizes.expert_width)
        scores = ROWS_TOGETHER * shared * (length + 2 * LANES) + LANES * sizes.head_dim
        return LISTS_BYTES + 4 * int(scores + 2 * widest)
    rows = (QUERIES_TOGETHER // shared + LANES) // LANES * LANES
    queries = _pad(shared * rows, 2 * LANES)
    width = _pad(sizes.head_dim, TILE_COLUMNS)
    # Queries and outputs; keys and values; scores and shares; largest scores and sums.
    floats = queries * width * 3 // 2 + KEYS_TOGETHER * (width + 3 * LANES) + 2 * queries
    return 4 * floats + STRIPE_BYTES + LISTS_BYTES


def _pad(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple
