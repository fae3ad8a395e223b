"""The GPU decode step in Triton's interpreter, against the model's forward."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.interpreted import interpret
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from halfbyte.integrations.graph_steps import GraphSteps
from halfbyte.kernels import triton_decode
from halfbyte.nn import gpu_step

pytest.importorskip("triton")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 80,
    "max_position_embeddings": 64,
}
KINDS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES)),
    "qwen2, with biases": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen3, with norms of heads": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=32)),
}
IDS = torch.tensor([[3, 14, 15, 9, 26, 5, 35, 8]])


def make_model(kind):
    torch.manual_seed(0)
    build, config = KINDS[kind]
    model = build(config).eval()
    # Norms and biases that are all alike would hide one that is left out.
    for name, parameter in model.named_parameters():
        if "norm" in name or "bias" in name:
            parameter.data.add_(torch.randn_like(parameter) / 4)
    return model.half()


@pytest.fixture
def on_the_cpu(monkeypatch):
    interpret(monkeypatch, "halfbyte.kernels.triton_decode_kernels")
    monkeypatch.setattr(gpu_step, "DEVICES", ("cpu",))
    # Few programs: the interpreter runs them one after the other.
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, programs: 2)


@pytest.mark.parametrize("kind", KINDS)
def test_it_gives_the_logits_of_the_whole_sequence(on_the_cpu, kind):
    model = make_model(kind)
    with torch.inference_mode():
        expected = model.float()(IDS).logits[0]
    steps = GraphSteps(model.half(), 8)
    steps.prefill(IDS[:, :4])
    assert steps.fallback_reason is None
    for position in range(4, 8):
        found = steps(int(IDS[0, position]), position)
        torch.testing.assert_close(found, expected[position], rtol=1e-2, atol=1e-2)
    # A second sequence finds nothing of the first.
    steps.prefill(IDS[:, 2:4])
    own = GraphSteps(model, 8, own_forward=True)
    own.prefill(IDS[:, 2:4])
    torch.testing.assert_close(steps(7, 2), own(7, 2), rtol=1e-2, atol=1e-2)


def test_a_model_that_computes_something_else_keeps_its_own_forward(on_the_cpu, monkeypatch):
    model = make_model("llama")
    plain = model.model.layers[1].mlp.forward
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", lambda x: plain(x) * 3)
    steps = GraphSteps(model, 8)
    steps.prefill(IDS[:, :4])
    assert "computes differently" in steps.fallback_reason
    own = GraphSteps(model, 8, own_forward=True)
    own.prefill(IDS[:, :4])
    assert torch.equal(steps(7, 4), own(7, 4))


def test_a_model_that_computes_something_else_late_in_a_text_is_found_out(on_the_cpu):
    model = make_model("llama")

    def change(_module, inputs, given):
        late = given["position_ids"][..., None] >= 56
        return (torch.where(late, inputs[0].flip(-1), inputs[0]),), given

    model.model.layers[1].register_forward_pre_hook(change, with_kwargs=True)
    steps = GraphSteps(model, 8)
    steps.prefill(IDS[:, :4])
    assert "computes differently from position 56 on" in steps.fallback_reason


def test_what_is_in_the_way_is_named(on_the_cpu, monkeypatch):
    assert gpu_step.find_mismatch(make_model("llama")) is None
    assert "float32" in gpu_step.find_mismatch(make_model("llama").float())
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=64, n_head=2))
    assert "has no layers or norm or rotary_emb" in gpu_step.find_mismatch(other)
    model = make_model("qwen3, with norms of heads")
    model.model.layers[0].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(4 * 32).half())
    assert "norms are not per head" in gpu_step.find_mismatch(model)
    monkeypatch.setattr(gpu_step, "DEVICES", ("cuda",))
    assert gpu_step.find_mismatch(make_model("llama")) == "it is on cpu"
