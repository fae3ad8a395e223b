from __future__ import annotations

import pytest
from accelerate import init_empty_weights
from tests.helpers.families import build_family
from transformers import AutoConfig, AutoModelForCausalLM

from halfbyte.model.naming import Renaming, module_key_map


@pytest.mark.parametrize(
    ("family", "disk", "model"),
    [
        ("llama", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "lm_head.weight", "lm_head.weight"),
        # Files saved from the base model without a head lack its prefix.
        ("gpt2", "h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        ("gpt2", "transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.weight"),
        (
            "mixtral",
            "model.layers.0.block_sparse_moe.experts.2.w1.weight",
            "model.layers.0.mlp.experts.2.w1.weight",
        ),
    ],
)
def test_renaming_without_conversion_keeps_tensors_separate(
    family: str, disk: str, model: str
) -> None:
    assert Renaming(build_family(family)).model_key(disk, convert=False) == model


@pytest.mark.parametrize("projection", ["w1", "w3"])
def test_merging_leads_to_the_fused_parameter(projection: str) -> None:
    rules = Renaming(build_family("mixtral"))
    disk = f"model.layers.1.block_sparse_moe.experts.3.{projection}.weight"
    assert rules.model_key(disk, convert=True) == "model.layers.1.mlp.experts.gate_up_proj"


def test_packed_tensors_follow_the_weight_that_they_replace() -> None:
    keys = [
        "model.layers.0.block_sparse_moe.experts.2.w2.qweight",
        "model.layers.0.block_sparse_moe.experts.2.w2.g_idx",
        "model.layers.0.block_sparse_moe.gate.weight",
        "model.layers.0.self_attn.q_proj.scales",
    ]
    assert module_key_map(build_family("mixtral"), keys) == {
        keys[0]: "model.layers.0.mlp.experts.2.w2.qweight",
        keys[1]: "model.layers.0.mlp.experts.2.w2.g_idx",
        keys[2]: "model.layers.0.mlp.gate.weight",
        keys[3]: "model.layers.0.self_attn.q_proj.scales",
    }


def test_a_fused_tensor_becomes_several_parameters() -> None:
    config = AutoConfig.for_model("sarvam_moe", num_hidden_layers=4)
    with init_empty_weights():
        rules = Renaming(AutoModelForCausalLM.from_config(config))
    fused = "model.layers.3.attention.query_key_value.weight"
    assert rules.parameters_of(fused) == [
        f"model.layers.3.self_attn.{name}_proj.weight" for name in "qkv"
    ]
    assert rules.parameters_of("model.norm.weight") == ["model.norm.weight"]


def test_unknown_name_is_unchanged() -> None:
    rules = Renaming(build_family("llama"))
    assert rules.model_key("rotary.inv_freq", convert=True).endswith("rotary.inv_freq")
