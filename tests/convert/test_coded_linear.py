from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfbyte.convert.coded_linear import CodedLinear, fits_half
from halfbyte.packing import pack_rows, unpack_rows


def make(bits=4, out=8, inputs=96, group=32, symmetric=False, act_order=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-inputs // group)
    codes = torch.randint(0, 2**bits, (out, inputs), generator=generator).to(torch.uint8)
    zeros = torch.randint(0, 2**bits, (out, groups), generator=generator).to(torch.int16)
    if symmetric:
        zeros.fill_(2 ** (bits - 1))
    g_idx = (torch.arange(inputs) // group).to(torch.int32)
    if act_order:
        g_idx = g_idx[torch.randperm(inputs, generator=generator)]
    return CodedLinear(
        words=pack_rows(codes, bits),
        scales=torch.randn(out, groups, generator=generator).to(torch.float16),
        zeros=zeros,
        bits=bits,
        group_size=group,
        g_idx=g_idx if act_order else None,
        bias=torch.randn(out, generator=generator),
    )


def naive(linear):
    """Compute the weight by the formula, one value at a time, in Python floats."""
    codes, groups = linear.codes().tolist(), linear.groups().tolist()
    scales, zeros = linear.scales.tolist(), linear.zeros.tolist()
    return torch.tensor(
        [
            [scales[o][g] * (code - zeros[o][g]) for code, g in zip(row, groups, strict=True)]
            for o, row in enumerate(codes)
        ],
        dtype=torch.float64,
    )


@given(st.sampled_from([2, 3, 4, 5, 6, 8]), st.integers(1, 5), st.integers(1, 4), st.integers(0, 9))
def test_rows_pack_and_unpack(bits, rows, runs, seed):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 32 * runs), generator=generator).to(torch.uint8)
    words = pack_rows(codes, bits)
    assert words.shape == (rows, bits * runs)
    assert words.is_contiguous()
    assert torch.equal(unpack_rows(words, bits), codes)
    stream = [sum(int(c) << (bits * i) for i, c in enumerate(row)) for row in codes]
    expected = [[(s >> (32 * i)) % 2**32 for i in range(bits * runs)] for s in stream]
    assert [[w % 2**32 for w in row] for row in words.tolist()] == expected


def test_rows_refuse_codes_that_are_too_wide():
    with pytest.raises(Exception, match="codes up to 16 in 4 bits"):
        pack_rows(torch.full((1, 32), 16, dtype=torch.uint8), 4)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_dequantize_is_the_formula(bits, act_order):
    linear = make(bits=bits, act_order=act_order)
    assert torch.equal(linear.dequantize().double(), naive(linear))


@pytest.mark.parametrize(("group", "size"), [(32, 16), (96, 32), (64, 32), (32, 32)])
def test_split_groups_keep_the_weight(group, size):
    linear = make(group=group)
    split = linear.split_groups(size)
    assert split.scales.shape == (8, 96 // size)
    assert torch.equal(split.dequantize(), linear.dequantize())


@pytest.mark.parametrize(
    ("inputs", "group", "even"), [(96, 32, 32), (96, 64, 32), (96, 96, 96), (576, 128, 64)]
)
def test_even_group_divides_every_group(inputs, group, even):
    assert make(inputs=inputs, group=group).describe().even_group == even


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("wide", [4, 8])
def test_wider_codes_keep_the_weight(bits, wide):
    linear = make(bits=bits)
    widened = linear.widen(wide)
    assert widened.bits == wide
    assert torch.equal(widened.dequantize(), linear.dequantize())


@pytest.mark.parametrize(
    ("bits", "symmetric", "fits"),
    [(2, False, 4), (3, False, 4), (4, True, 4), (4, False, 8), (8, True, 8), (8, False, None)],
)
@pytest.mark.parametrize("act_order", [False, True])
def test_recentered_codes_keep_the_weight_if_in_range(bits, symmetric, fits, act_order):
    linear = make(bits=bits, symmetric=symmetric, act_order=act_order)
    spec = linear.describe()
    assert next((wide for wide in (4, 8) if spec.can_recenter(wide)), None) == fits
    if fits is not None:
        moved = linear.recenter(fits)
        assert moved.describe().is_symmetric
        assert torch.equal(moved.dequantize(), linear.dequantize())


def test_columns_sorted_by_group_give_the_reordered_weight():
    linear = make(act_order=True)
    order = torch.argsort(linear.groups(), stable=True)
    assert torch.equal(linear.take_columns(order).dequantize(), linear.dequantize()[:, order])


def test_reordered_rows_include_scales_zeros_and_bias():
    linear = make()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    moved = linear.take_rows(order)
    assert torch.equal(moved.dequantize(), linear.dequantize()[order])
    assert torch.equal(moved.bias, linear.bias[order])


def test_spec_says_whether_fp16_represents_the_grid():
    linear = make(symmetric=True)
    assert linear.describe().minima_fit_half
    assert not make(seed=3).describe().minima_fit_half
    wide = replace(linear, scales=torch.full((8, 3), 1 + 2**-12))
    assert not wide.describe().scales_fit_half
    assert fits_half(torch.tensor([0.5, 65504.0]))
    assert not fits_half(torch.tensor([65536.0]))
    assert not fits_half(torch.tensor([1e-9], dtype=torch.bfloat16))
