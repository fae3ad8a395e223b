"""A model's hyperparameters under GGUF's keys, and what of them llama.cpp does otherwise.

Source:
    llama.cpp ``src/models/`` (what each family reads, and what it takes for granted) and
    ``conversion/`` (which of a config it is), as read in November 2026.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.convert.gguf_architecture import Architecture
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
    name, heads = architecture.name, int(_need(config, "num_attention_heads"))
    _check_activation(architecture, config)
    pairs: dict[str, Any] = {
        f"{name}.block_count": int(_need(config, "num_hidden_layers")),
        f"{name}.context_length": int(_need(config, "max_position_embeddings")),
        f"{name}.embedding_length": int(_need(config, "hidden_size")),
        f"{name}.feed_forward_length": int(_need(config, "intermediate_size")),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{name}.vocab_size": int(_need(config, "vocab_size")),
    }
    if name == "starcoder2":
        pairs[f"{name}.attention.layer_norm_epsilon"] = float(_need(config, "norm_epsilon"))
    else:
        pairs[f"{name}.attention.layer_norm_rms_epsilon"] = float(_need(config, "rms_norm_eps"))
    width = head_size(config)
    if architecture.writes_head_size:
        pairs[f"{name}.attention.key_length"] = width
        pairs[f"{name}.attention.value_length"] = width
    pairs |= _describe_positions(architecture, config)
    if name in _MORE:
        pairs |= {f"{name}.{key}": value for key, value in _MORE[name](config).items()}
    return pairs


def note_limits(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what llama.cpp does not do of what the model does."""
    window = config.get("sliding_window")
    has_none = not isinstance(window, int) or config.get("use_sliding_window") is False
    if architecture.has_window or has_none:
        return ()
    return (
        f"llama.cpp has no sliding window for this architecture: beyond {window} tokens it "
        "attends to more than the model does",
    )


def head_size(config: Mapping[str, Any]) -> int:
    """Give the width of an attention head."""
    width = config.get("head_dim")
    return int(width or int(_need(config, "hidden_size")) // int(config["num_attention_heads"]))


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what a config says of rotary positions, under Transformers 5's names.

    Of models with a sliding window these are the settings of the blocks that see everything.
    """
    settings = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        settings |= {"rope_type": scaling.get("type", "default"), **scaling}
    if "partial_rotary_factor" in config:
        settings["partial_rotary_factor"] = config["partial_rotary_factor"]
    own = config.get("rope_parameters")
    if not isinstance(own, dict):
        return settings
    full = own.get("full_attention", own)
    return settings | (full if isinstance(full, dict) else {})


def make_rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Make Llama 3's divisors of the rotary frequencies, which GGUF keeps as a tensor.

    Args:
        config: ``config.json``.

    Returns:
        float32 [head size / 2]; None where positions are not scaled in that way.

    Source:
        Transformers ``modeling_rope_utils.py``, ``_compute_llama3_parameters``.
    """
    settings = rope_settings(config)
    if settings["rope_type"] != "llama3":
        return None
    width = head_size(config)
    frequencies = float(settings["rope_theta"]) ** -(
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    lengths = 2 * math.pi / frequencies
    original, factor = float(settings["original_max_position_embeddings"]), settings["factor"]
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    smooth = ((original / lengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return factors.to(torch.float32)


def _need(config: Mapping[str, Any], key: str) -> Any:
    if config.get(key) is None:
        raise ConfigError(
            f"Cannot write GGUF: config.json has no {key}. Save the config again with "
            "AutoConfig.from_pretrained(...).save_pretrained(...)."
        )
    return config[key]


def _check_activation(architecture: Architecture, config: Mapping[str, Any]) -> None:
    found = config.get("hidden_activation") or config.get("hidden_act")
    if found is not None and found not in architecture.activations:
        raise ConfigError(
            f"Cannot write GGUF: the model's activation is '{str(found)[:40]}', and llama.cpp's "
            f"'{architecture.name}' computes {architecture.activations[0]}. Choose another format."
        )


def _describe_positions(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    name, settings, width = architecture.name, rope_settings(config), head_size(config)
    pairs: dict[str, Any] = {f"{name}.rope.freq_base": float(settings["rope_theta"])}
    share = float(settings.get("partial_rotary_factor") or 1.0)
    if architecture.reorders_heads or name == "phi3":
        pairs[f"{name}.rope.dimension_count"] = int(width * share)
    if share != 1.0 and name != "phi3":
        raise ConfigError(
            f"Cannot write GGUF: positions turn {share:.0%} of each head, and llama.cpp's "
            f"'{name}' turns all of it. Choose another format."
        )
    kind = settings["rope_type"]
    if kind == "linear":
        pairs[f"{name}.rope.scaling.type"] = "linear"
        pairs[f"{name}.rope.scaling.factor"] = float(settings["factor"])
    elif kind == "yarn":
        original = int(settings["original_max_position_embeddings"])
        pairs[f"{name}.rope.scaling.type"] = "yarn"
        pairs[f"{name}.rope.scaling.factor"] = float(settings["factor"])
        pairs[f"{name}.rope.scaling.original_context_length"] = original
    elif kind not in ("default", "llama3"):
        raise ConfigError(
            f"Cannot write GGUF for positions of the type '{kind}'; written are default, linear, "
            "yarn and llama3. Choose another format."
        )
    return pairs


def _check_query_scale(name: str, config: Mapping[str, Any]) -> None:
    """llama.cpp scales by the head's width, of the 27B models by hidden size over heads."""
    if config["num_hidden_layers"] == GEMMA_27B[name]:
        width = int(config["hidden_size"]) // int(config["num_attention_heads"])
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
    return {
        "attn_logit_softcapping": float(config["attn_logit_softcapping"]),
        "final_logit_softcapping": float(config["final_logit_softcapping"]),
        "attention.sliding_window": int(config["sliding_window"]),
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
    pairs["rope.freq_base_swa"] = float(local or config.get("rope_local_base_freq", 10000.0))
    if config.get("final_logit_softcapping"):
        pairs["final_logit_softcapping"] = float(config["final_logit_softcapping"])
    return pairs


def _describe_olmo(config: Mapping[str, Any]) -> dict[str, Any]:
    """OLMo 3 is OLMo 2 with a window in some blocks."""
    has_window = "sliding_attention" in (config.get("layer_types") or ())
    return _describe_window(config, 4) if has_window else {}


def _describe_window(config: Mapping[str, Any], pattern: int) -> dict[str, Any]:
    """Name the window, and the blocks that have it: all but each ``pattern``-th, if not listed."""
    kinds = config.get("layer_types")
    count = int(config["num_hidden_layers"])
    has_window = [(number + 1) % pattern != 0 for number in range(count)]
    if isinstance(kinds, list):
        has_window = [kind == "sliding_attention" for kind in kinds]
    return {
        "attention.sliding_window": int(_need(config, "sliding_window")),
        "attention.sliding_window_pattern": has_window,
    }


def _describe_granite(config: Mapping[str, Any]) -> dict[str, Any]:
    keys = {
        "attention_multiplier": "attention.scale",
        "embedding_multiplier": "embedding_scale",
        "residual_multiplier": "residual_scale",
        "logits_scaling": "logit_scale",
    }
    return {theirs: float(config.get(ours) or 1.0) for ours, theirs in keys.items()}


def _check_smollm3(config: Mapping[str, Any]) -> dict[str, Any]:
    count = int(config["num_hidden_layers"])
    expected = [int((number + 1) % NO_ROPE_STEP != 0) for number in range(count)]
    found = config.get("no_rope_layers") or expected
    step = config.get("no_rope_layer_interval", NO_ROPE_STEP)
    if list(found) != expected or (not config.get("no_rope_layers") and step != NO_ROPE_STEP):
        raise ConfigError(
            f"Cannot write GGUF: llama.cpp's 'smollm3' has no positions in each {NO_ROPE_STEP}th "
            "block, and the config's no_rope_layers says otherwise. Choose another format."
        )
    return {}


_MORE: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "gemma2": _describe_gemma2,
    "gemma3": _describe_gemma3,
    "granite": _describe_granite,
    "olmo2": _describe_olmo,
    "smollm3": _check_smollm3,
}
"""By architecture: what it needs beyond what all need."""
