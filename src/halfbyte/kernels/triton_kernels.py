"""The Triton kernels over the layout of :mod:`halfbyte.kernels.fragments`: multiply and dequantize.

Tile: BLOCK_OUT channels by BLOCK_ROWS rows of x, 64 inputs per step. The weight is the left
operand, so that the few rows of a decode step are the narrow side of the tensor core. Codes minus
zeros are integers, exact in fp16 and bf16; sums are fp32, scaled once per group. If a channel's
inputs are split over programs (split-K), each writes its sums to a workspace, and the last one to
arrive adds them in a fixed order, so the result is deterministic.

FAST unpacks 4-bit codes with NVIDIA's instructions, two codes at a time; without it the same is
done in plain Triton, for other vendors' devices and for the interpreter.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

# A word holds the codes of four registers of the A operand; 0xEA is (a & b) | c. ``pack`` stays 1:
# which words Triton would pack together depends on its layout.
_ASM_PAIR = """
shr.u32 t, $8, SHIFT; lop3.b32 t, t, 0x000f000f, MAGIC, 0xEA;
fma.rn.KIND t, t, one, $9; mov.b32 {$LOW, $HIGH}, t;
"""


def _assemble(magic: str, one: str, kind: str) -> str:
    text = "{ .reg .b32 t, one; mov.b32 one, ONE;"
    for pair in range(4):
        part = _ASM_PAIR.replace("SHIFT", str(4 * pair))
        text += part.replace("LOW", str(2 * pair)).replace("HIGH", str(2 * pair + 1))
    return text.replace("MAGIC", magic).replace("ONE", one).replace("KIND", kind) + "}"


# 1024 + code in fp16 and 128 + code in bf16 are exact: the code is the low bits of the mantissa.
ASM_FP16 = tl.constexpr(_assemble("0x64006400", "0x3C003C00", "f16x2"))
ASM_BF16 = tl.constexpr(_assemble("0x43004300", "0x3F803F80", "bf16x2"))
ASM_CONSTRAINTS = tl.constexpr(",".join(["=h"] * 8 + ["r"] * 2))
# The bits of -(1024 + zero) and of -(128 + zero), less the zero itself.
NEGATED_FP16 = tl.constexpr(0xE400E400 - 2**32)
NEGATED_BF16 = tl.constexpr(0xC300C300 - 2**32)


@triton.jit
def _take_apart(words, zeros, DTYPE: tl.constexpr):
    """Unpack 4-bit words [tiles, 8, 4, 2, 2] to codes minus zeros [out, 64] by inline assembly."""
    ASSEMBLY: tl.constexpr = ASM_FP16 if DTYPE == tl.float16 else ASM_BF16  # noqa: SIM300
    NEGATED: tl.constexpr = NEGATED_FP16 if DTYPE == tl.float16 else NEGATED_BF16  # noqa: SIM300
    a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
        ASSEMBLY,
        ASM_CONSTRAINTS,
        [words, (zeros * 0x00010001) | NEGATED],
        dtype=(
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
            tl.int16,
        ),
        is_pure=True,
        pack=1,
    )
    even = tl.join(tl.join(a, b), tl.join(c, d))
    odd = tl.join(tl.join(e, f), tl.join(g, h))
    # [tile, g, t, s / 2, h, p, u, s % 2] -> [tile, h, g, s / 2, s % 2, u, t, p]
    ordered = tl.permute(tl.join(even, odd), (0, 4, 1, 3, 7, 6, 2, 5))
    return tl.reshape(ordered, (words.shape[0] * 16, 64)).to(DTYPE, bitcast=True)


@triton.jit
def _load_codes(codes, tile, TILES: tl.constexpr, tiles_left, BITS: tl.constexpr):
    """Load codes int32 [16 TILES, 64] of TILES tiles from ``tile`` on, in plain Triton."""
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = 32 * LOW
    RUN: tl.constexpr = 1 if LOW == 2 else 2
    HALVES: tl.constexpr = LOW // (2 * RUN)
    PER_WORD: tl.constexpr = 16 // LOW
    offsets = tl.arange(0, TILES * WORDS)
    number = offsets // WORDS
    words = tl.load(
        codes + (tile * 32 * BITS + number * (32 * BITS) + offsets % WORDS),
        mask=number < tiles_left,
        other=0,
    )
    lanes = tl.reshape(words, (TILES, HALVES, 8, 4, RUN, 2, 1, 1))
    places = tl.reshape(tl.arange(0, PER_WORD) * LOW, (1, 1, 1, 1, 1, 1, PER_WORD, 1))
    sides = tl.reshape(tl.arange(0, 2) * 16, (1, 1, 1, 1, 1, 1, 1, 2))
    parts = (lanes >> (places + sides)) & ((1 << LOW) - 1)
    # [tile, half, g, t, run, h, place, p] -> [tile, h, g, half, run, place, t, p]
    result = tl.reshape(tl.permute(parts, (0, 5, 2, 1, 4, 6, 3, 7)), (16 * TILES, 64))
    if BITS == 3:
        offsets = tl.arange(0, TILES * 32)
        number = offsets // 32
        plane = tl.load(
            codes + (tile * 96 + number * 96 + 64 + offsets % 32),
            mask=number < tiles_left,
            other=0,
        )
        lanes = tl.reshape(plane, (TILES, 8, 4, 1, 1, 1))
        rows = tl.reshape(tl.arange(0, 2) * 8, (1, 1, 1, 2, 1, 1))
        places = tl.reshape(tl.arange(0, 8), (1, 1, 1, 1, 8, 1))
        sides = tl.reshape(tl.arange(0, 2) * 16, (1, 1, 1, 1, 1, 2))
        high = (lanes >> (rows + places + sides)) & 1
        # [tile, g, t, h, place, p] -> [tile, h, g, place, t, p]
        high = tl.reshape(tl.permute(high, (0, 3, 1, 4, 2, 5)), (16 * TILES, 64))
        result = result | (high << 2)
    return result


@triton.jit
def _load_weight(
    codes,
    zeros,
    step,
    first,
    out_features,
    GROUP_SIZE: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    FAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Load codes minus zeros [BLOCK_OUT, 64] of step ``step``: inputs from 64 * ``step`` on."""
    TILES: tl.constexpr = BLOCK_OUT // 16
    tile = step * (out_features // 16) + first // 16
    tiles_left = (out_features - first) // 16
    if FAST and BITS == 4 and (GROUP_SIZE >= 64 or not HAS_ZEROS):
        offsets = tl.arange(0, TILES * 128)
        words = tl.load(codes + tile * 128 + offsets, mask=offsets // 128 < tiles_left, other=0)
        lanes = tl.reshape(words, (TILES, 8, 4, 2, 2))
        if HAS_ZEROS:
            # Every lane loads the zeros of its own two channels.
            channel = (offsets // 128) * 16 + (offsets % 2) * 8 + (offsets // 16) % 8
            row = (step * 64) // GROUP_SIZE * out_features + first
            found = tl.load(zeros + row + channel, mask=channel < out_features - first, other=0)
            zero = tl.reshape(found.to(tl.int32), (TILES, 8, 4, 2, 2))
        else:
            zero = tl.full((TILES, 8, 4, 2, 2), 8, tl.int32)
        weight = _take_apart(lanes, zero, DTYPE)
    else:
        found = _load_codes(codes, tile, TILES, tiles_left, BITS)
        if HAS_ZEROS:
            n = tl.arange(0, BLOCK_OUT)
            k = step * 64 + tl.arange(0, 64)
            place = zeros + (k // GROUP_SIZE)[None, :] * out_features + (first + n)[:, None]
            zero = tl.load(place, mask=(n < out_features - first)[:, None], other=0).to(tl.int32)
            weight = (found - zero).to(DTYPE)
        else:
            weight = (found - (1 << (BITS - 1))).to(DTYPE)
    return weight


# Not specialized by value: otherwise rows = 1 and rows = 16 would be compiled separately.
@triton.jit(do_not_specialize=["rows", "steps_each"])
def multiply_kernel(
    x,
    codes,
    zeros,
    scales,
    order,
    bias,
    addresses,
    block_experts,
    block_counts,
    sources,
    result,
    workspace,
    arrivals,
    rows,
    in_features,
    out_features,
    steps_each,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_EXPERTS: tl.constexpr,
    HAS_SOURCES: tl.constexpr,
    FAST: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
    STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Write result [rows, out] = x [rows, in] @ weight.T + bias, for BLOCK_OUT channels.

    HAS_EXPERTS: each block of rows has a weight of its own, that of an expert. Its tensors are at
    ``addresses`` [experts, 5]; ``codes``, ``zeros``, … only tell their types. Of block ``b`` only
    the first ``block_counts[b]`` rows are computed. HAS_SOURCES: row ``m`` of the result is that of
    row ``sources[m]`` of x. EARLY: as in :mod:`halfbyte.kernels.triton_decode_kernels`.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    first = tl.program_id(0) * BLOCK_OUT
    split = tl.program_id(1)
    first_row = tl.program_id(2) * BLOCK_ROWS
    n = first + tl.arange(0, BLOCK_OUT)
    m = first_row + tl.arange(0, BLOCK_ROWS)
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    end_row = rows
    if HAS_EXPERTS:
        end_row = first_row + tl.load(block_counts + tl.program_id(2))
        if end_row == first_row:
            return
        entry = addresses + tl.load(block_experts + tl.program_id(2)) * 5
        codes = _load_pointer(entry, codes)
        scales = _load_pointer(entry + 2, scales)
        if HAS_ZEROS:
            zeros = _load_pointer(entry + 1, zeros)
        if HAS_ORDER:
            order = _load_pointer(entry + 3, order)
        if HAS_BIAS:
            bias = _load_pointer(entry + 4, bias)
    x_rows = m
    if HAS_SOURCES:
        x_rows = tl.load(sources + m, mask=m < end_row, other=0)
    begin = split * steps_each
    end = tl.minimum(begin + steps_each, in_features // 64)
    total = tl.full((BLOCK_OUT, BLOCK_ROWS), 0.0, tl.float32)
    for step in tl.range(begin, end, num_stages=STAGES):
        weight = _load_weight(
            codes,
            zeros,
            step,
            first,
            out_features,
            GROUP_SIZE,
            BLOCK_OUT,
            BITS,
            HAS_ZEROS,
            FAST,
            DTYPE,
        )
        k = step * 64 + tl.arange(0, 64)
        if HAS_ORDER:
            k = tl.load(order + k)
        place = x + x_rows[None, :] * in_features + k[:, None]
        columns = tl.load(place, mask=(m < end_row)[None, :], other=0.0)
        if GROUP_SIZE >= 64:
            scale = tl.load(
                scales + (step * 64) // GROUP_SIZE * out_features + n,
                mask=n < out_features,
                other=0.0,
            )
            total += tl.dot(weight, columns) * scale.to(tl.float32)[:, None]
        else:
            # Two groups in a step: a product for each half of the inputs.
            low, high = tl.split(tl.permute(tl.reshape(weight, (BLOCK_OUT, 2, 32)), (0, 2, 1)))
            halves = tl.permute(tl.reshape(columns, (2, 32, BLOCK_ROWS)), (1, 2, 0))
            low_columns, high_columns = tl.split(halves)
            place = scales + step * 2 * out_features + n
            low_scale = tl.load(place, mask=n < out_features, other=0.0)
            high_scale = tl.load(place + out_features, mask=n < out_features, other=0.0)
            total += tl.dot(low, low_columns) * low_scale.to(tl.float32)[:, None]
            total += tl.dot(high, high_columns) * high_scale.to(tl.float32)[:, None]
    inside = (n < out_features)[:, None] & (m < end_row)[None, :]
    place = m[None, :] * out_features + n[:, None]
    if SPLITS == 1:
        _finish(total, bias, result, place, inside, n, out_features, HAS_BIAS)
    else:
        tl.store(workspace + split * rows * out_features + place, total, mask=inside)
        # All threads must have written their sums before the arrival is counted.
        tl.debug_barrier()
        counter = arrivals + tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
        arrived = tl.atomic_add(counter, 1, sem="acq_rel")
        if arrived == SPLITS - 1:
            tl.store(counter, 0)
            total = tl.full((BLOCK_OUT, BLOCK_ROWS), 0.0, tl.float32)
            for other in tl.static_range(SPLITS):
                source = workspace + other * rows * out_features + place
                total += tl.load(source, mask=inside, other=0.0, cache_modifier=".cg")
            _finish(total, bias, result, place, inside, n, out_features, HAS_BIAS)


@triton.jit
def _load_pointer(address, like):
    """Load a pointer of the same type as another; tensors start at multiples of 16 bytes."""
    return tl.multiple_of(tl.load(address).to(like.dtype), 16)


@triton.jit
def _finish(total, bias, result, place, inside, n, out_features, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < out_features, other=0.0).to(tl.float32)[:, None]
    tl.store(result + place, total.to(result.dtype.element_ty), mask=inside)


@triton.jit
def dequantize_kernel(
    codes,
    zeros,
    scales,
    order,
    result,
    in_features,
    out_features,
    BITS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    HAS_ORDER: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
):
    """Write result [out, in] = the dequantized weight, for BLOCK_OUT channels and 64 inputs."""
    step = tl.program_id(0)
    first = tl.program_id(1) * BLOCK_OUT
    n = first + tl.arange(0, BLOCK_OUT)
    k = step * 64 + tl.arange(0, 64)
    weight = _load_weight(
        codes,
        zeros,
        step,
        first,
        out_features,
        GROUP_SIZE,
        BLOCK_OUT,
        BITS,
        HAS_ZEROS,
        False,
        tl.float32,
    )
    inside = (n < out_features)[:, None]
    place = scales + (k // GROUP_SIZE)[None, :] * out_features + n[:, None]
    weight *= tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if HAS_ORDER:
        k = tl.load(order + k)
    place = result + n[:, None] * in_features + k[None, :]
    tl.store(place, weight.to(result.dtype.element_ty), mask=inside)
