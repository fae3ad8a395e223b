"""Hints restore the original groups; no hint, valid or not, changes a weight."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfbyte.convert.coded_linear import CodedLinear
from halfbyte.convert.hints import read_hints, restore_groups
from halfbyte.errors import CheckpointError
from halfbyte.packing import pack_rows


def coded(seed: int, bits: int, group_size: int, *, symmetric: bool, same: int) -> CodedLinear:
    """Make a linear with 192 inputs in which each `same` neighboring groups are equal."""
    dice = torch.Generator().manual_seed(seed)
    groups = -(-192 // group_size)
    codes = torch.randint(0, 2**bits, (8, 192), generator=dice)
    if seed % 2:
        codes = codes.clamp(2 ** (bits - 1) - 2, 2 ** (bits - 1) + 1)  # what 2 bits could hold
    scales = torch.rand(8, -(-groups // same), generator=dice).repeat_interleave(same, 1)
    zeros = torch.full((8, groups), 2 ** (bits - 1))
    if not symmetric:
        zeros = torch.randint(0, 2**bits, (8, -(-groups // same)), generator=dice)
        zeros = zeros.repeat_interleave(same, 1)[:, :groups]
    return CodedLinear(
        words=pack_rows(codes.to(torch.uint8), bits),
        scales=scales[:, :groups].half(),
        zeros=zeros.to(torch.int16),
        bits=bits,
        group_size=group_size,
        g_idx=None,
        bias=None,
    )


@settings(max_examples=300, deadline=None)
@given(
    seed=st.integers(0, 999),
    bits=st.sampled_from([4, 8]),
    group_size=st.sampled_from([32, 64, 96]),
    symmetric=st.booleans(),
    same=st.integers(1, 4),
    hint=st.tuples(st.sampled_from([2, 3, 4, 8]), st.integers(1, 10).map(lambda n: 32 * n)),
)
def test_hints_never_change_a_weight(seed, bits, group_size, symmetric, same, hint):
    linear = coded(seed, bits, group_size, symmetric=symmetric, same=same)
    found = restore_groups(linear, *hint)
    assert torch.equal(found.dequantize(), linear.dequantize())


def test_valid_hints_are_applied():
    linear = coded(1, 8, 32, symmetric=True, same=4)
    found = restore_groups(linear, 2, 128)
    assert (found.bits, found.group_size, found.scales.shape[1]) == (2, 128, 2)
    assert torch.equal(found.dequantize(), linear.dequantize())


def test_unknown_hints_are_ignored_and_damaged_ones_refused():
    text = '{"a": [4, 128], "b": [5, 128], "c": [4, 48], "d": "x", "e": [4, true], "f": [4, 1e9]}'
    assert read_hints(text, "file") == {"a": (4, 128)}
    assert read_hints(None, "file") == {}
    with pytest.raises(CheckpointError, match=r"halfbyte\.groups of file"):
        read_hints("{", "file")
