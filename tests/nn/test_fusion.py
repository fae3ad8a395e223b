from __future__ import annotations

import copy
import pickle

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from tests.helpers.packed import make_linear
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.kernels.fragments import dequantize_in_torch, find_layout_mismatch
from halfbyte.kernels.registry import find_kernel
from halfbyte.kernels.triton_linear import TritonLinear
from halfbyte.nn import fusion
from halfbyte.nn.fusion import NAMES, Fusion, find_fusion_obstacle, fuse_linears
from halfbyte.nn.linear import QuantLinear

QKV = NAMES[0]


def make_layer(linear, bias=None) -> QuantLinear:
    dtypes = {"scales": linear.stored.scales.dtype, "g_idx": torch.int32}
    if bias is not None:
        dtypes["bias"] = bias.dtype
    layer = QuantLinear(linear.spec, dtypes)
    state = {
        "qweight": linear.stored.weight[0],
        "qzeros": linear.stored.qzeros,
        "scales": linear.stored.scales,
        "g_idx": linear.g_idx,
    }
    layer.load_state_dict(state | ({} if bias is None else {"bias": bias}))
    return layer


class Attention(nn.Module):
    """q, k and v of unequal sizes; called as models do."""

    def __init__(self, with_bias=False, **layer):
        super().__init__()
        for seed, (name, size) in enumerate(zip(QKV, (128, 64, 64), strict=True)):
            linear = make_linear(out_features=size, seed=seed, **layer)
            bias = torch.linspace(-1, 1, size).half() if with_bias else None
            self.register_module(name, make_layer(linear, bias))
            # With act-order all are sorted alike: they saw the same inputs.
            getattr(self, name).g_idx = self.q_proj.g_idx.clone()

    def prepare(self, kernel=None):
        for name in QKV:
            self.get_submodule(name).prepare(kernel=kernel)
        return self

    def forward(self, x):
        return torch.cat([getattr(self, name)(x) for name in QKV], dim=-1)


@pytest.fixture(autouse=True)
def fused_kernels(monkeypatch):
    """The kernels of this machine are fused too."""
    monkeypatch.setattr(fusion, "FUSED_KERNELS", ("torch_reference", "torch_int4"))


@pytest.fixture
def products(monkeypatch):
    """Output channels of each product that is computed."""
    found = []
    kernel = find_kernel("torch_reference")
    own = type(kernel).apply

    def apply(self, x, operands, bias, spec):
        found.append(spec.out_features)
        return own(self, x, operands, bias, spec)

    monkeypatch.setattr(type(kernel), "apply", apply)
    return found


LAYERS = [
    {},
    {"with_bias": True},
    {"symmetric": False, "bits": 8},
    {"bits": 3},
    {"act_order": True, "symmetric": False},
    {"dtype": torch.bfloat16, "kernel": "torch_int4", "with_bias": True},
]


@pytest.fixture
def gpu_layout(monkeypatch):
    """The layout of GPU kernels, computed with on the CPU."""

    def apply(self, x, operands, bias, spec):
        return nn.functional.linear(x, dequantize_in_torch(operands, spec, spec.dtype), bias)

    monkeypatch.setattr(fusion, "FUSED_KERNELS", ("triton",))
    monkeypatch.setattr(TritonLinear, "find_obstacle", lambda self: None)
    monkeypatch.setattr(
        TritonLinear, "find_mismatch", lambda self, spec: find_layout_mismatch(spec)
    )
    monkeypatch.setattr(TritonLinear, "apply", apply)
    monkeypatch.setattr(
        TritonLinear, "dequantize", lambda self, *arguments: dequantize_in_torch(*arguments)
    )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_fused_fragments_are_those_of_the_parts(gpu_layout, bits):
    layer = {"bits": bits, "dtype": torch.float16, "symmetric": False, "act_order": True}
    model, apart = (Attention(**layer).prepare("triton") for _ in range(2))
    assert fuse_linears(model) == 1
    assert model.q_proj.packed_0.shape == (2, 16, 32 * bits)
    x = torch.randn(3, 128).half()
    torch.testing.assert_close(model(x), apart(x), rtol=1e-2, atol=1e-2)
    for (name, tensor), other in zip(
        model.state_dict().items(), apart.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, other), name


@pytest.mark.parametrize("layer", LAYERS)
def test_fused_linears_compute_what_they_did(layer):
    layer = dict(layer)
    kernel = layer.pop("kernel", "torch_reference")
    model = Attention(**layer).prepare(kernel)
    x = torch.randn(2, 5, 128, dtype=layer.get("dtype", torch.float32))
    expected = model(x)
    weights = {name: model.get_submodule(name).dequantize() for name in QKV}
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert fuse_linears(model) == 1
    # Wider products may be summed in another order.
    torch.testing.assert_close(
        model(x),
        expected,
        rtol=1e-5 if x.dtype == torch.float32 else 1e-2,
        atol=1e-5 if x.dtype == torch.float32 else 1e-2,
    )
    for name, weight in weights.items():
        assert torch.equal(model.get_submodule(name).dequantize(), weight)
        assert torch.equal(model.get_submodule(name).weight + 0, weight)
    saved = model.state_dict()
    assert list(saved) == list(state)
    for name, tensor in state.items():
        assert torch.equal(saved[name], tensor)
        assert saved[name].is_contiguous()
    storages = {tensor.untyped_storage().data_ptr() for tensor in saved.values()}
    assert len(storages) == len(saved), "files would hold one tensor for two names"


def test_one_product_for_all_and_nothing_is_kept_afterwards(products):
    model = Attention().prepare("torch_reference")
    assert fuse_linears(model) == 1
    for _ in range(2):
        model(torch.randn(3, 128))
    assert products == [256, 256]
    assert model.q_proj.fusion._pending is None


def test_parts_are_contiguous_as_a_linears_result_is():
    model = Attention().prepare("torch_reference")
    fuse_linears(model)
    x = torch.randn(2, 3, 128)
    for name in QKV:
        assert model.get_submodule(name)(x).is_contiguous()
    one = torch.randn(1, 1, 128)
    q, k = model.q_proj(one), model.k_proj(one)
    # Of a single row nothing was copied: both lie in one product.
    assert q.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()


def test_another_input_is_another_product(products):
    model = Attention().prepare("torch_reference")
    x, other = torch.randn(3, 128), torch.randn(3, 128)
    expected = [model.q_proj(x), model.k_proj(other), model.v_proj(other)]
    fuse_linears(model)
    products.clear()
    found = [model.q_proj(x), model.k_proj(other), model.v_proj(other)]
    assert products == [256, 256]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("inference", [False, True])
def test_the_same_tensor_called_again_is_multiplied_again(inference):
    model = Attention().prepare("torch_reference")
    fuse_linears(model)
    with torch.inference_mode(inference):
        x = torch.randn(3, 128)
        model.q_proj(x)
        x.mul_(2)
        # Its own part was taken; a second call cannot mean the first product.
        torch.testing.assert_close(model.q_proj(x), model.q_proj(x.clone()))


def test_a_write_between_two_calls_is_seen():
    model = Attention().prepare("torch_reference")
    fuse_linears(model)
    x = torch.randn(3, 128)
    model.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(model.k_proj(x), model.k_proj(x.clone()))


def test_gradient_reaches_the_input_from_every_part():
    model = Attention().prepare("torch_reference")
    x = torch.randn(3, 128, requires_grad=True)
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    fuse_linears(model)
    with torch.no_grad():
        model.q_proj(x)
    (found,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_compiles_to_one_graph():
    model = Attention().prepare("torch_reference")
    x = torch.randn(3, 128)
    expected = model(x)
    fuse_linears(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x * 2), model(x * 2))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_is_fused_in_itself(copier):
    model = Attention().prepare("torch_reference")
    x = torch.randn(3, 128)
    fuse_linears(model)
    twin = copier(model)
    torch.testing.assert_close(twin(x), model(x))
    assert twin.q_proj.fusion is twin.k_proj.fusion
    assert twin.q_proj.fusion is not model.q_proj.fusion
    twin.k_proj.restore()
    assert model.k_proj.fusion is not None


def test_another_dtype_takes_the_group_apart_and_leaves_it_right():
    model = Attention(with_bias=True, dtype=torch.bfloat16).prepare("torch_reference")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fuse_linears(model)
    model.float()
    assert model.q_proj.fusion is None
    assert all(model.get_submodule(name).selection is not None for name in QKV)
    x = torch.randn(3, 128)
    exact = torch.cat(
        [
            x.double() @ model.get_submodule(name).dequantize(torch.float64).t()
            + model.get_submodule(name).bias.double()
            for name in QKV
        ],
        dim=-1,
    )
    torch.testing.assert_close(model(x).double(), exact, rtol=1e-4, atol=1e-4)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_loading_into_a_fused_model_loads():
    model, other = (Attention(**layer).prepare("torch_reference") for layer in ({}, {"bits": 4}))
    for name in QKV:
        getattr(other, name).scales.mul_(2)
    fuse_linears(model)
    model.load_state_dict(other.state_dict())
    x = torch.randn(3, 128)
    torch.testing.assert_close(model(x), other(x))


def test_tensors_are_counted_once():
    model = Attention().prepare("torch_reference")
    before = sum(tensor.nbytes for tensor in model.buffers())
    fuse_linears(model)
    assert sum(tensor.nbytes for tensor in model.buffers()) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "k_proj", make_layer(make_linear(bits=8))), "not all are prepared"),
        (lambda m: m.k_proj.bfloat16(), "their specs differ"),
        (lambda m: m.k_proj.prepare(kernel="torch_reference"), None),
    ],
)
def test_linears_that_differ_stay_apart(change, reason):
    model = Attention().prepare("torch_reference")
    change(model)
    assert find_fusion_obstacle([model.get_submodule(name) for name in QKV]) == reason
    assert fuse_linears(model) == (reason is None)


def test_inputs_in_different_orders_stay_apart():
    layers = [make_layer(make_linear(act_order=True, symmetric=False, seed=s)) for s in (1, 2)]
    for layer in layers:
        layer.prepare(kernel="torch_reference")
    assert find_fusion_obstacle(layers) == "their inputs are in different orders"


def test_a_kernel_that_does_not_gain_is_left_alone(monkeypatch):
    monkeypatch.setattr(fusion, "FUSED_KERNELS", ("cuda", "triton"))
    model = Attention().prepare("torch_reference")
    assert fuse_linears(model) == 0
    assert model.q_proj.fusion is None


def test_a_whole_model_generates_the_same():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=80, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    for block in model.model.layers:
        for name, module in list(block.named_modules()):
            if isinstance(module, nn.Linear):
                linear = make_linear(
                    in_features=module.in_features, out_features=module.out_features, seed=len(name)
                )
                layer = make_layer(linear)
                layer.prepare(kernel="torch_reference")
                parent, _, child = name.rpartition(".")
                setattr(block.get_submodule(parent), child, layer)
    ids = torch.arange(6)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        # q, k, v and gate, up of two blocks.
        assert fuse_linears(model) == 4
        torch.testing.assert_close(model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert isinstance(model.model.layers[0].self_attn.q_proj.fusion, Fusion)


def test_adapters_train_on_a_fused_linear():
    model = Attention().prepare("torch_reference")
    model.norm = nn.LayerNorm(128).requires_grad_(False)  # PEFT looks for a parameter
    x = torch.randn(3, 128)
    expected = model(x)
    fuse_linears(model)
    adapted = inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model)
    torch.testing.assert_close(adapted(x), expected)
    adapted(x).square().sum().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "lora" in name]
    assert len(gradients) == 2
    assert all(gradient is not None for gradient in gradients)
