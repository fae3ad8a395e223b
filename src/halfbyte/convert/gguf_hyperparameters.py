"""A model's hyperparameters under GGUF's keys, and what of them llama.cpp does otherwise.

Source:
    llama.cpp ``src/models/`` (what each family reads, and what it takes for granted) and
    ``conversion/`` (which of a config it is), as read in November 2026.
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
"""Blocks by which llama.cpp recognises the models that scale queries by another width."""
NO_ROPE_STEP = 4
"""In SmolLM3 each block of this number has no positions; llama.cpp has it so."""
GEMMA3_PATTERN = 6


def describe_model(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the hyperparameters as GGUF pairs.

    Args:
        architecture: The family.
        config: ``config.json``.

    Returns:
        The pairs.

    Raises:
        ConfigError: Something is missing, or the model computes what llama.cpp does not.
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
    if name in _MORE:
        pairs |= {f"{name}.{key}": value for key, value in _MORE[name](config).items()}
    return pairs


def list_limitations(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what llama.cpp does not do of what the model does."""
    notes = []
    window = config.get("sliding_window")
    has_none = not isinstance(window, int) or config.get("use_sliding_window") is False
    if not architecture.has_window and not has_none:
        notes.append(
            f"llama.cpp has no sliding window for this architecture: beyond {window} tokens it "
            "attends to more than the model does"
        )
    if architecture.name == "gptneox" and config.get("hidden_act") == "gelu":
        notes.append(
            "llama.cpp computes this model's GELU by the hyperbolic tangent: it differs by up to "
            "0.0005 in each activation"
        )
    if architecture.has_longrope and read_rope_settings(config)["rope_type"] in LONGROPE:
        notes.append(
            "llama.cpp chooses between the factors for short and for long texts by the size of "
            "its context, not by the text's: with --ctx-size of more than "
            f"{find_original_length(config)} it takes the long ones"
        )
    return tuple(notes)


def _check_activation(architecture: Architecture, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config.get("hidden_act")
    if found is not None and found not in architecture.activations:
        raise ConfigError(
            f"Cannot write GGUF: the model's activation is '{str(found)[:40]}', and llama.cpp's "
            f"'{architecture.name}' computes {architecture.activations[0]}. Choose another format."
        )


def _describe_experts(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Count the experts; llama.cpp has them in every block, and weighs them in one way."""
    name = architecture.name
    asked = config.get("norm_topk_prob", architecture.normalizes_experts)
    sparse = require_number(config, "decoder_sparse_step", int, 1)
    others = [
        what
        for what, is_so in (
            (f"norm_topk_prob {asked}", bool(asked) is not architecture.normalizes_experts),
            (f"decoder_sparse_step {sparse}", sparse != 1),
            ("mlp_only_layers", bool(config.get("mlp_only_layers"))),
        )
        if is_so
    ]
    if others:
        raise ConfigError(
            f"Cannot write GGUF: the config has {' and '.join(others)}, and llama.cpp's '{name}' "
            f"has experts in every block, their weights {_SUMMED[architecture.normalizes_experts]}."
            " Choose another format."
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


_SUMMED = {True: "made to sum to one", False: "as the router gives them", None: ""}


def _check_query_scale(name: str, config: Mapping[str, Any]) -> None:
    """llama.cpp scales by the head's width, of the 27B models by hidden size over heads."""
    if config["num_hidden_layers"] == GEMMA_27B[name]:
        width = require_number(config, "hidden_size", int) // require_number(
            config, "num_attention_heads", int
        )
    else:
        width = head_size(config)
    scale = config.get("query_pre_attn_scalar", width)
    if scale != width:
        raise ConfigError(
            f"Cannot write GGUF: the config's query_pre_attn_scalar is {scale}, and llama.cpp "
            f"takes the head size {width}. Choose another format."
        )


def _describe_gemma2(config: Mapping[str, Any]) -> dict[str, Any]:
    _check_query_scale("gemma2", config)
    caps = ("attn_logit_softcapping", "final_logit_softcapping")
    absent = [key for key in caps if config.get(key, 1) is None]
    if absent:
        raise ConfigError(
            f"Cannot write GGUF: the config has no {' and no '.join(absent)}, and llama.cpp's "
            "'gemma2' caps both logits. Choose another format."
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
            "has not. Choose another format."
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
    """OLMo 3 is OLMo 2 with a window in some blocks."""
    has_window = "sliding_attention" in (config.get("layer_types") or ())
    return _describe_window(config, 4) if has_window else {}


def _describe_window(config: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """Name the window, and the blocks that have it: all but each ``pattern``-th, if not listed."""
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
            f"Cannot write GGUF: llama.cpp's 'smollm3' has no positions in each {NO_ROPE_STEP}th "
            "block, and the config's no_rope_layers says otherwise. Choose another format."
        )
    return {}


def _check_olmoe(config: Mapping[str, Any]) -> dict[str, Any]:
    heads = config["num_attention_heads"]
    value_heads = config.get("num_key_value_heads") or heads
    if config.get("clip_qkv") or value_heads != heads:
        raise ConfigError(
            f"Cannot write GGUF: the config has clip_qkv {config.get('clip_qkv')} and {value_heads}"
            f" key and value heads for {heads} heads; llama.cpp's 'olmoe' clips nothing and has as "
            "many of each. Choose another format."
        )
    return {}


def _describe_gpt2(config: Mapping[str, Any]) -> dict[str, Any]:
    if config.get("scale_attn_by_inverse_layer_idx") or config.get("scale_attn_weights") is False:
        raise ConfigError(
            "Cannot write GGUF: the config scales attention in another way "
            "(scale_attn_by_inverse_layer_idx, scale_attn_weights), which llama.cpp's 'gpt2' does "
            "not. Choose another format."
        )
    return {}


def _describe_gptneox(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_parallel_residual": bool(config.get("use_parallel_residual", True))}


_MORE: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _describe_gemma2,
    "gemma3": _describe_gemma3,
    "gpt2": _describe_gpt2,
    "gptneox": _describe_gptneox,
    "granite": _describe_granite,
    "olmo2": _describe_olmo,
    "olmoe": _check_olmoe,
    "smollm3": _check_smollm3,
}
"""By architecture: what it needs beyond what all need."""
