"""The Triton kernels in Triton's interpreter, against float64.

The interpreter has no inline assembly, which is emulated, and cannot multiply bfloat16: the kernels
run here in float16, and test_gpu_machine_code.py checks both as compiled.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.helpers.interpreted import interpret
from tests.helpers.packed import make_linear
from tests.helpers.ptx_emulation import run_ptx

from halfbyte.kernels import cuda_linear, triton_linear
from halfbyte.kernels.cuda_linear import CudaLinear
from halfbyte.kernels.fragments import prepare_fragments
from halfbyte.kernels.triton_configs import TritonConfig
from halfbyte.kernels.triton_linear import TritonLinear, dequantize_fragments, multiply

pytest.importorskip("triton")

NAME = "halfbyte.kernels.triton_kernels"


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Reload the kernels with Triton's interpreter switched on."""
    interpret(monkeypatch, NAME)


def prepared(**layer):
    linear = make_linear(**{"in_features": 256, "out_features": 96, "dtype": torch.float16} | layer)
    return linear, replace(linear.stored, weight=prepare_fragments(linear.stored, linear.spec))


def check(linear, operands, config, rows, with_bias=True, fast=False):
    x = torch.randn(rows, linear.spec.in_features).half()
    bias = torch.randn(linear.spec.out_features).half() if with_bias else None
    found = multiply(x, operands, bias, linear.spec, config, fast=fast)
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


@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("tiles", [1, 2, 3, 100])
@pytest.mark.parametrize("group_size", [32, 128, 256, 384])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, True)])
def test_gradient_is_that_of_the_dense_weight(
    monkeypatch, in_torch, tiles, group_size, symmetric, act_order
):
    """Slices of whole groups, of parts of one, and a ragged last group; Triton or torch alone."""
    monkeypatch.setattr(triton_linear, "GRADIENT_WEIGHTS", tiles * 64 * 96)
    linear, operands = prepared(
        in_features=384, group_size=group_size, symmetric=symmetric, act_order=act_order
    )
    kernel = CudaLinear() if in_torch else TritonLinear()
    if in_torch:
        monkeypatch.setattr(cuda_linear, "find_triton_obstacle", lambda: "none here")
    gradient = torch.randn(2, 7, 96).half()
    found = kernel.input_gradient(gradient, operands, linear.spec)
    assert found.dtype == torch.float16
    exact = gradient.double() @ linear.weight
    size = gradient.double().abs() @ linear.weight.abs()
    # One rounding of each weight and of the result, and fp32 sums.
    assert ((found.double() - exact).abs() <= 2.5 * 2**-11 * size + 1e-6).all()


def test_gradient_makes_no_more_of_the_weight_than_it_says(monkeypatch):
    monkeypatch.setattr(triton_linear, "GRADIENT_WEIGHTS", 2 * 64 * 96)
    linear, operands = prepared(in_features=384)
    sizes = []

    class Watched(TritonLinear):
        def dequantize(self, operands, spec, dtype):
            weight = super().dequantize(operands, spec, dtype)
            sizes.append(weight.numel())
            return weight

    Watched().input_gradient(torch.randn(3, 96).half(), operands, linear.spec)
    assert sizes == [2 * 64 * 96] * 3


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


@pytest.fixture
def assembly(monkeypatch):
    """Inline assembly in the interpreter; gives the texts that were run."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    texts = set()

    class Results:
        def __init__(self, handles):
            self.handles = handles

        def get_result(self, index):
            return self.handles[index]

    def create_inline_asm(self, text, constraints, values, types, is_pure, pack):
        # More would tie the result to the order that a compiler gives the elements.
        assert pack == 1
        texts.add(text)
        found = run_ptx(text, [value.data for value in values], len(types))
        return Results(
            [
                TensorHandle(one.view(np.int16), values_type)
                for one, values_type in zip(found, map(find_scalar, types), strict=True)
            ]
        )

    def find_scalar(kind):
        return getattr(kind, "scalar", kind)

    monkeypatch.setattr(InterpreterBuilder, "create_inline_asm", create_inline_asm, raising=False)
    return texts


@pytest.mark.parametrize(
    ("group_size", "symmetric"),
    [(32, True), (64, True), (64, False), (128, True), (128, False), (256, False)],
)
def test_assembly_takes_the_same_codes_apart(assembly, group_size, symmetric):
    linear, operands = prepared(in_features=320, group_size=group_size, symmetric=symmetric)
    for config in (TritonConfig(64, 16, 1, 4, 2), TritonConfig(32, 16, 2, 4, 2)):
        check(linear, operands, config, 5, fast=True)
    assert len(assembly) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_assembly_gives_code_minus_zero_for_every_code_and_zero(dtype):
    kernels = sys.modules[NAME]
    half = dtype == torch.float16
    text = (kernels.ASM_FP16 if half else kernels.ASM_BF16).value
    negated = (kernels.NEGATED_FP16 if half else kernels.NEGATED_BF16).value
    codes = np.random.default_rng(0).integers(0, 16, (8, 4096))
    places = np.array([0, 16, 4, 20, 8, 24, 12, 28])
    words = (codes << places[:, None]).sum(0).astype(np.uint32)
    for zero in range(17):
        offset = np.uint32((zero * 0x00010001 | negated) & 0xFFFFFFFF)
        found = run_ptx(text, [words, np.broadcast_to(offset, words.shape)], 8)
        numbers = torch.from_numpy(np.stack(found).view(np.int16)).view(dtype)
        assert torch.equal(numbers.long(), torch.from_numpy(codes) - zero)
