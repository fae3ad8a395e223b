from __future__ import annotations

import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.kernels import torch_reference
from halfbyte.kernels.torch_reference import TorchReference, dequantize_weight


def test_known_words_give_known_numbers():
    # Codes 0..7 of inputs 0..7 in one word; zero 8 stored as 7 (v1); scale one half.
    weight = dequantize_weight(
        torch.full((1, 8), 0x76543210, dtype=torch.int32),
        torch.tensor([[0x77777777]], dtype=torch.int32),
        torch.full((1, 8), 0.5, dtype=torch.float16),
        None,
        bits=4,
        zero_offset=1,
        group_size=8,
        dtype=torch.float32,
    )
    assert weight.tolist() == [[-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]] * 8


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 128, 80])
@pytest.mark.parametrize("grid", ["symmetric", "v1", "v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_dequantizes_exactly(bits, group_size, grid, act_order):
    linear = make_linear(
        bits=bits,
        group_size=group_size,
        symmetric=grid == "symmetric",
        zero_offset=0 if grid == "v2" else 1,
        act_order=act_order,
    )
    weight = TorchReference().dequantize(linear.stored, linear.spec, torch.float64)
    assert torch.equal(weight, linear.weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_each_weight_is_rounded_once(dtype, scale_dtype):
    linear = make_linear(bits=8, symmetric=False, scale_dtype=scale_dtype)
    weight = TorchReference().dequantize(linear.stored, linear.spec, dtype)
    assert torch.equal(weight, linear.weight.to(dtype))


def test_tiles_of_output_channels_give_what_one_piece_gives(monkeypatch):
    linear = make_linear(bits=3, in_features=64, out_features=160, symmetric=False)
    x, bias = torch.randn(5, 64), torch.randn(160)
    whole = TorchReference().apply(x, linear.stored, bias, linear.spec)
    monkeypatch.setattr(torch_reference, "TILE_WEIGHTS", 64 * 64)
    tiled = TorchReference().apply(x, linear.stored, bias, linear.spec)
    torch.testing.assert_close(tiled, whole, rtol=1e-6, atol=1e-6)
