"""A model's hyperparameters as GGUF metadata, with checks of what llama.cpp does not support.

Source:
    llama.cpp ``src/models/`` (what each architecture reads and assumes) and ``conversion/`` (the
    corresponding config keys), as of November 2026.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from halfbyte.convert.gguf_architecture import Architecture
from halfbyte.convert.gguf_fields import head_size, normalize_config, require_number
from halfbyte.convert.gguf_positions import (
    LONGROPE,
    describe_positions,
    find_original_length,
    read_rope_settings,
)
from halfbyte.errors import ConfigError

GEMMA_27B = {"gemma2": 46, "gemma3": 62}
"""Number of blocks by which llama.cpp recognizes the models with another scale of queries."""
NO_ROPE_STEP = 4
"""In llama.cpp, every fourth block of SmolLM3 has no positional embeddings."""
GEMMA3_PATTERN = 6


def describe_model(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the hyperparameters as GGUF metadata.

    Args:
        architecture: The architecture.
        config: ``config.json``.

    Returns:
        The key-value pairs.

    Raises:
        ConfigError: A value is missing, or llama.cpp does not support it.
    """
    config = normalize_config(config)
    name, heads = architecture.name, require_number(config, "num_attention_heads", int)
    _check_activation(architecture, config)
    pairs: dict[str, Any] = {
        f"{name}.block_count": require_number(config, "num_hidden_layers", int),
        f"{name}.context_length": require_number(config, "max_position_embeddings", int),
        f"{name}.embedding_length": require_number(config, "hidden_size", int),
        f"{name}.feed_forward_length": require_number(config, "intermediate_size", int),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": require_number(
            config, "num_key_value_heads", int, heads
        ),
        f"{name}.vocab_size": require_number(config, "vocab_size", int),
    }
    norm = "layer_norm_rms" if architecture.epsilon == "rms_norm_eps" else "layer_norm"
    pairs[f"{name}.attention.{norm}_epsilon"] = require_number(config, architecture.epsilon, float)
    width = head_size(config)
    if architecture.writes_head_size:
        pairs[f"{name}.attention.key_length"] = width
        pairs[f"{name}.attention.value_length"] = width
    if architecture.has_rotary:
        pairs |= describe_positions(architecture, config)
    if architecture.normalizes_experts is not None:
        pairs |= _describe_experts(architecture, config)
    if name in _SPECIFIC:
        pairs |= {f"{name}.{key}": value for key, value in _SPECIFIC[name](config).items()}
    return pairs


def list_limitations(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """List the differences between the model and what llama.cpp computes."""
    notes = []
    window = config.get("sliding_window")
    has_window = isinstance(window, int) and config.get("use_sliding_window") is not False
    if has_window and not architecture.has_window:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: beyond {window} tokens it "
            "attends to more tokens than the model does"
        )
    if architecture.name == "gptneox" and config.get("hidden_act") == "gelu":
        notes.append(
            "llama.cpp computes this model's GELU with the tanh approximation: each activation "
            "differs by up to 0.0005"
        )
    if architecture.has_longrope and read_rope_settings(config)["rope_type"] in LONGROPE:
        notes.append(
            "llama.cpp chooses between the RoPE factors for short and long texts by its context "
            "size, not by the length of the text: if --ctx-size is more than "
            f"{find_original_length(config)}, it uses those for long texts"
        )
    return tuple(notes)


def _check_activation(architecture: Architecture, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config.get("hidden_act")
    if found is not None and found not in architecture.activations:
        raise ConfigError(
            f"Cannot write GGUF: the model's activation is '{str(found)[:40]}', but llama.cpp's "
            f"'{architecture.name}' has {architecture.activations[0]}. Choose another format."
        )


def _describe_experts(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the experts; llama.cpp supports only one arrangement per architecture."""
    name = architecture.name
    normalizes = config.get("norm_topk_prob", architecture.normalizes_experts)
    sparse_step = require_number(config, "decoder_sparse_step", int, 1)
    unsupported = [
        setting
        for setting, is_unsupported in (
            (f"norm_topk_prob {normalizes}", bool(normalizes) != architecture.normalizes_experts),
            (f"decoder_sparse_step {sparse_step}", sparse_step != 1),
            ("mlp_only_layers", bool(config.get("mlp_only_layers"))),
        )
        if is_unsupported
    ]
    if unsupported:
        kind = "normalized" if architecture.normalizes_experts else "unnormalized"
        raise ConfigError(
            f"Cannot write GGUF: the config has {' and '.join(unsupported)}, but llama.cpp's "
            f"'{name}' has experts in every block, with {kind} weights. Choose another format."
        )
    pairs: dict[str, Any] = {
        "expert_count": require_number(config, "num_local_experts", int),
        "expert_used_count": require_number(config, "num_experts_per_tok", int),
    }
    for ours, theirs in (
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ):
        if config.get(ours):
            pairs[theirs] = require_number(config, ours, int)
    return {f"{name}.{key}": value for key, value in pairs.items()}


def _check_query_scale(name: str, config: Mapping[str, Any]) -> None:
    """Check the scale of queries: by the head size; in 27B models, by hidden size over heads."""
    if config["num_hidden_layers"] == GEMMA_27B[name]:
        width = require_number(config, "hidden_size", int) // require_number(
            config, "num_attention_heads", int
        )
    else:
        width = head_size(config)
    scale = config.get("query_pre_attn_scalar", width)
    if scale != width:
        raise ConfigError(
            f"Cannot write GGUF: query_pre_attn_scalar in the config is {scale}, but llama.cpp "
            f"uses the head size {width}. Choose another format."
        )


def _describe_gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_query_scale("gemma2", config)
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = [key for key in caps if config.get(key, 1) is None]
    if absent:
        raise ConfigError(
            f"Cannot write GGUF: the config has no {' and no '.join(absent)}, but llama.cpp's "
            "'gemma2' always caps both logits. Choose another format."
        )
    return {
        **{key: require_number(config, key, float) for key in caps},
        "attention.sliding_window": require_number(config, "sliding_window", int),
    }


def _describe_gemma3(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_query_scale("gemma3", config)
    if config.get("attn_logit_softcapping"):
        raise ConfigError(
            "Cannot write GGUF: the config has attn_logit_softcapping, which llama.cpp's 'gemma3' "
            "does not support. Choose another format."
        )
    local = config.get("rope_parameters", {}).get("sliding_attention", {}).get("rope_theta")
    pairs = _describe_window(config, config.get("sliding_window_pattern", GEMMA3_PATTERN))
    pairs["rope.freq_base_swa"] = float(
        local or require_number(config, "rope_local_base_freq", float, 10000.0)
    )
    if config.get("final_logit_softcapping"):
        pairs["final_logit_softcapping"] = require_number(config, "final_logit_softcapping", float)
    return pairs


def _describe_olmo(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the window of OLMo 3, which is OLMo 2 with a sliding window in some blocks."""
    has_window = "sliding_attention" in (config.get("layer_types") or ())
    return _describe_window(config, 4) if has_window else {}


def _describe_window(config: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """Describe the window and which blocks have it: if not listed, all but every n-th."""
    kinds = config.get("layer_types")
    count = require_number(config, "num_hidden_layers", int)
    has_window = [(number + 1) % pattern != 0 for number in range(count)]
    if isinstance(kinds, list):
        has_window = [kind == "sliding_attention" for kind in kinds]
    return {
        "attention.sliding_window": require_number(config, "sliding_window", int),
        "attention.sliding_window_pattern": has_window,
    }


def _describe_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {theirs: require_number(config, ours, float, 1.0) for ours, theirs in keys.items()}


def _check_smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    count = require_number(config, "num_hidden_layers", int)
    expected = [int((number + 1) % NO_ROPE_STEP != 0) for number in range(count)]
    found = config.get("no_rope_layers") or expected
    step = config.get("no_rope_layer_interval", NO_ROPE_STEP)
    if list(found) != expected or (not config.get("no_rope_layers") and step != NO_ROPE_STEP):
        raise ConfigError(
            f"Cannot write GGUF: llama.cpp's 'smollm3' has no RoPE in every {NO_ROPE_STEP}th "
            "block, but no_rope_layers in the config lists others. Choose another format."
        )
    return {}


def _check_olmoe(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    value_heads = config.get("num_key_value_heads") or heads
    if config.get("clip_qkv") or value_heads != heads:
        raise ConfigError(
            f"Cannot write GGUF: the config has clip_qkv {config.get('clip_qkv')} and {value_heads}"
            f" key and value heads for {heads} heads; llama.cpp's 'olmoe' supports no clipping and "
            "needs equal numbers of heads. Choose another format."
        )
    return {}


def _describe_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        raise ConfigError(
            "Cannot write GGUF: the config changes the scale of attention "
            "(scale_attn_by_inverse_layer_idx, scale_attn_weights), which llama.cpp's 'gpt2' does "
            "not support. Choose another format."
        )
    return {}


def _describe_gptneox(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_parallel_residual": bool(config.get("use_parallel_residual", True))}


_SPECIFIC: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _describe_gemma2,
    "gemma3": _describe_gemma3,
    "gpt2": _describe_gpt2,
    "gptneox": _describe_gptneox,
    "granite": _describe_granite,
    "olmo2": _describe_olmo,
    "olmoe": _check_olmoe,
    "smollm3": _check_smollm3,
}
"""Functions by architecture that check and describe its specific settings."""
