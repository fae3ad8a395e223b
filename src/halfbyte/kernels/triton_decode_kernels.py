"""The Triton kernels of a decode step between its linears: add and norm, attention, gate.

Each row is one token of a sequence. Values are rounded where Transformers rounds: the
residual stream, norms and activations are in the model's dtype, everything inside them is fp32.

EARLY: programmatic dependent launch. The kernel starts while the previous launch still runs, and
waits for it before first reading its results (NVIDIA from compute capability 9.0 on).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


# Triton's sum and max do not run in the interpreter if Triton was imported before it.
@triton.jit
def _add(a, b):
    return a + b


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def add_norm_kernel(
    x,
    delta,
    weight,
    total,
    result,
    width,
    epsilon,
    HAS_DELTA: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write total [rows, width] = x + delta, and result = its RMS norm times weight."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    gain = tl.load(weight + column, mask=inside, other=0.0)
    place = tl.program_id(0) * width + column
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    value = tl.load(x + place, mask=inside, other=0.0)
    if HAS_DELTA:
        value = value.to(tl.float32) + tl.load(delta + place, mask=inside, other=0.0).to(tl.float32)
        value = value.to(x.dtype.element_ty)
        tl.store(total + place, value, mask=inside)
    value = value.to(tl.float32)
    value *= tl.rsqrt(tl.reduce(value * value, 0, _add) / width + epsilon)
    value = value.to(x.dtype.element_ty).to(tl.float32) * gain.to(tl.float32)
    tl.store(result + place, value.to(result.dtype.element_ty), mask=inside)


@triton.jit
def gate_kernel(gate_up, result, width, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """Write result [rows, width] = silu(gate) * up, of gate_up [rows, 2 width]."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(1)
    inside = column < width
    place = gate_up + 2 * row * width + column
    gate = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(place + width, mask=inside, other=0.0).to(tl.float32)
    gate = (gate / (1.0 + tl.exp(-gate))).to(result.dtype.element_ty).to(tl.float32)
    tl.store(result + row * width + column, (gate * up).to(result.dtype.element_ty), mask=inside)


@triton.jit
def _load_turned(
    heads,
    inside,
    weight,
    cosine,
    sine,
    epsilon,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_NORM: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    """Load heads [rows, BLOCK_WIDTH], with norm and rotary embedding applied in fp32.

    ``heads`` are pointers [rows, 1] to the heads, ``inside`` masks the existing ones.
    """
    DTYPE: tl.constexpr = heads.dtype.element_ty
    HALF: tl.constexpr = ROTARY // 2
    d = tl.arange(0, BLOCK_WIDTH)
    # The rotation combines each element with its partner, half the rotary width away.
    partner = tl.where(d < HALF, d + HALF, tl.where(d < ROTARY, d - HALF, d))
    whole = inside & (d < WIDTH)[None, :]
    value = tl.load(heads + d[None, :], mask=whole, other=0.0).to(tl.float32)
    other = tl.load(heads + partner[None, :], mask=whole, other=0.0).to(tl.float32)
    if HAS_NORM:
        size = tl.rsqrt(tl.reduce(value * value, 1, _add) / WIDTH + epsilon)[:, None]
        gain = tl.load(weight + d, mask=d < WIDTH, other=0.0).to(tl.float32)
        gain_other = tl.load(weight + partner, mask=d < WIDTH, other=0.0).to(tl.float32)
        value = ((value * size).to(DTYPE).to(tl.float32) * gain[None, :]).to(DTYPE).to(tl.float32)
        other = (other * size).to(DTYPE).to(tl.float32) * gain_other[None, :]
        other = other.to(DTYPE).to(tl.float32)
    turned = value * cosine[None, :] + other * sine[None, :]
    return turned.to(DTYPE)


@triton.jit
def _take_in(queries, key, value, there, scale, largest, size, total):
    """Update the running max, sum of exponentials and weighted sum of values with more keys."""
    scores = tl.dot(queries, tl.trans(key)) * scale
    scores = tl.where(there[None, :], scores, float("-inf"))
    larger = tl.maximum(largest, tl.reduce(scores, 1, _larger))
    # No key so far and none in this block: any finite maximum will do.
    base = tl.where(larger == float("-inf"), 0.0, larger)
    shares = tl.exp2(scores - base[:, None])
    fade = tl.exp2(largest - base)
    total = total * fade[:, None] + tl.dot(shares.to(value.dtype), value)
    size = size * fade + tl.reduce(shares, 1, _add)
    return larger, size, total


@triton.jit
def _find_places(
    table,
    n,
    end,
    head,
    page_tokens,
    d,
    PAGE: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Return the offsets [n, d] of a head's positions in keys and values, for n below the end."""
    if PAGE:
        page = tl.load(table + n // PAGE, mask=n < end, other=0)
        row = (page.to(tl.int64) * KEY_HEADS + head) * PAGE + n % PAGE
    else:
        row = (tl.load(table).to(tl.int64) * KEY_HEADS + head) * page_tokens + n
    return row[:, None] * WIDTH + d[None, :]


@triton.jit
def attend_kernel(
    qkv,
    q_norm,
    k_norm,
    cosines,
    sines,
    positions,
    tables,
    keys,
    values,
    result,
    sums,
    sizes,
    arrivals,
    scale,
    epsilon,
    page_tokens,
    table_pages,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HAS_NORMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    SPLITS: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Attend with all query heads of one key head to one split of a row's positions.

    Keys and values are [pages, KEY_HEADS, page_tokens, WIDTH]; ``tables`` [rows, table_pages] is
    the page table. The first split writes the token's key and value to the cache and uses them
    directly from ``qkv``, so no program reads what this launch writes. PAGE is page_tokens, or 0 if
    a row has one page. The last split to arrive combines all in a fixed order, so the result is
    deterministic.
    """
    DTYPE: tl.constexpr = qkv.dtype.element_ty
    GROUP: tl.constexpr = HEADS // KEY_HEADS
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(0)
    split = tl.program_id(1)
    number = tl.program_id(2)
    d = tl.arange(0, BLOCK_WIDTH)
    in_width = d < WIDTH
    here = tl.load(positions + number)
    table = tables + number * table_pages
    turned = d < ROTARY
    row = here * ROTARY + d
    cosine = tl.load(cosines + row, mask=turned, other=1.0).to(tl.float32)
    sine = tl.load(sines + row, mask=turned, other=0.0).to(tl.float32)
    sine = tl.where(d < ROTARY // 2, -sine, sine)
    # Cached keys and values do not depend on the previous launch, so load them before waiting.
    each = (here + SPLITS * BLOCK - 1) // (SPLITS * BLOCK) * BLOCK
    begin = split * each
    end = tl.minimum(begin + each, here)
    n = begin + tl.arange(0, BLOCK)
    there = (n < end)[:, None] & in_width[None, :]
    place = _find_places(table, n, end, head, page_tokens, d, PAGE, KEY_HEADS, WIDTH)
    earliest_key = tl.load(keys + place, mask=there, other=0.0)
    earliest_value = tl.load(values + place, mask=there, other=0.0)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    g = tl.arange(0, ROWS)
    qkv += number * (HEADS + 2 * KEY_HEADS) * WIDTH
    queries = _load_turned(
        qkv + ((head * GROUP + g) * WIDTH)[:, None],
        (g < GROUP)[:, None],
        q_norm,
        cosine,
        sine,
        epsilon,
        WIDTH,
        ROTARY,
        HAS_NORMS,
        BLOCK_WIDTH,
    )
    largest = tl.full((ROWS,), float("-inf"), tl.float32)
    size = tl.full((ROWS,), 0.0, tl.float32)
    total = tl.full((ROWS, BLOCK_WIDTH), 0.0, tl.float32)
    if split == 0:
        one = tl.arange(0, 1)
        key = _load_turned(
            qkv + ((HEADS + head + one) * WIDTH)[:, None],
            (one == 0)[:, None],
            k_norm,
            cosine,
            sine,
            epsilon,
            WIDTH,
            ROTARY,
            HAS_NORMS,
            BLOCK_WIDTH,
        )
        value = tl.load(
            qkv + (HEADS + KEY_HEADS + head + one)[:, None] * WIDTH + d[None, :],
            mask=in_width[None, :],
            other=0.0,
        )
        own = _find_places(
            table, here + one, here + 1, head, page_tokens, d, PAGE, KEY_HEADS, WIDTH
        )
        tl.store(keys + own, key, mask=in_width[None, :])
        tl.store(values + own, value, mask=in_width[None, :])
        scores = tl.reduce(queries.to(tl.float32) * key.to(tl.float32), 1, _add)
        largest = scores * (scale * LOG2E)
        size = tl.full((ROWS,), 1.0, tl.float32)
        total += value.to(tl.float32)
    scale *= LOG2E
    largest, size, total = _take_in(
        queries, earliest_key, earliest_value, n < end, scale, largest, size, total
    )
    for start in tl.range(begin + BLOCK, end, BLOCK):
        n = start + tl.arange(0, BLOCK)
        there = (n < end)[:, None] & in_width[None, :]
        place = _find_places(table, n, end, head, page_tokens, d, PAGE, KEY_HEADS, WIDTH)
        key = tl.load(keys + place, mask=there, other=0.0)
        value = tl.load(values + place, mask=there, other=0.0)
        largest, size, total = _take_in(queries, key, value, n < end, scale, largest, size, total)
    kept = (g < GROUP)[:, None] & in_width[None, :]
    member = number * HEADS + head * GROUP + g
    out = result + member[:, None] * WIDTH + d[None, :]
    if SPLITS == 1:
        tl.store(out, (total / size[:, None]).to(DTYPE), mask=kept)
    else:
        # Heads of all rows.
        whole = tl.num_programs(2) * HEADS
        spot = member[:, None] * WIDTH + d[None, :]
        tl.store(sums + split * whole * WIDTH + spot, total, mask=kept)
        # [split, head, (max, sum of exponentials)]
        tl.store(sizes + (split * whole + member) * 2, largest, mask=g < GROUP)
        tl.store(sizes + (split * whole + member) * 2 + 1, size, mask=g < GROUP)
        # All threads must have written their sums before the arrival is counted.
        tl.debug_barrier()
        counter = arrivals + number * KEY_HEADS + head
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(counter, 0)
            shares = tl.arange(0, SPLITS)
            peaks = tl.load(
                sizes + (shares[:, None] * whole + member[None, :]) * 2,
                mask=(g < GROUP)[None, :],
                other=0.0,
                cache_modifier=".cg",
            )
            largest = tl.reduce(peaks, 0, _larger)
            total = tl.full((ROWS, BLOCK_WIDTH), 0.0, tl.float32)
            size = tl.full((ROWS,), 0.0, tl.float32)
            for other in tl.static_range(SPLITS):
                at = sizes + (other * whole + member) * 2
                peak = tl.load(at, mask=g < GROUP, other=0.0, cache_modifier=".cg")
                part = tl.load(at + 1, mask=g < GROUP, other=1.0, cache_modifier=".cg")
                more = tl.load(
                    sums + other * whole * WIDTH + spot,
                    mask=kept,
                    other=0.0,
                    cache_modifier=".cg",
                )
                fade = tl.exp2(peak - largest)
                size += part * fade
                total += more * fade[:, None]
            tl.store(out, (total / size[:, None]).to(DTYPE), mask=kept)
