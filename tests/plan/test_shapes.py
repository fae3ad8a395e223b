"""Counts from config.json compared with the models that Transformers builds from it."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig

from halfbyte.errors import ConfigError
from halfbyte.model.blocks import build_skeleton, find_blocks
from halfbyte.plan.shapes import CHECKED, KNOWN, parse_config, read_shapes

SMALL = {
    "hidden_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "vocab_size": 256,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SIMPLE = (
    *("apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "glm", "glm4"),
    *(
        "helium",
        "nanochat",
        "olmo",
        "phi",
        "seed_oss",
        "smollm3",
        "stablelm",
        "diffllama",
        "bitnet",
    ),
)
DROP = "not in this family's config"
FAMILIES = {
    "llama": {},
    "llama, tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama, wide heads": {"model_type": "llama", "head_dim": 32},
    "mistral": {"sliding_window": 32},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "gemma2": {"sliding_window": 32},
    "gemma3_text": {"sliding_window": 32},
    "phi3": {"sliding_window": None},
    "olmo2": {},
    "granite": {},
    "starcoder2": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "q_lora_rank": 32,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 2,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "deepseek_v2": {
        "q_lora_rank": None,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8,
        "v_head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_key_value_heads": 4,
    },
    "gpt_neox": {"num_key_value_heads": DROP},
    "opt": {"ffn_dim": 96, "word_embed_proj_dim": 64, "num_key_value_heads": DROP},
    "gpt2": {
        "n_embd": 64,
        "n_layer": 6,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 256,
        "pad_token_id": 0,
    },
    "bloom": {
        "n_layer": 6,
        "n_head": 4,
        "num_key_value_heads": DROP,
        "intermediate_size": DROP,
    },
    "persimmon": {"num_key_value_heads": DROP, "head_dim": DROP},
    "xglm": {
        "d_model": 64,
        "num_layers": 6,
        "attention_heads": 4,
        "ffn_dim": 96,
        "num_key_value_heads": DROP,
    },
    **{name: {} for name in SIMPLE},
    "falcon": {
        "new_decoder_architecture": False,
        "multi_query": True,
        "head_dim": DROP,
        "intermediate_size": DROP,
        "num_key_value_heads": DROP,
    },
}


def build(name):
    changes = dict(FAMILIES[name])
    model_type = changes.pop("model_type", name)
    base = {} if model_type == "gpt2" else SMALL
    values = {**base, **changes}
    config = AutoConfig.for_model(model_type, **{k: v for k, v in values.items() if v != DROP})
    model = build_skeleton(config, torch.float32)
    model.tie_weights()
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_counts_match_the_model_that_transformers_builds(name, tmp_path):
    model = build(name)
    model.config.save_pretrained(tmp_path)
    shapes = read_shapes(tmp_path)
    blocks = find_blocks(model)
    # All that is at least a matrix: linears, experts in one piece; routers are not quantized.
    inside = sum(
        p.numel()
        for block in blocks.modules
        for key, p in block.named_parameters()
        if p.dim() >= 2 and not _stays(key)
    )
    assert shapes.linear_numbers == inside
    assert shapes.layers == len(blocks.modules)
    head = model.get_output_embeddings().weight
    tied = head is model.get_input_embeddings().weight
    assert shapes.head_numbers == (0 if tied else head.numel())
    total = sum(p.numel() for p in model.parameters())
    assert shapes.numbers == pytest.approx(total, rel=0.02)


def test_untested_families_get_a_note():
    assert {changes.get("model_type", name) for name, changes in FAMILIES.items()} == CHECKED
    (note,) = parse_config({**SMALL, "model_type": "jamba"}, "m").notes
    assert note.startswith("Model type jamba is not among the tested ones")
    assert not parse_config({**SMALL, "model_type": "llama"}, "m").notes


def _stays(key):
    name = key.rsplit(".", 1)[0]
    router = name.endswith((".gate", ".router", "shared_expert_gate"))
    return router or key.endswith("_bias")


@pytest.mark.parametrize(
    ("changes", "window", "kinds"),
    [
        ({"model_type": "mistral", "sliding_window": 32}, 32, {"sliding": 6}),
        ({"model_type": "gemma3_text", "sliding_window": 32}, 32, {"full": 1, "sliding": 5}),
        ({"model_type": "gemma2", "sliding_window": 32}, 32, {"full": 3, "sliding": 3}),
        ({"model_type": "llama"}, None, {"full": 6}),
        (
            {"model_type": "qwen2", "sliding_window": 32, "use_sliding_window": False},
            None,
            {"full": 6},
        ),
    ],
)
def test_sliding_and_full_layers_are_distinguished(changes, window, kinds):
    shapes = parse_config({**SMALL, **changes}, "m")
    assert {layers.kind: layers.count for layers in shapes.cache} == kinds
    assert {layers.window for layers in shapes.cache} >= ({window} if window else {None})


def test_layer_types_in_the_config_take_precedence():
    types = ["sliding_attention", "full_attention", "linear_attention"] * 2
    shapes = parse_config(
        {**SMALL, "model_type": "x", "layer_types": types, "sliding_window": 8}, "m"
    )
    assert {layers.kind: layers.count for layers in shapes.cache} == {"full": 2, "sliding": 2}
    assert "2 of 6 layers keep a recurrent state" in shapes.notes[0]


def test_latent_attention_caches_one_small_vector_per_token():
    shapes = parse_config({**SMALL, "model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}, "m")
    assert [layers.numbers_per_token for layers in shapes.cache] == [24 + 8]


def test_active_weights_count_only_routed_experts():
    dense = parse_config({**SMALL, "model_type": "llama"}, "m")
    sparse = parse_config({**SMALL, "model_type": "mixtral", **FAMILIES["mixtral"]}, "m")
    attention = 6 * (64 * 64 * 2 + 64 * 32 * 2)
    assert dense.active_numbers == dense.linear_numbers
    assert sparse.active_numbers == attention + 6 * 2 * 3 * 64 * 96
    assert sparse.linear_numbers == attention + 6 * 4 * 3 * 64 * 96


@pytest.mark.parametrize(
    ("name", "billions"), [("7B", 6.738), ("13B", 13.016), ("70B", 68.977), ("8B", 8.030)]
)
def test_known_sizes_match_the_published_models(name, billions):
    assert read_shapes(name).numbers / 1e9 == pytest.approx(billions, abs=0.002)


def test_unknown_name_lists_known_sizes():
    with pytest.raises(ConfigError, match="7B, 8B, 13B") as error:
        read_shapes("9000B")
    assert all(name in str(error.value) for name in KNOWN)


def test_config_without_a_dimension_names_the_missing_fields(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "resnet"}))
    with pytest.raises(ConfigError, match="hidden_size, n_embd, d_model"):
        read_shapes(tmp_path)


def test_damaged_config_is_refused_by_name(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(
        ConfigError, match=r"is not JSON: .* Give a model's config\.json, or the folder with it"
    ):
        read_shapes(tmp_path)
