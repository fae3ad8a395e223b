"""Repacking compared with moving codes one by one, in torch and compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from halfbyte.convert.awq import pack_outputs
from halfbyte.convert.bit_order import expand, from_awq, from_blocks, to_awq, to_blocks, transpose
from halfbyte.packing import pack_rows

pytestmark = pytest.mark.usefixtures("backend")

SHAPES = [(1, 1), (1, 40), (16, 16), (17, 5), (96, 33), (160, 48)]


def draw(*shape, high=2**32):
    return torch.from_numpy(np.random.default_rng(0).integers(0, high, shape, dtype=np.uint32))


def codes_of(rows, columns, bits):
    return draw(rows, columns, high=2**bits).to(torch.uint8)


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matrix_is_transposed(rows, columns):
    words = draw(rows, columns).view(torch.int32)
    turned = transpose(words)
    assert turned.is_contiguous()
    assert turned.tolist() == [list(column) for column in zip(*words.tolist(), strict=True)]
    assert torch.equal(transpose(turned), words)


def test_transposed_view_is_not_copied():
    words = draw(40, 24).view(torch.int32)
    assert transpose(words.t()).data_ptr() == words.data_ptr()


@pytest.mark.parametrize(("out", "inputs"), [(8, 8), (16, 40), (40, 8), (96, 4096), (4096, 64)])
def test_words_are_repacked_for_awq_and_back(out, inputs):
    codes = codes_of(out, inputs, 4)
    words = pack_rows(codes, 4).t().contiguous()
    turned = to_awq(words)
    assert torch.equal(turned, pack_outputs(codes))
    assert torch.equal(from_awq(turned), words)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head", [2, 4])
@pytest.mark.parametrize(
    ("rows", "blocks", "groups"), [(1, 1, 1), (3, 6, 2), (5, 7, 7), (64, 8, 1)]
)
def test_blocks_contain_grid_and_codes(bits, head, rows, blocks, groups):
    codes = codes_of(rows, blocks * 32, bits)
    grid = codes_of(rows, groups * head, 8).view(rows, groups, head)
    made = to_blocks(pack_rows(codes, bits), grid, bits)
    assert made.shape == (rows, blocks, head + 4 * bits)
    for row in range(rows):
        for block in range(blocks):
            found = bytes(made[row, block].tolist())
            own = codes[row, block * 32 : block * 32 + 32].tolist()
            if bits == 8:
                expected = bytes(code ^ 128 for code in own)
            else:
                expected = bytes(own[j] | own[j + 16] << 4 for j in range(16))
            group = grid[row, block * groups // blocks]
            assert found == bytes(group.tolist()) + expected
    assert torch.equal(from_blocks(made, head, bits), pack_rows(codes, bits))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group", [32, 40, 96, 192])
def test_dequantized_codes_are_rounded_once(bits, dtype, scale_dtype, group):
    generator = torch.Generator().manual_seed(0)
    codes, groups = codes_of(6, 192, bits), -(-192 // group)
    scales = torch.randn(6, groups, generator=generator)
    # From where float16 has subnormal numbers only up to where it overflows.
    scales[:, 0] = torch.tensor([1e-8, 1e-6, 3e-5, -0.0, 6.5e4, -2e4])
    scales = scales.to(scale_dtype)
    zeros = torch.randint(0, 2**bits, (6, groups), generator=generator).to(torch.int16)
    held = expand(pack_rows(codes, bits), scales, zeros, bits=bits, group_size=group, dtype=dtype)
    own = torch.arange(192) // group
    # Products of 9 and 24 bits are exact in float64, and rounded to float32 first, as asked.
    exact = (codes.double() - zeros[:, own].double()) * scales[:, own].double()
    assert torch.equal(held, exact.float().to(dtype))
    assert torch.equal(held.signbit(), exact.signbit())
