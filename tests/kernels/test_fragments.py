from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.kernels.fragments import (
    dequantize_in_torch,
    find_layout_mismatch,
    find_order,
    pack_fragments,
    prepare_fragments,
    restore_fragments,
    unpack_fragments,
)

BITS = [2, 3, 4, 8]


def find_place(bits, out, k):
    """Word and bit of a tile's code, as the docstring of fragments.py has them."""
    h, g = divmod(out, 8)
    s, rest = divmod(k, 16)
    u, rest = divmod(rest, 8)
    t, p = divmod(rest, 2)
    lane = 4 * g + t
    if bits == 4:
        return lane * 4 + 2 * (s // 2) + h, 4 * (2 * (s % 2) + u) + 16 * p
    if bits == 8:
        return (s // 2) * 128 + lane * 4 + 2 * (s % 2) + h, 8 * u + 16 * p
    return lane * 2 + h, 2 * (2 * s + u) + 16 * p


def emulate_pack(codes, bits):
    """The layout word by word in numpy, for codes [in, out]."""
    in_features, out_features = codes.shape
    words = np.zeros((in_features // 64, out_features // 16, 32 * bits), dtype=np.uint32)
    for k in range(in_features):
        for out in range(out_features):
            tile = words[k // 64, out // 16]
            code = np.uint32(codes[k, out])
            if bits == 3:
                word, bit = find_place(2, out % 16, k % 64)
                tile[word] |= (code & np.uint32(3)) << np.uint32(bit)
                h, s, u = out % 16 // 8, k % 64 // 16, k % 16 // 8
                lane = 4 * (out % 8) + k % 8 // 2
                bit = 8 * h + 2 * s + u + 16 * (k % 2)
                tile[64 + lane] |= (code >> np.uint32(2)) << np.uint32(bit)
            else:
                word, bit = find_place(bits, out % 16, k % 64)
                tile[word] |= code << np.uint32(bit)
    return words.view(np.int32)


@pytest.mark.parametrize("bits", BITS)
def test_words_are_those_of_the_layout_bit_for_bit(bits):
    codes = torch.randint(0, 2**bits, (128, 48), dtype=torch.uint8)
    expected = torch.from_numpy(emulate_pack(codes.numpy(), bits))
    assert torch.equal(pack_fragments(codes, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_packing_loses_nothing_and_adds_nothing(bits):
    codes = torch.randint(0, 2**bits, (192, 80), dtype=torch.uint8)
    words = pack_fragments(codes, bits)
    assert words.numel() * 32 == codes.numel() * bits
    assert torch.equal(unpack_fragments(words, bits), codes)


def test_known_word_of_the_first_lane():
    # Lane 0, word 0: channel 0, inputs 0, 8, 16, 24 in the low half, their right neighbours above.
    codes = torch.zeros(64, 16, dtype=torch.uint8)
    for place, k in enumerate((0, 8, 16, 24, 1, 9, 17, 25)):
        codes[k, 0] = place + 1
    assert int(pack_fragments(codes, 4)[0, 0, 0]) & 0xFFFFFFFF == 0x87654321


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("zero_offset", [0, 1])
@pytest.mark.parametrize("act_order", [False, True])
def test_a_layer_gives_back_its_stored_bits(bits, zero_offset, act_order):
    linear = make_linear(
        bits=bits,
        in_features=192,
        out_features=96,
        symmetric=False,
        zero_offset=zero_offset,
        act_order=act_order,
        dtype=torch.float16,
    )
    operands = replace(linear.stored, weight=prepare_fragments(linear.stored, linear.spec))
    assert torch.equal(restore_fragments(operands, linear.spec), linear.stored.weight[0])
    order = find_order(operands, linear.spec)
    rows = torch.arange(192) if order is None else order.long()
    assert torch.equal(linear.g_idx[rows], torch.arange(192, dtype=torch.int32) // 32)
    assert torch.equal(dequantize_in_torch(operands, linear.spec, torch.float64), linear.weight)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float32}, "computes in float16 and bfloat16, not float32"),
        ({"in_features": 96}, "needs in_features a multiple of 64, not 96"),
        ({"out_features": 40}, "needs out_features a multiple of 16, not 40"),
        ({"group_size": 16}, "supports group_size 32 and multiples of 64, not 16"),
        ({"group_size": 96}, "supports group_size 32 and multiples of 64, not 96"),
    ],
)
def test_says_which_layers_do_not_fit(change, reason):
    spec = make_linear(dtype=torch.float16, in_features=192).spec
    assert find_layout_mismatch(spec) is None
    assert find_layout_mismatch(replace(spec, **change)) == reason


def test_one_group_for_all_and_a_ragged_last_group_fit():
    spec = make_linear(dtype=torch.float16, in_features=192).spec
    assert find_layout_mismatch(replace(spec, group_size=192)) is None
    assert find_layout_mismatch(replace(spec, group_size=128)) is None
