"""The Triton programs in Triton's interpreter, against float64.

The interpreter has no inline assembly and multiplies no bfloat16: the plain form in float16 runs
here, the other is held to its machine code in test_gpu_machine_code.py.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.kernels import triton_linear
from halfbyte.kernels.fragments import prepare_fragments
from halfbyte.kernels.triton_configs import TritonConfig
from halfbyte.kernels.triton_linear import TritonLinear, dequantize_fragments, multiply

pytest.importorskip("triton")

SOURCE = Path(triton_linear.__file__).with_name("triton_programs.py")
NAME = "halfbyte.kernels.triton_programs"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """The programs, made anew while Triton interprets."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    spec = importlib.util.spec_from_file_location(NAME, SOURCE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, NAME, module)
    spec.loader.exec_module(module)


def prepared(**layer):
    linear = make_linear(**{"in_features": 256, "out_features": 96, "dtype": torch.float16} | layer)
    return linear, replace(linear.stored, weight=prepare_fragments(linear.stored, linear.spec))


def check(linear, operands, config, rows, with_bias=True):
    x = torch.randn(rows, linear.spec.in_features).half()
    bias = torch.randn(linear.spec.out_features).half() if with_bias else None
    found = multiply(x, operands, bias, linear.spec, config, fast=False)
    exact, size = x.double() @ linear.weight.t(), x.double().abs() @ linear.weight.abs().t()
    if with_bias:
        exact, size = exact + bias.double(), size + bias.double().abs()
    bound = TritonLinear().error_bound(linear.spec)
    assert found.dtype == torch.float16
    assert ((found.double() - exact).abs() <= bound * size).all()
    return found


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128, 256])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, False), (False, True)])
def test_product_and_weight_match_float64(bits, group_size, symmetric, act_order):
    linear, operands = prepared(
        bits=bits, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    weight = dequantize_fragments(operands, linear.spec, torch.float64)
    assert torch.equal(weight, linear.weight)
    check(linear, operands, TritonConfig(64, 16, 1, 4, 2), 5)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 33])
@pytest.mark.parametrize("with_bias", [False, True])
def test_ragged_rows_and_channels(rows, with_bias):
    # 96 channels are one block of 64 and half a block.
    linear, operands = prepared(symmetric=False)
    check(linear, operands, TritonConfig(64, 16, 1, 4, 2), rows, with_bias)


@pytest.mark.parametrize("splits", [2, 3, 4])
@pytest.mark.parametrize("group_size", [32, 128])
def test_split_inputs_give_the_same_bits_each_time(splits, group_size):
    # Five steps of 64 inputs do not divide evenly.
    linear, operands = prepared(in_features=320, group_size=group_size, act_order=True)
    config = TritonConfig(32, 16, splits, 4, 2)
    torch.manual_seed(0)
    first = check(linear, operands, config, 9)
    torch.manual_seed(0)
    # The counters are 0 again, or the last to arrive would not know itself.
    assert torch.equal(check(linear, operands, config, 9), first)


def test_ragged_last_group():
    linear, operands = prepared(in_features=192, group_size=128, symmetric=False)
    check(linear, operands, TritonConfig(64, 16, 2, 4, 2), 3)
