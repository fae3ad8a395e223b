"""Experts that run together, in Triton's interpreter, against one after the other."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tests.helpers.checkpoints import TINY_SIZES, Recipe, write_checkpoint
from tests.helpers.interpreted import interpret
from transformers import (
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

import halfbyte
from halfbyte.integrations import graph_steps
from halfbyte.integrations.graph_steps import GraphSteps, find_cache_obstacle
from halfbyte.kernels import triton_decode, triton_experts, triton_linear
from halfbyte.kernels.triton_linear import TritonLinear
from halfbyte.model.experts import UnfusedExperts
from halfbyte.nn import gpu_step, grouped_experts
from halfbyte.nn.fusion import fuse_linears
from halfbyte.nn.grouped_experts import find_grouping_obstacle, group_experts
from halfbyte.nn.replace import quantized_linears

pytest.importorskip("triton")

SIZES = TINY_SIZES | {"hidden_size": 64, "num_hidden_layers": 2}
EXPERTS = {
    **SIZES,
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 64,
    "head_dim": 32,
}
KINDS = {
    "qwen3": (Qwen3MoeConfig(**EXPERTS, norm_topk_prob=True), Recipe()),
    "asymmetric, act-order": (
        Qwen3MoeConfig(**EXPERTS, norm_topk_prob=False),
        Recipe(act_order=True, symmetric=False),
    ),
    "mixtral": (
        MixtralConfig(
            **SIZES | {"intermediate_size": 64}, num_local_experts=4, num_experts_per_tok=2
        ),
        Recipe(bits=3),
    ),
    "a shared expert": (
        Qwen2MoeConfig(
            **{k: v for k, v in EXPERTS.items() if k != "head_dim"},
            shared_expert_intermediate_size=64,
        ),
        Recipe(skip=r"lm_head|gate$"),
    ),
}


@pytest.fixture(autouse=True)
def triton_on_the_cpu(monkeypatch):
    interpret(
        monkeypatch,
        "halfbyte.kernels.triton_kernels",
        "halfbyte.kernels.triton_decode_kernels",
        "halfbyte.kernels.triton_expert_kernels",
    )
    for module in (triton_experts, triton_linear, gpu_step):
        monkeypatch.setattr(module, "DEVICES", ("cpu",))
    monkeypatch.setattr(TritonLinear, "find_obstacle", lambda self: None)
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, programs: 1)
    # Few programs: the interpreter runs them one after the other.
    for module in (triton_experts, triton_linear):
        monkeypatch.setattr(module, "count_processors", lambda device: 1)


def load(folder, kind="qwen3"):
    config, recipe = KINDS[kind]
    write_checkpoint(folder, config, recipe)
    return halfbyte.load(folder, dtype=torch.float16)


def experts_of(model):
    return [module for module in model.modules() if isinstance(module, UnfusedExperts)]


def run_alone(experts, monkeypatch, *given):
    with monkeypatch.context() as patch:
        patch.setattr(experts, "grouped", None)
        return experts(*given)


def choose(experts, tokens, per_token=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    odds = torch.rand(tokens, experts.num_experts, generator=generator) ** 3 + 1e-6
    weights = torch.rand(tokens, per_token, generator=generator).half()
    return torch.multinomial(odds, per_token, generator=generator), weights


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_it_gives_the_results_of_one_after_the_other(tmp_path, monkeypatch, kind, tokens):
    model = load(tmp_path, kind)
    experts = experts_of(model)[1]
    x = torch.randn(tokens, 64).half()
    given = (x, *choose(experts, tokens, per_token=2))
    with torch.inference_mode():
        assert experts.grouped(*given) is not None
        found, expected = experts(*given), run_alone(experts, monkeypatch, *given)
    assert found.dtype == expected.dtype
    assert float(expected.abs().max()) > 0
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3 * float(expected.abs().max()))


def test_interleaved_gates_and_biases(tmp_path, monkeypatch):
    """As in gpt-oss, whose activation is its own too."""
    sizes = SIZES | {"intermediate_size": 64}
    config = GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, head_dim=32)
    KINDS["gpt-oss"] = (config, Recipe())
    model = load(tmp_path, "gpt-oss")
    experts = experts_of(model)[0]
    assert experts.projection(0, experts.names.down).bias is not None
    given = (torch.randn(5, 64).half(), *choose(experts, 5, per_token=2))
    with torch.inference_mode():
        found, expected = experts.grouped(*given), run_alone(experts, monkeypatch, *given)
    torch.testing.assert_close(found, expected, rtol=4e-3, atol=4e-3 * float(expected.abs().max()))


def test_other_inputs_are_left_to_one_after_the_other(tmp_path, monkeypatch):
    model = load(tmp_path)
    experts = experts_of(model)[0]
    ids, weights = choose(experts, 4)
    x = torch.randn(4, 64).half()
    with torch.inference_mode():
        assert experts.grouped(x, ids, weights) is not None
        assert experts.grouped(x[:0], ids[:0], weights[:0]) is None
        for limit in ("MAX_MEAN_ROWS", "MAX_ELEMENTS"):
            with monkeypatch.context() as patch:
                patch.setattr(grouped_experts, limit, 1)
                assert experts.grouped(x, ids, weights) is None
                assert experts(x, ids, weights).shape == x.shape


def test_gradients_go_through_the_experts_themselves(tmp_path, monkeypatch):
    model = load(tmp_path)
    experts = experts_of(model)[0]
    monkeypatch.setattr(experts, "grouped", None)
    calls = []
    experts.grouped = lambda *given: calls.append(given)
    with torch.no_grad():
        experts(torch.randn(2, 64).half(), *choose(experts, 2))
    assert len(calls) == 1
    experts(torch.randn(2, 64).half().requires_grad_(), *choose(experts, 2))
    experts.observer = lambda stage, inputs: None
    with torch.no_grad():
        experts(torch.randn(2, 64).half(), *choose(experts, 2))
    assert len(calls) == 1


def test_a_changed_expert_is_found(tmp_path, monkeypatch):
    """A stale table would read freed memory."""
    model = load(tmp_path)
    experts = experts_of(model)[0]
    given = (torch.randn(2, 64).half(), *choose(experts, 2))

    def check(*, together):
        with torch.inference_mode():
            result = experts.grouped(*given)
            assert (result is not None) == together
            expected = run_alone(experts, monkeypatch, *given)
            torch.testing.assert_close(experts(*given), expected, rtol=4e-3, atol=1e-2)

    check(together=True)
    down = experts.projection(2, "down_proj")
    state = down.state_dict()
    down.load_state_dict(state | {"scales": state["scales"] * 2})
    check(together=True)
    # Another kernel, and back; the fused pair is dissolved and fused again.
    experts.projection(0, "gate_proj").prepare(kernel="torch_reference")
    check(together=False)
    for _, linear in quantized_linears(model):
        linear.prepare(kernel="triton")
    check(together=True)
    fuse_linears(model)
    check(together=True)
    experts.float()
    assert "not on cuda or triton" in find_grouping_obstacle(experts)


def test_adapters_of_experts_are_not_skipped(tmp_path, monkeypatch):
    model = load(tmp_path)
    experts = experts_of(model)[0]
    wrapper = torch.nn.Module()
    wrapper.base_layer = experts.projection(1, "down_proj")
    experts.get_submodule("1").down_proj = wrapper
    assert "expert 1 has a" in find_grouping_obstacle(experts)
    assert "adapters" in gpu_step.find_mixture_mismatch(model.model.layers[0])
    assert find_grouping_obstacle(experts_of(model)[1]) is None
    with torch.inference_mode():
        assert experts.grouped(torch.randn(2, 64).half(), *choose(experts, 2)) is None


@pytest.mark.parametrize("make", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_reads_its_own_weights(tmp_path, make):
    model = load(tmp_path)
    first = experts_of(model)[0]
    twin = experts_of(make(model))[0]
    for _, linear in quantized_linears(first):
        linear.scales.zero_()
    given = (torch.randn(2, 64).half(), *choose(twin, 2))
    with torch.inference_mode():
        assert float(twin.grouped(*given).abs().max()) > 0


def test_why_experts_run_one_after_the_other(tmp_path):
    model = load(tmp_path)
    first, second = experts_of(model)
    first.grouped = second.grouped = None
    assert find_grouping_obstacle(first) == "they were not grouped when the model was loaded"
    first.projection(3, "down_proj").offsets = torch.zeros(2, 64)
    assert find_grouping_obstacle(first) == "one has offsets"
    second.projection(3, "down_proj").prepare(kernel="torch_reference")
    assert "run on torch_reference, not on cuda or triton" in find_grouping_obstacle(second)
    assert group_experts(model) == 0
    assert "which experts run is decided on the CPU" in find_cache_obstacle(model)
    assert "one after the other: one has offsets" in gpu_step.find_mismatch(model)


def test_experts_of_unequal_bits_run_one_after_the_other(tmp_path):
    config, _ = KINDS["qwen3"]
    KINDS["mixed"] = (config, Recipe(bits_for={r"experts\.2\.down_proj": 8}))
    model = load(tmp_path, "mixed")
    assert "bits or groups differ" in find_grouping_obstacle(experts_of(model)[0])


@pytest.mark.parametrize("kind", ["asymmetric, act-order", "a shared expert"])
def test_a_decode_step_of_a_mixture(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(graph_steps, "find_drift", lambda model: None)
    model = load(tmp_path, kind)
    # Only the experts in the interpreter, which is slow.
    for name, linear in quantized_linears(model):
        if "self_attn" in name:
            linear.prepare(kernel="torch_reference")
    assert gpu_step.find_mismatch(model) is None
    ids = torch.tensor([[3, 14, 15, 9, 26, 5]])
    steps, own = GraphSteps(model, 6), GraphSteps(model, 6, own_forward=True)
    for one in (steps, own):
        one.prefill(ids[:, :4])
    assert steps.fallback_reason is None
    for position in (4, 5):
        found, expected = (one(int(ids[0, position]), position) for one in (steps, own))
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_routers_of_other_kinds(tmp_path):
    """DeepSeek's: sigmoid, groups of experts, and a bias that only chooses."""
    config = DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 4, "intermediate_size": 64},
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=0,
        q_lora_rank=None,
        kv_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=32,
    )
    KINDS["deepseek"] = (config, Recipe())
    model = load(tmp_path, "deepseek")
    assert find_cache_obstacle(model) is None
    ids = torch.tensor([[3, 14, 15, 9]])
    with torch.inference_mode():
        found = model(ids).logits
        for experts in experts_of(model):
            experts.grouped = None
        expected = model(ids).logits
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
