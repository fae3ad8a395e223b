from __future__ import annotations

import math
import re
from functools import partial

import pytest
import torch
from tests.helpers.families import FAMILIES, build_family
from transformers.core_model_loading import revert_weight_conversion
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

from halfbyte.convert.gguf_architecture import (
    ARCHITECTURES,
    find_architecture,
)
from halfbyte.convert.gguf_hyperparameters import describe_model, list_limitations
from halfbyte.convert.gguf_positions import make_rope_factors
from halfbyte.errors import ConfigError
from halfbyte.model.experts import unfuse_experts

BY_CLASS = {architecture.model_class: architecture for architecture in ARCHITECTURES}


@pytest.mark.parametrize("name", BY_CLASS)
def test_names_match_the_gguf_package(name):
    """Every parameter of a real model has the name that gguf-py gives it."""
    gguf = pytest.importorskip("gguf")
    architecture = BY_CLASS[name]
    kind = next(k for k, v in gguf.MODEL_ARCH_NAMES.items() if v == architecture.name)
    theirs = gguf.get_tensor_name_map(kind, 4)
    model = build_family(architecture.model_type)
    unfuse_experts(model)
    for key in revert_weight_conversion(model, model.state_dict()):
        module = key.rpartition(".")[0]
        ours = architecture.to_gguf(module)
        if module == "lm_head" and architecture.ties_embeddings:
            continue  # the gguf package has none, and none is written
        fused = re.sub(r"experts\.\d+", "experts", module)
        assert ours == theirs.get_name(fused), key
        assert architecture.from_gguf(ours) == re.sub(r"experts\.\d+", "experts.*", module)


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
    with pytest.raises(
        ValueError, match=r"PhiForCausalLM: the supported classes are LlamaForCausalLM, .*Qwen3"
    ):
        find_architecture({"architectures": ["PhiForCausalLM"]})


def test_llama3_factors_match_transformers():
    parameters = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(head_dim=128, max_position_embeddings=131072, rope_parameters=parameters)
    scaled = LlamaRotaryEmbedding(config).inv_freq
    plain = 500000.0 ** -(torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    torch.testing.assert_close(
        make_rope_factors(config.to_dict())["rope_freqs.weight"].double(),
        plain / scaled.double(),
        rtol=1e-5,
        atol=0,
    )
    plain = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert make_rope_factors(plain) == {}


def test_number_of_longrope_factors_must_match_the_rotary_dimension():
    phi3 = build_family("phi3").config.to_dict()
    parameters = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    parameters |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = phi3 | {"rope_parameters": parameters, "original_max_position_embeddings": 32}
    found = make_rope_factors(config)
    assert found["rope_factors_long.weight"].tolist() == [2.0] * 4
    pairs = describe_model(BY_CLASS["Phi3ForCausalLM"], config)
    assert pairs["phi3.rope.scaling.original_context_length"] == 32
    assert pairs["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 2 / 5) ** 0.5)
    assert (
        "more than 32, it uses those for long"
        in list_limitations(BY_CLASS["Phi3ForCausalLM"], config)[0]
    )
    own = {**parameters, "factor": 2.0, "original_max_position_embeddings": 64}
    config.pop("original_max_position_embeddings")
    config["rope_parameters"] = own
    pairs = describe_model(BY_CLASS["Phi3ForCausalLM"], config)
    assert pairs["phi3.rope.scaling.attn_factor"] == pytest.approx((1 + 1 / 6) ** 0.5)
    assert (
        "more than 64, it uses those for long"
        in list_limitations(BY_CLASS["Phi3ForCausalLM"], config)[0]
    )
    config["rope_parameters"] = parameters
    parameters["short_factor"] = [1.0] * 5
    with pytest.raises(
        ValueError, match=r"short_factor in the config has 5 numbers, .* dimension of 8 needs 4"
    ):
        make_rope_factors(config)
    parameters["partial_rotary_factor"] = 1.0
    with pytest.raises(ValueError, match="'llama' supports default, linear, yarn and llama3"):
        describe_model(BY_CLASS["LlamaForCausalLM"], config)


@pytest.mark.parametrize(
    "changes",
    [{}, {"attention_factor": 1.5}, {"mscale": 1.0, "mscale_all_dim": 0.5}, {"factor": None}],
)
def test_yarn_attention_factor_matches_transformers(changes):
    parameters = {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0,
        "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1, **changes,
    }  # fmt: skip
    config = LlamaConfig(**FAMILIES["llama"], rope_parameters=parameters)
    wanted = LlamaRotaryEmbedding(config).attention_scaling
    pairs = describe_model(BY_CLASS["LlamaForCausalLM"], config.to_dict())
    factor = changes.get("factor", 4.0) or 8.0  # 128 positions of 16
    assert pairs["llama.rope.scaling.factor"] == factor
    assert pairs["llama.rope.scaling.original_context_length"] == 16
    own = 1 + 0.1 * math.log(factor)  # what llama.cpp multiplies by
    assert own * pairs.get("llama.rope.scaling.attn_factor", 1.0) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "beta_fast": 4}, "have beta_fast 4, .* beta_fast 32"),
        ({"rope_type": "yarn", "factor": 4.0, "truncate": False}, "have truncate False"),
        ({"rope_type": "yarn", "factor": "x"}, "factor of .*rope_parameters is 'x'"),
        ({"rope_type": "linear"}, "rope_parameters has no factor"),
        ({"rope_type": "llama3", "factor": 8.0}, "rope_parameters has no low_freq_factor"),
    ],
)
def test_unsupported_rope_settings_are_refused(parameters, message):
    config = LlamaConfig(**FAMILIES["llama"]).to_dict() | {"rope_parameters": parameters}
    write = partial(describe_model, BY_CLASS["LlamaForCausalLM"])
    if parameters["rope_type"] == "llama3":
        write = make_rope_factors
    with pytest.raises(ConfigError, match=message):
        write(config)


def test_differences_to_llama_cpp_are_noted_or_refused():
    mistral = BY_CLASS["MistralForCausalLM"]
    assert "beyond 4096 tokens" in list_limitations(mistral, {"sliding_window": 4096})[0]
    assert list_limitations(mistral, {"sliding_window": None}) == ()
    config = build_family("gemma2").config.to_dict()
    with pytest.raises(
        ValueError, match=r"query_pre_attn_scalar in the config is 256, .* head size 16"
    ):
        describe_model(BY_CLASS["Gemma2ForCausalLM"], config)
    pairs = describe_model(BY_CLASS["Gemma2ForCausalLM"], {**config, "query_pre_attn_scalar": 16})
    assert pairs["gemma2.attention.sliding_window"] == 16


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("LlamaForCausalLM", {"hidden_act": "gelu"}, "is 'gelu', .* 'llama' has silu"),
        ("GemmaForCausalLM", {"hidden_activation": "relu"}, "has gelu_pytorch_tanh"),
        ("LlamaForCausalLM", {"partial_rotary_factor": 0.5}, "RoPE on 50% of each head"),
        ("LlamaForCausalLM", {"rms_norm_eps": None}, "has no rms_norm_eps"),
        (
            "LlamaForCausalLM",
            {"intermediate_size": [96]},
            r"intermediate_size .*'\[96\]'; a pos",
        ),
        ("Gemma2ForCausalLM", {"final_logit_softcapping": None}, "no final_logit.* caps both"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": [1, 0, 1, 0]}, "in every 4th block"),
        ("SmolLM3ForCausalLM", {"no_rope_layers": None, "no_rope_layer_interval": 2}, "4th block"),
        ("Gemma3ForCausalLM", {"query_pre_attn_scalar": 168}, "is 168, .* head size 16"),
        ("Gemma3ForCausalLM", {"attn_logit_softcapping": 50.0}, "has attn_logit_softcapping"),
        (
            "Qwen3MoeForCausalLM",
            {"norm_topk_prob": False},
            "norm_topk_prob False, .* with normalized weights",
        ),
        ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0]}, "has mlp_only_layers, .* every block"),
        ("MixtralForCausalLM", {"num_local_experts": None}, "has no num_local_experts"),
        ("OlmoeForCausalLM", {"clip_qkv": 8.0}, "has clip_qkv 8.0"),
        ("OlmoeForCausalLM", {"num_key_value_heads": 2}, "2 key and value heads for 4 heads"),
        ("GPT2LMHeadModel", {"scale_attn_weights": False}, "changes the scale of attention"),
    ],
)
def test_assumptions_of_llama_cpp_are_checked(name, changes, message):
    config = {
        "num_attention_heads": 4, "num_hidden_layers": 4, "max_position_embeddings": 64,
        "hidden_size": 64, "intermediate_size": 96, "vocab_size": 99, "rms_norm_eps": 1e-6,
        "sliding_window": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_norm_epsilon": 1e-5, "norm_epsilon": 1e-5, "layer_norm_eps": 1e-5,
        "attn_logit_softcapping": 50.0 if name.startswith("Gemma2") else None,
        "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 16,
    }  # fmt: skip
    describe_model(BY_CLASS[name], config)
    with pytest.raises(ValueError, match=message):
        describe_model(BY_CLASS[name], {**config, **changes})


def test_windows_and_rope_bases_of_gemma3_are_read_from_old_and_new_keys():
    changes = {"query_pre_attn_scalar": 16, "num_hidden_layers": 7}
    new = build_family("gemma3_text", **changes).config.to_dict()
    old = {key: new[key] for key in new if key not in ("rope_parameters", "layer_types")}
    old |= {"rope_theta": 1e6, "rope_local_base_freq": 10000.0, "sliding_window_pattern": 6}
    pairs = describe_model(BY_CLASS["Gemma3ForCausalLM"], new)
    assert describe_model(BY_CLASS["Gemma3ForCausalLM"], old) == pairs
    assert pairs["gemma3.rope.freq_base"] == 1e6
    assert pairs["gemma3.rope.freq_base_swa"] == 1e4
    assert pairs["gemma3.attention.sliding_window_pattern"] == [True] * 5 + [False, True]
