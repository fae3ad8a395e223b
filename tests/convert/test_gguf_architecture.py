from __future__ import annotations

import pytest
import torch
from tests.helpers.families import FAMILIES, build_family
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from halfbyte.convert.gguf_architecture import (
    ARCHITECTURES,
    find_architecture,
)
from halfbyte.convert.gguf_hyperparameters import describe_model, make_rope_factors, note_limits

BY_CLASS = {architecture.model_class: architecture for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", BY_CLASS)
def test_names_are_those_of_the_gguf_package(name):
    """Every parameter of a real model of the family has a name, the one that gguf-py gives it."""
    gguf = pytest.importorskip("gguf")
    architecture = BY_CLASS[name]
    family = next(
        f
        for f in FAMILIES
        if name.lower() == f"{f}forcausallm".replace("_text", "").replace("_", "")
    )
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture.name)
    theirs = gguf.get_tensor_name_map(kind, 4)
    for key in build_family(family).state_dict():
        module = key.rpartition(".")[0]
        ours = architecture.to_gguf(module)
        if module == "lm_head" and architecture.ties_embeddings:
            continue  # the gguf package has none, and none is written
        assert ours == theirs.get_name(module), key
        assert architecture.from_gguf(ours) == module


def test_rows_of_q_and_k_alternate_between_halves_of_a_head():
    config = {"num_attention_heads": 2, "num_key_value_heads": 1}
    llama = BY_CLASS["LlamaForCausalLM"]
    assert llama.row_order("x.q_proj", config, 8).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert llama.row_order("x.k_proj", config, 4).tolist() == [0, 2, 1, 3]
    assert llama.row_order("x.v_proj", config, 4) is None
    assert BY_CLASS["Qwen2ForCausalLM"].row_order("x.q_proj", config, 8) is None


@pytest.mark.parametrize("config", [{}, {"num_attention_heads": 3}, {"num_attention_heads": "x"}])
def test_heads_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="8 rows"):
        BY_CLASS["LlamaForCausalLM"].row_order("x.q_proj", config, 8)


def test_other_architectures_are_refused_by_name():
    with pytest.raises(ValueError, match=r"PhiForCausalLM: written are LlamaForCausalLM, .*Qwen3"):
        find_architecture({"architectures": ["PhiForCausalLM"]})


def test_llama3_factors_are_those_of_transformers():
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=parameters)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(
        make_rope_factors(config.to_dict()).double(), plain / scaled.double(), rtol=1e-5, atol=0
    )
    assert (
        make_rope_factors({"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}) is None
    )


def test_what_llama_cpp_does_otherwise_is_said_or_refused():
    mistral = BY_CLASS["MistralForCausalLM"]
    assert "beyond 4096 tokens" in note_limits(mistral, {"sliding_window": 4096})[0]
    assert note_limits(mistral, {"sliding_window": None}) == ()
    config = build_family("gemma2").config.to_dict()
    with pytest.raises(ValueError, match=r"query_pre_attn_scalar is 256, .* head size 16"):
        describe_model(BY_CLASS["Gemma2ForCausalLM"], config)
    pairs = describe_model(BY_CLASS["Gemma2ForCausalLM"], {**config, "query_pre_attn_scalar": 16})
    assert pairs["gemma2.attention.sliding_window"] == 16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "is 'gelu', .* 'llama' computes silu"),
        ("GemmaForCausalLM", {"hidden_activation": "relu"}, "computes gelu_pytorch_tanh"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "turn 50% of each head"),
        ("LlamaForCausalLM", {"rms_norm_eps": None}, "has no rms_norm_eps"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0]}, "in each 4th block"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "4th block"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 168}, "is 168, .* head size 16"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping"),
    ],
)
def test_what_llama_cpp_takes_for_granted_is_checked(name, changes, message):
    config = {
        "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 64,
        "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99, "rms_norm_eps": 1e-6,
        "sliding_window": 16,
    }  # fmt: skip
    describe_model(BY_CLASS[name], config)
    with pytest.raises(ValueError, match=message):
        describe_model(BY_CLASS[name], {**config, **changes})


def test_windows_and_bases_of_gemma3_are_read_in_both_spellings():
    changes = {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}
    new = build_family("gemma3_text", **changes).config.to_dict()
    old = {key: new[key] for key in new if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    pairs = describe_model(BY_CLASS["Gemma3ForCausalLM"], new)
    assert describe_model(BY_CLASS["Gemma3ForCausalLM"], old) == pairs
    assert pairs["gemma3.rope.freq_base"] == 1e6
    assert pairs["gemma3.rope.freq_base_swa"] == 1e4
    assert pairs["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False, True]
