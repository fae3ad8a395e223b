"""The contract test of all registered kernels; registering a new kernel is enough to test it."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from tests.helpers.packed import RandomLinear, make_linear

from halfbyte.errors import ConfigError
from halfbyte.kernels import cpu_native, torch_int4, torch_reference
from halfbyte.kernels.op import dequantize, quantized_linear
from halfbyte.kernels.registry import KERNELS, find_kernel, find_rejection

NAMES = [entry.name for entry in KERNELS]
SHAPES = [
    (64, 64, 32),
    (128, 192, 64),
    (256, 64, 128),
    (96, 64, 64),
    (160, 96, 80),
    (512, 128, 256),
]
"""in, out, group size; the fourth has a ragged last group."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def fitting_cases():
    """Every kernel with every layer that it says it can run."""
    for name, bits, dtype, shape in itertools.product(NAMES, (2, 3, 4, 8), DTYPES, SHAPES):
        sizes = dict(zip(("in_features", "out_features", "group_size"), shape, strict=True))
        layer = {"bits": bits, "dtype": dtype, **sizes}
        if find_rejection(find_kernel(name), make_linear(**layer).spec) is None:
            kind = str(dtype).removeprefix("torch.")
            yield pytest.param(name, layer, id=f"{name}-{bits}-{kind}-{'x'.join(map(str, shape))}")


def prepared(name: str, linear: RandomLinear):
    """The kernel and its operands, or skip."""
    kernel = find_kernel(name)
    reason = find_rejection(kernel, linear.spec)
    if reason is not None:
        pytest.skip(reason)
    operands = replace(linear.stored, weight=kernel.prepare(linear.stored, linear.spec))
    return kernel, operands


@pytest.mark.parametrize(("name", "layer"), list(fitting_cases()))
def test_kernel_computes_the_product_within_its_bound(name, layer):
    in_features, out_features, dtype = (
        layer["in_features"],
        layer["out_features"],
        layer["dtype"],
    )
    for symmetric, act_order in ((True, False), (False, False), (False, True)):
        linear = make_linear(symmetric=symmetric, act_order=act_order, **layer)
        kernel, operands = prepared(name, linear)
        bound = kernel.error_bound(linear.spec)
        for batch in ((1,), (3, 7), (70,), (0,)):
            x = torch.randn(*batch, in_features).to(dtype)
            bias = torch.randn(out_features).to(dtype)
            found = quantized_linear(x, operands, bias, linear.spec, kernel)
            exact = x.double() @ linear.weight.t() + bias.double()
            size = x.double().abs() @ linear.weight.abs().t() + bias.double().abs()
            assert found.dtype == dtype
            assert found.shape == exact.shape
            assert ((found.double() - exact).abs() <= bound * size).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act_order", [False, True])
def test_no_rows_give_no_rows_where_nothing_ran_before(name, dtype, act_order):
    linear = make_linear(act_order=act_order, dtype=dtype)
    kernel, operands = prepared(name, linear)
    x = torch.empty(2, 0, 128, dtype=dtype)
    # Scratch memory belongs to a thread: one that has computed something would hide its lack.
    with ThreadPoolExecutor(1) as fresh:
        found = fresh.submit(quantized_linear, x, operands, None, linear.spec, kernel).result()
    assert found.shape == (2, 0, 64)
    gradient = kernel.input_gradient(found, operands, linear.spec)
    assert gradient.shape == (2, 0, 128)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_kernel_gives_back_the_stored_bits_and_exact_numbers(name, act_order, zero_offset):
    linear = make_linear(
        symmetric=False, act_order=act_order, zero_offset=zero_offset, dtype=torch.bfloat16
    )
    kernel, operands = prepared(name, linear)
    restored = kernel.restore(operands, linear.spec)
    assert restored.dtype == torch.int32
    assert torch.equal(restored, linear.stored.weight[0])
    assert torch.equal(kernel.dequantize(operands, linear.spec, torch.float64), linear.weight)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_torch_accepts_the_op(name, act_order, with_bias):
    linear = make_linear(act_order=act_order, dtype=torch.bfloat16)
    kernel, operands = prepared(name, linear)
    x = torch.randn(3, 128).bfloat16().requires_grad_()
    bias = torch.randn(64).bfloat16().requires_grad_() if with_bias else None
    shared = (list(operands.weight), operands.qzeros, operands.scales, operands.g_idx)
    numbers = (4, 32, 128, 64, True, 1)
    torch.library.opcheck(torch.ops.halfbyte.linear.default, (x, *shared, bias, name, *numbers))
    torch.library.opcheck(
        torch.ops.halfbyte.dequantize.default, (*shared, name, *numbers, torch.float32)
    )
    torch.library.opcheck(
        torch.ops.halfbyte.input_gradient.default,
        (torch.randn(3, 64).bfloat16(), *shared, name, *numbers),
    )
    assert kernel.name == name


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_dense_layer(name):
    linear = make_linear(dtype=torch.bfloat16, symmetric=False)
    kernel, operands = prepared(name, linear)
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    bias = torch.randn(64).bfloat16().requires_grad_()
    gradient = torch.randn(5, 64).bfloat16()
    quantized_linear(x, operands, bias, linear.spec, kernel).backward(gradient)
    exact = gradient.double() @ linear.weight
    size = gradient.double().abs() @ linear.weight.abs()
    assert ((x.grad.double() - exact).abs() <= 0.02 * size).all()
    torch.testing.assert_close(bias.grad, gradient.sum(0))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    "grid",
    [
        {"symmetric": False},
        {"symmetric": False, "act_order": True},
        {"in_features": 160, "group_size": 64},
        {"in_features": 288, "group_size": 48},
        {"in_features": 192, "group_size": 96},
    ],
)
def test_gradient_by_tiles_is_that_of_the_dense_layer_in_float64(bits, grid, monkeypatch):
    monkeypatch.setattr(torch_reference, "TILE_WEIGHTS", 64 * 32)
    linear = make_linear(bits=bits, dtype=torch.float64, **grid)
    kernel, operands = prepared("torch_reference", linear)
    x = torch.randn(2, 5, linear.spec.in_features, dtype=torch.float64, requires_grad=True)
    gradient = torch.randn(2, 5, 64, dtype=torch.float64)
    quantized_linear(x, operands, None, linear.spec, kernel).backward(gradient)
    torch.testing.assert_close(x.grad, gradient @ linear.weight, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("act_order", [False, True])
def test_tiles_do_not_change_the_gradient(name, symmetric, act_order, monkeypatch):
    linear = make_linear(dtype=torch.bfloat16, symmetric=symmetric, act_order=act_order)
    kernel, operands = prepared(name, linear)
    gradient = torch.randn(5, 64).bfloat16()
    exact = gradient @ kernel.dequantize(operands, linear.spec, torch.bfloat16)
    for module in (torch_reference, torch_int4, cpu_native):
        monkeypatch.setattr(module, "TILE_WEIGHTS", 64 * 32)
    x = torch.randn(5, 128).bfloat16().requires_grad_()
    quantized_linear(x, operands, None, linear.spec, kernel).backward(gradient)
    torch.testing.assert_close(x.grad, exact, rtol=2**-7, atol=2**-7)


def test_backward_by_tiles_has_no_dense_weight_at_any_time(monkeypatch):
    monkeypatch.setattr(torch_reference, "TILE_WEIGHTS", 64 * 32)
    linear = make_linear(in_features=1024)
    kernel, operands = prepared("torch_reference", linear)
    x = torch.randn(2, 1024, requires_grad=True)
    y = quantized_linear(x, operands, None, linear.spec, kernel)
    made = []
    dequantize = torch_reference.dequantize_weight

    def watch(*args, **keywords):
        made.append(dequantize(*args, **keywords))
        return made[-1]

    monkeypatch.setattr(torch_reference, "dequantize_weight", watch)
    y.sum().backward()
    assert len(made) == 32
    assert {tuple(tile.shape) for tile in made} == {(64, 32)}


def test_backward_keeps_no_dense_copy():
    linear = make_linear()
    kernel, operands = prepared("torch_reference", linear)
    x = torch.randn(5, 128, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append(t.numel()) or t, lambda t: t
    ):
        quantized_linear(x, operands, None, linear.spec, kernel)
    stored = [operands.weight[0], operands.qzeros, operands.scales]
    assert sorted(saved) == sorted(tensor.numel() for tensor in stored)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_and_eager_agree(name):
    linear = make_linear(dtype=torch.bfloat16)
    kernel, operands = prepared(name, linear)

    def run(x):
        return quantized_linear(x, operands, None, linear.spec, kernel)

    x = torch.randn(2, 128).bfloat16()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), run(x))


def test_dequantize_runs_inside_a_compiled_graph():
    linear = make_linear()
    kernel, operands = prepared("torch_reference", linear)

    def run():
        return dequantize(operands, linear.spec, kernel, torch.float32)

    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(), linear.weight.float())


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, 64), r"128 -> 64 in torch.float32: the input is torch.float32 with 64 col"),
        (torch.zeros(2, 128).half(), r"the input is torch.float16 with 128 columns"),
        (torch.zeros(2, 128, device="meta"), r"on cpu: the input is on meta"),
    ],
)
def test_wrong_input_is_refused_by_its_numbers(x, message):
    linear = make_linear()
    kernel, operands = prepared("torch_reference", linear)
    with pytest.raises(ConfigError, match=message):
        quantized_linear(x, operands, None, linear.spec, kernel)
