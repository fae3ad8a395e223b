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
LONGROPE = ("longrope", "su")
NO_ROPE_STEP = 4
"""In SmolLM3 each block of this number has no positions; llama.cpp has it so."""
GEMMA3_PATTERN = 6

OTHER_NAMES = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_positions": "max_position_embeddings",
    "n_inner": "intermediate_size",
    "activation_function": "hidden_act",
    "num_experts": "num_local_experts",
    "rotary_pct": "partial_rotary_factor",
    "rotary_emb_base": "rope_theta",
}
"""What some families call what most call otherwise."""
LONG, SHORT = "long_factor", "short_factor"
FACTOR_TENSORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": LONG,
    "rope_factors_short.weight": SHORT,
}
"""Tensors of a file that are made from the config: what of it."""


def spell_out(config: Mapping[str, Any]) -> dict[str, Any]:
    """Give a config under the names that most families use.

    Args:
        config: ``config.json``.

    Returns:
        The same values, and GPT-2's width of the MLP where it says none.
    """
    spelled = {OTHER_NAMES.get(key, key): value for key, value in config.items()}
    if "n_embd" in config and not spelled.get("intermediate_size"):
        spelled["intermediate_size"] = 4 * int(config["n_embd"])
    return spelled


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
    config = spell_out(config)
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
    norm = "layer_norm_rms" if architecture.epsilon == "rms_norm_eps" else "layer_norm"
    pairs[f"{name}.attention.{norm}_epsilon"] = float(_need(config, architecture.epsilon))
    width = head_size(config)
    if architecture.writes_head_size:
        pairs[f"{name}.attention.key_length"] = width
        pairs[f"{name}.attention.value_length"] = width
    if architecture.has_rotary:
        pairs |= _describe_positions(architecture, config)
    if architecture.normalises_experts is not None:
        pairs |= _describe_experts(architecture, config)
    if name in _MORE:
        pairs |= {f"{name}.{key}": value for key, value in _MORE[name](config).items()}
    return pairs


def note_limits(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
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
    if architecture.has_longrope and rope_settings(config)["rope_type"] in LONGROPE:
        original = config.get("original_max_position_embeddings")
        notes.append(
            "llama.cpp chooses between the factors for short and for long texts by the size of "
            f"its context, not by the text's: with --ctx-size of more than {original} it takes the "
            "long ones"
        )
    return tuple(notes)


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


def make_rope_factors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Make the divisors of the rotary frequencies, which GGUF keeps as tensors.

    Args:
        config: ``config.json``.

    Returns:
        By the name in :data:`FACTOR_TENSORS`, float32 [turned width / 2]: one for Llama 3's
        scaling, two for longrope, none where positions are not scaled in such a way.

    Raises:
        ConfigError: longrope's factors are missing or not as many as they must be.

    Source:
        Transformers ``modeling_rope_utils.py``, ``_compute_llama3_parameters`` and
        ``_compute_longrope_parameters``.
    """
    config = spell_out(config)
    settings = rope_settings(config)
    if settings["rope_type"] in LONGROPE:
        return {
            name: _need_factors(settings.get(part), part, _turned_width(config))
            for name, part in FACTOR_TENSORS.items()
            if part in (LONG, SHORT)
        }
    if settings["rope_type"] != "llama3":
        return {}
    width = head_size(config)
    frequencies = float(settings["rope_theta"]) ** -(
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    lengths = 2 * math.pi / frequencies
    original, factor = float(settings["original_max_position_embeddings"]), settings["factor"]
    low, high = float(settings["low_freq_factor"]), float(settings["high_freq_factor"])
    smooth = ((original / lengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_freqs.weight": factors.to(torch.float32)}


def _need_factors(values: object, part: str, width: int) -> Tensor:
    if not isinstance(values, list) or len(values) != width // 2:
        found = len(values) if isinstance(values, list) else "no list"
        raise ConfigError(
            f"Cannot write GGUF: the config's {part} has {found} numbers, and positions turn "
            f"{width} of each head, which needs {width // 2}. The config is damaged."
        )
    return torch.tensor(values, dtype=torch.float32)


def _turned_width(config: Mapping[str, Any]) -> int:
    """Give how much of a head positions turn."""
    return int(head_size(config) * float(rope_settings(config).get("partial_rotary_factor") or 1.0))


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
    name, settings = architecture.name, rope_settings(config)
    pairs: dict[str, Any] = {f"{name}.rope.freq_base": float(settings["rope_theta"])}
    share = float(settings.get("partial_rotary_factor") or 1.0)
    if architecture.reorders_heads or architecture.turns_part:
        pairs[f"{name}.rope.dimension_count"] = _turned_width(config)
    if share != 1.0 and not architecture.turns_part:
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
    elif kind in LONGROPE and architecture.has_longrope:
        pairs |= {f"{name}.rope.scaling.{key}": v for key, v in _describe_longrope(config).items()}
    elif kind not in ("default", "llama3"):
        raise ConfigError(
            f"Cannot write GGUF for positions of the type '{kind}'; written for '{name}' are "
            f"default, linear, yarn{', longrope' if architecture.has_longrope else ''} and llama3. "
            "Choose another format."
        )
    return pairs


def _describe_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say from where on the long factors hold, and by what attention grows with them."""
    settings = rope_settings(config)
    length = int(_need(config, "max_position_embeddings"))
    original = config.get("original_max_position_embeddings")
    original = int(original or settings.get("original_max_position_embeddings") or length)
    times = length / original
    grown = math.sqrt(1 + math.log(times) / math.log(original)) if times > 1 else 1.0
    return {
        "original_context_length": original,
        "attn_factor": float(settings.get("attention_factor") or grown),
    }


def _describe_experts(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Count the experts; llama.cpp has them in every block, and weighs them in one way."""
    name = architecture.name
    asked = config.get("norm_topk_prob", architecture.normalises_experts)
    sparse = int(config.get("decoder_sparse_step") or 1)
    others = [
        what
        for what, is_so in (
            (f"norm_topk_prob {asked}", bool(asked) is not architecture.normalises_experts),
            (f"decoder_sparse_step {sparse}", sparse != 1),
            ("mlp_only_layers", bool(config.get("mlp_only_layers"))),
        )
        if is_so
    ]
    if others:
        raise ConfigError(
            f"Cannot write GGUF: the config has {' and '.join(others)}, and llama.cpp's '{name}' "
            f"has experts in every block, their weights {_SUMMED[architecture.normalises_experts]}."
            " Choose another format."
        )
    pairs: dict[str, Any] = {
        "expert_count": int(_need(config, "num_local_experts")),
        "expert_used_count": int(_need(config, "num_experts_per_tok")),
    }
    for ours, theirs in (
        ("moe_intermediate_size", "expert_feed_forward_length"),
        ("shared_expert_intermediate_size", "expert_shared_feed_forward_length"),
    ):
        if config.get(ours):
            pairs[theirs] = int(config[ours])
    return {f"{name}.{key}": value for key, value in pairs.items()}


_SUMMED = {True: "made to sum to one", False: "as the router gives them", None: ""}


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
