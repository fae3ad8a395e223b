from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.helpers.packed import RandomLinear, make_linear
from torch import nn

from halfbyte.errors import CheckpointError, ConfigError, KernelUnavailable, ModelError
from halfbyte.kernels.registry import KERNELS, find_kernel, find_rejection
from halfbyte.nn.linear import QuantLinear


def make_layer(linear: RandomLinear, *, with_bias: bool = True) -> QuantLinear:
    dtypes = {"scales": linear.stored.scales.dtype, "g_idx": torch.int32}
    if with_bias:
        dtypes["bias"] = torch.float16
    layer = QuantLinear(linear.spec, dtypes)
    state = {
        "qweight": linear.stored.weight[0],
        "qzeros": linear.stored.qzeros,
        "scales": linear.stored.scales,
        "g_idx": linear.g_idx,
    }
    if with_bias:
        state["bias"] = torch.linspace(-1, 1, linear.spec.out_features).half()
    layer.load_state_dict(state)
    return layer


@pytest.fixture(params=[entry.name for entry in KERNELS])
def layer(request):
    """A bf16 layer prepared for each kernel in turn."""
    linear = make_linear(dtype=torch.bfloat16, symmetric=False, act_order=True)
    reason = find_rejection(find_kernel(request.param), linear.spec)
    if reason is not None:
        pytest.skip(reason)
    made = make_layer(linear)
    made.prepare(kernel=request.param)
    return made


def assert_close_to_dense(layer: QuantLinear, linear: RandomLinear, x: torch.Tensor) -> None:
    exact = x.double() @ linear.weight.t()
    if layer.bias is not None:
        exact = exact + layer.bias.double()
    size = x.double().abs() @ linear.weight.abs().t() + 1
    bound = layer.selection.kernel.error_bound(layer.spec)
    assert ((layer(x).double() - exact).abs() <= bound * size).all()


@pytest.mark.parametrize("with_bias", [False, True])
def test_computes_the_dense_layer(with_bias):
    linear = make_linear(bits=3)
    layer = make_layer(linear, with_bias=with_bias)
    layer.prepare()
    assert_close_to_dense(layer, linear, torch.randn(2, 5, 128))


def test_runs_before_it_is_prepared():
    linear = make_linear()
    x = torch.randn(3, 128)
    layer = make_layer(linear)
    before = layer(x)
    layer.prepare()
    torch.testing.assert_close(before, layer(x))


def test_is_an_ordinary_linear_to_other_code(layer):
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (128, 64)
    assert layer.weight.shape == (64, 128)
    assert layer.weight.dtype == torch.bfloat16
    assert list(layer.parameters()) == []


def test_state_dict_holds_the_stored_bits_whatever_the_kernel_made_of_them(layer):
    original = make_layer(make_linear(dtype=torch.bfloat16, symmetric=False, act_order=True))
    found, expected = layer.state_dict(), original.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_keeps_one_copy_of_the_weight(layer):
    repacked = layer.selection.kernel.repacks
    assert hasattr(layer, "qweight") != repacked
    names = {name for name, _ in layer.named_buffers()}
    assert ("qweight" in names) != repacked
    assert ("packed_0" in names) == repacked


def test_loads_a_state_dict_while_prepared(layer):
    other = make_layer(make_linear(dtype=torch.bfloat16, symmetric=False, act_order=True, seed=5))
    other.load_state_dict(layer.state_dict())
    kernel = layer.selection.kernel.name
    other.prepare(kernel=kernel)
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(other(x), layer(x))
    layer.load_state_dict(other.state_dict())
    assert torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"symmetric": False}, "up has symmetric zeros, but the state dict is of another"),
        ({"zero_offset": 0}, "up has symmetric zeros, but"),
        ({"act_order": True}, "up has contiguous groups, but"),
    ],
)
@pytest.mark.parametrize("prepared", [False, True])
def test_a_state_dict_of_another_quantization_is_refused(change, message, prepared):
    linear = make_linear()
    model = nn.ModuleDict({"up": make_layer(linear)})
    if prepared:
        model["up"].prepare()
    x = torch.randn(3, 128)
    before = model["up"](x)
    other = nn.ModuleDict({"up": make_layer(make_linear(**change))})
    with pytest.raises(RuntimeError, match=message):
        model.load_state_dict(other.state_dict(), strict=False)
    assert torch.equal(model["up"](x), before)
    # The other way round, symmetric zeros and groups in order are a case of what is computed.
    if "zero_offset" not in change:
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other["up"](x), before)


def test_copies_and_pickles(layer):
    x = torch.randn(3, 128).bfloat16()
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


def test_cast_changes_what_it_computes_in_and_nothing_that_is_stored(layer):
    before = layer.state_dict()
    layer.to(torch.float32)
    assert layer.spec.dtype == torch.float32
    assert layer(torch.randn(2, 128)).dtype == torch.float32
    after = layer.state_dict()
    assert {name: t.dtype for name, t in after.items()} == {
        name: t.dtype for name, t in before.items()
    }
    assert all(torch.equal(after[name], before[name]) for name in before)
    layer.to(torch.bfloat16)
    assert layer.selection is not None


def test_moves_to_the_meta_device_without_choosing_a_kernel(layer):
    layer.to("meta")
    assert layer.qweight.is_meta
    assert layer.selection is None


def test_input_of_another_dtype_is_cast_and_the_output_cast_back():
    linear = make_linear(dtype=torch.bfloat16)
    layer = make_layer(linear, with_bias=False)
    x = torch.randn(3, 128)
    result = layer(x)
    assert result.dtype == torch.float32
    assert torch.equal(result, layer(x.bfloat16()).float())


def test_autocast_decides_the_dtype_of_the_output():
    layer = make_layer(make_linear())
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(3, 128)).dtype == torch.bfloat16


def test_scales_that_are_not_numbers_are_refused_by_name_and_count():
    layer = make_layer(make_linear())
    layer.check_finite("model.q_proj")
    layer.scales[0, 3] = float("inf")
    layer.scales[1, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.q_proj\.scales has 2 of 256 values"):
        layer.check_finite("model.q_proj")


def test_bias_that_is_not_a_number_is_refused_by_name():
    layer = make_layer(make_linear())
    layer.bias[7] = float("nan")
    with pytest.raises(CheckpointError, match=r"model\.q_proj\.bias has 1 of 64 values"):
        layer.check_finite("model.q_proj")


@pytest.mark.parametrize("value", [torch.zeros(64, 128), nn.Parameter(torch.zeros(64, 128))])
def test_weight_cannot_be_assigned(value):
    layer = make_layer(make_linear())
    with pytest.raises(ModelError, match=r"a quantized linear 128 -> 64: its weight is packed"):
        layer.weight = value


def test_forced_kernel_that_cannot_is_an_error():
    layer = make_layer(make_linear(bits=3))
    with pytest.raises(KernelUnavailable, match="torch_int4"):
        layer.prepare(kernel="torch_int4")


def test_wrong_width_is_refused():
    with pytest.raises(ConfigError, match="64 columns"):
        make_layer(make_linear())(torch.zeros(1, 64))


def test_compiles_without_a_graph_break(layer):
    x = torch.randn(2, 128).bfloat16()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


def test_exports_as_one_op(layer):
    program = torch.export.export(layer, (torch.randn(2, 128).bfloat16(),))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(torch.ops.halfbyte.linear.default) == 1


def test_trains_an_adapter_beside_it(layer):
    adapter = nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    x = torch.randn(8, 128).bfloat16().requires_grad_()
    (layer(x) + adapter(x)).float().square().mean().backward()
    assert adapter.weight.grad is not None
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_print_shows_sizes_and_kernel(layer):
    text = repr(layer)
    assert "in_features=128, out_features=64, bias=True, bits=4, group_size=32" in text
    assert f"kernel={layer.selection.kernel.name}" in text
