"""Tiny random models of many families."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

VOCABULARY = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_COMMON, "num_key_value_heads": 2}
_LATENT = {
    **_COMMON,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_MAMBA = {
    "mamba_n_heads": 32,
    "mamba_d_head": 4,
    "mamba_d_state": 16,
    "mamba_chunk_size": 16,
}
_BLOOM = {**_COMMON, "n_layer": 3, "n_head": 4}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _GROUPED,
    "mistral": {**_GROUPED, "sliding_window": 16},
    "qwen2": _GROUPED,
    "qwen3": {**_GROUPED, "head_dim": 16},
    "gemma2": {**_GROUPED, "head_dim": 16, "sliding_window": 16},
    "gemma3_text": {**_GROUPED, "head_dim": 16, "sliding_window": 16},
    "gemma": {**_GROUPED, "head_dim": 16},
    "phi3": _GROUPED,
    "gpt2": {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 3,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gpt_neox": _COMMON,
    "opt": {**_COMMON, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "bloom": _BLOOM,
    "falcon": _COMMON,
    "olmo": _GROUPED,
    "olmo2": _GROUPED,
    "olmo3": {**_GROUPED, "sliding_window": 16, "num_hidden_layers": 4},
    "smollm3": {**_GROUPED, "num_hidden_layers": 4},
    "seed_oss": {**_GROUPED, "head_dim": 16},
    "starcoder2": {**_GROUPED, "sliding_window": 16},
    "granite": _GROUPED,
    "nanochat": {**_GROUPED, "head_dim": 16},
    "mixtral": {**_GROUPED, "num_local_experts": 4},
    "qwen2_moe": {
        **_GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 64,
    },
    "olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **_GROUPED,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "granitemoehybrid": {
        **_GROUPED,
        **_MAMBA,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 64,
    },
    "gpt_oss": {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
    "afmoe": {
        **_GROUPED,
        "head_dim": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "num_dense_layers": 1,
        "sliding_window": 16,
    },
    "openai-gpt": {"vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 3, "n_head": 4},
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "deepseek_v4": {
        **_COMMON,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "qk_rope_head_dim": 16,
        "q_lora_rank": 32,
        "o_lora_rank": 32,
        "o_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "index_head_dim": 32,
        "index_n_heads": 4,
        "index_topk": 8,
    },
}


def build_family(family: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**FAMILIES.get(family, _COMMON), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Routers and other parameters that Transformers leaves uninitialized.
        if not bool(torch.isfinite(parameter).all()) or not bool(parameter.any()):
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def build_random(config: PretrainedConfig, *, std: float, seed: int = 0) -> PreTrainedModel:
    """Build a model of any configuration with all parameters sampled randomly."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


def write_family(folder: Path, family: str, **changes: Any) -> PreTrainedModel:
    """Write a tiny model; return it."""
    model = build_family(family, **changes)
    model.save_pretrained(folder, max_shard_size="200KB")
    return model


def write_decided_family(folder: Path, family: str = "llama", **changes: Any) -> PreTrainedModel:
    """Write a tiny model with weights large enough that predictions depend on its blocks."""
    model = build_family(family, **changes)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(5)
    model.save_pretrained(folder)
    return model


def token_lists(samples: int = 8, length: int = 48, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (samples, length), generator=generator)
    return ids.tolist()
