"""Build a tiny random model of any family of causal models that Transformers knows.

Sizes are reduced by the names of their fields, in nested configurations too, and lists with one
entry per layer keep every kind of layer. ``EXTRA`` has the few settings that a name cannot tell.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

VOCABULARY = 128
TEXT_TOKENS = (3, 112)
"""Range of the random token ids; those above it may stand for an image or a sound."""
LAYERS = 4
TOWER_LAYERS = 2
LAYER_COUNT = "num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers"
GAIN = 4.0
"""Applied to Transformers' initial weights, so that the logits depend on the blocks."""

SIZES: dict[str, int] = {
    r".*vocab(_size(_base)?)?|codebook_size|num_embeddings|vocab_size_per_layer_input": VOCABULARY,
    r"moe_num_experts|n(um)?_(local_|routed_)?experts|zero_expert_num": 4,
    r"(moe_|num_)?(top_?k|k)|num_experts_per_tok(en)?|moe_topk": 2,
    r"n_groups?|num_expert_group|mamba_n_?groups": 2,
    r"topk_group": 1,
    r"num_hidden_layers|(de|en)coder_layers|num_(de|en)coder_layers|n_layers?|num_layers": LAYERS,
    r"depth|num_blocks|num_global_layers|conf_num_hidden_layers|num_layers_per_stack": 2,
    r"(linear_num_)?key_heads|kv_n_heads|num_kv_heads|(swa_)?num_key_value_heads": 2,
    r"linear_num_key_heads|num_query_groups": 2,
    r"mamba_(n|num)_heads|n_mamba_heads": 32,
    r".*attention_heads|n_heads?|num_heads|linear_num_(value_)?heads|index_n_heads": 4,
    r"qk_head_dim": 48,
    r"qk_rope_head_dim|attention_head_dim|index_head_dim": 32,
    r"mamba_(head_?dim|d_head)": 4,
    r"(swa_|global_)?head_dim|.*head_dim|dim_head|kv_channels|d_head|d_kv": 16,
    r"attention_head_size": 16,
    r".*lora_rank|.*_rank|hc_lowrank": 32,
    r"attention_hidden_size|mamba_d_ssm": 128,
    r".*(state_size|d_state)": 16,
    r"rotary_dim": 8,
    r"hidden_size_per_layer_input|ple_embed_dim|router_hidden_size|dim_model_base": 32,
    r".*hidden_size.*|d_model|n_embd|emb_dim|.*embed(ding)?_(dim|size)|lru_width": 64,
    r"word_embed_proj_dim|.*_(in|out|input|output)_dim|adapter_input_size": 64,
    r".*intermediate_size.*|.*ffn_dim|d_ff|dff|dim_ff|mlp_dim|feed_forward_size|d_inner": 128,
    r"(expert_)?ffn_hidden_size": 128,
    r"max_position_embeddings|n_positions|max_seq_len|.*context_length|n_ctx": 256,
    r"(original_max|model_max|max_(source|target))_(position.*|length)": 256,
    r".*(sliding_window|window_size|window_len|local_attention|chunk_size|chunk_length)": 16,
    r"image_size|crop_size": 64,
    r"index_topk|index_block_size": 8,
    r"index_topk_blocks": 2,
    r".*(layer_period|pattern|interval|every_n_layers)|layer_group_size": 2,
    r".*(layer_offset|first_k_dense_replace|num_dense_layers|layer_start_index)": 1,
    r"max_window_layers|num_kv_shared_layers": 2,
    r"moe_layer_end_index": LAYERS - 1,
}
"""Sizes by the name of their field; only larger ones are reduced."""

_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}

_VISUAL_TOKENS = {f"<|visual token {i:06d}|>": i + TEXT_TOKENS[1] for i in range(8)}

MORE: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"global_config": {"num_hidden_layers": LAYERS + 2}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "clip_qkv": 8, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dory": {
        "num_hidden_layers": 8,
        "layer_types": ["sliding_attention", "mlp", "full_attention", "mlp"] * 2,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": {"head_dim": 48}},
    "dots3_note_text": {"head_dim": 48},
    "emu3": {"vocabulary_map": {"<image>": 120, "<|extra_200|>": 121, **_VISUAL_TOKENS}},
    "falcon_h1": {"mamba_d_head": 4},
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": LAYERS}},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "inkling2_loop_text": {
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    "inkling2_text": {"n_layers_per_attn_res_block": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 32, "head_dim": 4},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"axial_pos_embds_dim": [16, 48], "axial_pos_shape": [16, 16]},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"n_mamba_heads": 32, "hybrid_layer_ids": [1, 3]},
}
"""Settings of families that cannot be built, or would not have their usual parts, without them."""

_WITHOUT_LAYER_INPUTS = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}

BEFORE: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": _WITHOUT_LAYER_INPUTS},
}
"""Settings without which a family's own configuration cannot be created."""


def build_tiny(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Build a tiny random causal model in float32.

    Args:
        family: Model type, a key of Transformers' mapping of causal models.
        seed: Of the weights.

    Returns:
        The model in eval mode.
    """
    torch.manual_seed(seed)
    config = tiny_config(family)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if model.config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        # The text part of a model that can be saved and loaded only as a whole.
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    wide = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }
    for parameter in model.parameters():
        # Parameters that Transformers leaves uninitialized, or as zeros.
        if not bool(torch.isfinite(parameter).all()) or not bool(parameter.any()):
            nn.init.normal_(parameter, std=0.02)
        if id(parameter) in wide or parameter.dim() == 3:
            parameter.data.mul_(GAIN)
    return model


def tiny_config(family: str) -> PretrainedConfig:
    """Return a configuration of a family with reduced sizes."""
    kind = CONFIG_MAPPING[family]
    settings = shrink(kind(**BEFORE.get(family, {})).to_dict())
    if "is_decoder" in settings:
        settings["is_decoder"] = True  # encoders attend to the text before a token only
    return kind.from_dict(merge(settings, MORE.get(family, {})))


def merge(settings: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return settings with changes, which may be nested."""
    result = dict(settings)
    for key, value in changes.items():
        nested = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if nested else value
    return result


def shrink(settings: dict[str, Any], layers: int = LAYERS) -> dict[str, Any]:
    """Reduce the sizes in a configuration and in the configurations inside it."""
    small = {key: _shrink_field(key, value) for key, value in settings.items()}
    if "kv_lora_rank" in small:
        small["num_key_value_heads"] = small["num_attention_heads"]
        if settings.get("head_dim", 0) == settings.get("qk_rope_head_dim"):
            small["head_dim"] = small["qk_rope_head_dim"]
    counts = [small_key for small_key in settings if re.fullmatch(LAYER_COUNT, small_key)]
    if not counts:
        return small
    total = settings[counts[0]]
    lists = {
        key: value
        for key, value in settings.items()
        if isinstance(value, list) and len(value) == total and not _lists_layers(key, value)
    }
    changes = {int(i): change for i, change in settings.get("per_layer_config", {}).items()}
    rows = list(zip(*lists.values(), map(changes.get, range(total)), strict=True))
    kinds = [i for i, row in enumerate(rows) if row not in rows[:i]][:6]
    count = max(layers, len(kinds))
    kept = [kinds[i % len(kinds)] for i in range(count)]
    for key, value in lists.items():
        small[key] = [_shrink_field(key, value[layer]) for layer in kept]
    if changes:
        # Doubled, so that these layers differ from the others in a small model too.
        small["per_layer_config"] = {
            i: {k: v * (1 + (k == "head_dim")) for k, v in shrink(changes[layer]).items()}
            for i, layer in enumerate(kept)
            if layer in changes
        }
    return small | dict.fromkeys(counts, count)


def _shrink_field(key: str, value: Any) -> Any:
    if isinstance(value, dict):
        if not all(isinstance(name, str) for name in value):
            return value
        # Fewer layers than the text model, as in most models.
        return shrink(value, TOWER_LAYERS if re.search("vision|audio", key) else LAYERS)
    if _lists_layers(key, value):
        return [layer for layer in value if layer < LAYERS] or [1] * bool(value)
    if re.fullmatch(r".*(token_ids?|token_index)", key):
        return _shrink_token(key, value)
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    return next((min(value, n) for name, n in SIZES.items() if re.fullmatch(name, key)), value)


def _lists_layers(key: str, value: Any) -> bool:
    """Whether a field lists the numbers of some layers."""
    named = re.fullmatch(r".*(_ids|idxs|indices|indexes|_layers)", key) and "token" not in key
    return bool(named) and isinstance(value, list) and all(isinstance(i, int) for i in value)


def _shrink_token(key: str, value: Any) -> Any:
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    if value is None or key in known:
        return known.get(key)
    if isinstance(value, list):
        return [VOCABULARY - 1 for _ in value]
    return min(value, TEXT_TOKENS[1] + sum(map(ord, key)) % (VOCABULARY - TEXT_TOKENS[1] - 1))
