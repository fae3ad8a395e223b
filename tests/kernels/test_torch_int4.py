from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.kernels import torch_int4
from halfbyte.kernels.contract import Operands
from halfbyte.kernels.torch_int4 import TorchInt4

BF16 = {"out_features": 128, "dtype": torch.bfloat16}


@pytest.fixture
def kernel():
    kernel = TorchInt4()
    reason = kernel.find_obstacle()
    if reason is not None:
        pytest.skip(reason)
    return kernel


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"bits": 3}, "supports 4 bits, not 3"),
        ({"dtype": torch.float16}, "fast only in bfloat16; torch runs float16 in a plain loop"),
        ({"group_size": 16}, "supports group_size 32, 64, 128, 256, not 16"),
        ({"group_size": 32, "in_features": 80}, "group_size 32 does not divide 80 inputs"),
        ({"device_type": "cuda"}, "runs on cpu, not on cuda"),
    ],
)
def test_says_why_it_cannot_run_a_layer(kernel, change, reason):
    spec = replace(make_linear(**BF16).spec, **change)
    assert kernel.find_mismatch(spec) == reason


def test_needs_whole_blocks_of_output_channels(kernel):
    spec = replace(make_linear(**BF16).spec, out_features=40)
    assert kernel.find_mismatch(spec).startswith("needs out_features a multiple of ")
    assert kernel.find_mismatch(replace(spec, out_features=192)) is None


@pytest.mark.parametrize("rows", [1, torch_int4.ROWS_LIMIT - 1, torch_int4.ROWS_LIMIT])
@pytest.mark.parametrize("act_order", [False, True])
def test_few_rows_and_many_agree_within_the_bound(kernel, rows, act_order):
    linear = make_linear(symmetric=False, act_order=act_order, **BF16)
    packed = kernel.prepare(linear.stored, linear.spec)
    operands = replace(linear.stored, weight=packed)
    x = torch.randn(rows, 128).bfloat16()
    found = kernel.apply(x, operands, None, linear.spec).double()
    exact = x.double() @ linear.weight.t()
    size = x.double().abs() @ linear.weight.abs().t()
    assert ((found - exact).abs() <= kernel.error_bound(linear.spec) * size).all()


def test_stands_aside_where_torch_has_no_such_op(monkeypatch):
    torch_int4._find_layout.cache_clear()
    monkeypatch.setattr(torch_int4.torch, "ops", _NoOps())
    reason = TorchInt4().find_obstacle()
    torch_int4._find_layout.cache_clear()
    assert reason == f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"


def test_stands_aside_where_the_layout_is_unknown(monkeypatch):
    torch_int4._find_layout.cache_clear()
    monkeypatch.setattr(torch_int4, "_pack", lambda codes: torch.zeros(128, 4, dtype=torch.uint8))
    reason = TorchInt4().find_obstacle()
    torch_int4._find_layout.cache_clear()
    assert reason is not None
    assert "packs int4 in an unknown layout" in reason


@pytest.mark.parametrize("halves", [True, False])
@pytest.mark.parametrize("block", [64, 32, 16])
def test_unpacks_both_orders_of_a_block(block, halves):
    codes = torch.randint(0, 16, (128, 6), dtype=torch.uint8)
    rows = torch.arange(block)
    order = rows.view(2, -1).t().reshape(-1) if halves else rows
    # [block number, in, position in the block], two positions to a byte, the first one low.
    nibbles = codes.view(-1, block, 6)[:, order].transpose(1, 2).reshape(-1, 2)
    packed = (nibbles[:, 0] | nibbles[:, 1] << 4).view(128, 3)
    assert torch.equal(torch_int4._unpack_as(packed, block, halves), codes.t())


def test_an_empty_batch_is_an_empty_result(kernel):
    linear = make_linear(**BF16)
    operands = Operands(
        weight=kernel.prepare(linear.stored, linear.spec),
        qzeros=linear.stored.qzeros,
        scales=linear.stored.scales,
        g_idx=None,
    )
    x = torch.empty(0, 128, dtype=torch.bfloat16)
    assert kernel.apply(x, operands, None, linear.spec).shape == (0, 128)


class _NoOps:
    class aten:  # noqa: N801 - torch's name
        pass
