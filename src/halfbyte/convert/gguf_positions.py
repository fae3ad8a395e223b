"""Rotary position embeddings (RoPE) as GGUF metadata and tensors.

Source:
    llama.cpp ``src/llama-model.cpp`` (keys read for every architecture), ``src/llama-context.cpp``
    and ``ggml/src/ggml.c`` (how YaRN is computed), as of November 2026; Transformers
    ``modeling_rope_utils.py`` (meaning of its settings).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfbyte.convert.gguf_architecture import Architecture
from halfbyte.convert.gguf_fields import head_size, normalize_config, require_number
from halfbyte.errors import ConfigError

LONGROPE = ("longrope", "su")
_WHERE = "the config's rope_parameters"
_YARN = {"beta_fast": 32, "beta_slow": 1, "truncate": True}
"""The YaRN settings that llama.cpp assumes."""
LONG, SHORT = "long_factor", "short_factor"
FACTOR_TENSORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": LONG,
    "rope_factors_short.weight": SHORT,
}
"""Tensors of a file that are computed from the config, and from which part of it."""


def read_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Read a config's RoPE settings, under the key names of Transformers 5.

    For models with a sliding window, these are the settings of the blocks with full attention.
    """
    settings = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        settings |= {"rope_type": scaling.get("type", "default"), **scaling}
    if "partial_rotary_factor" in config:
        settings["partial_rotary_factor"] = config["partial_rotary_factor"]
    parameters = config.get("rope_parameters")
    if not isinstance(parameters, dict):
        return settings
    full_attention = parameters.get("full_attention", parameters)
    return settings | (full_attention if isinstance(full_attention, dict) else {})


def make_rope_factors(config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Compute the divisors of the rotary frequencies, which GGUF stores as tensors.

    Args:
        config: ``config.json``.

    Returns:
        float32 [rotary dimension / 2] by name in :data:`FACTOR_TENSORS`: one for Llama 3's
        scaling, two for longrope, none for other types.

    Raises:
        ConfigError: longrope's factors are missing or have the wrong number of values.

    Source:
        Transformers ``modeling_rope_utils.py``, ``_compute_llama3_parameters`` and
        ``_compute_longrope_parameters``.
    """
    config = normalize_config(config)
    settings = read_rope_settings(config)
    if settings["rope_type"] in LONGROPE:
        return {
            name: _check_factors(settings.get(part), part, _compute_rotary_dim(config))
            for name, part in FACTOR_TENSORS.items()
            if part in (LONG, SHORT)
        }
    if settings["rope_type"] != "llama3":
        return {}
    width = head_size(config)
    frequencies = require_number(settings, "rope_theta", float, where=_WHERE) ** -(
        torch.arange(0, width, 2, dtype=torch.float64) / width
    )
    lengths = 2 * math.pi / frequencies
    original, factor = (
        find_original_length(config),
        require_number(settings, "factor", float, where=_WHERE),
    )
    low = require_number(settings, "low_freq_factor", float, where=_WHERE)
    high = require_number(settings, "high_freq_factor", float, where=_WHERE)
    smooth = ((original / lengths - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / factor + smooth)
    return {"rope_freqs.weight": factors.to(torch.float32)}


def find_original_length(config: Mapping[str, Any]) -> int:
    """Find the context length before RoPE scaling, as Transformers does.

    Args:
        config: ``config.json``.

    Returns:
        The length. Unit: tokens.

    Raises:
        ConfigError: The config has no length, or one that is not a positive number.
    """
    key = "original_max_position_embeddings"
    length = require_number(config, "max_position_embeddings", int)
    return require_number(
        config, key, int, require_number(read_rope_settings(config), key, int, length, where=_WHERE)
    )


def _check_factors(values: object, part: str, width: int) -> Tensor:
    if not isinstance(values, list) or len(values) != width // 2:
        found = len(values) if isinstance(values, list) else "no list"
        raise ConfigError(
            f"Cannot write GGUF: {part} in the config has {found} numbers, but a rotary dimension "
            f"of {width} needs {width // 2}. The config is damaged; download it again."
        )
    return torch.tensor(values, dtype=torch.float32)


def _compute_rotary_dim(config: Mapping[str, Any]) -> int:
    """Return the number of dimensions of each head with rotary embeddings."""
    return int(head_size(config) * _read_rotary_fraction(read_rope_settings(config)))


def _read_rotary_fraction(settings: Mapping[str, Any]) -> float:
    return require_number(settings, "partial_rotary_factor", float, 1.0, where=_WHERE)


def describe_positions(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe the RoPE settings as GGUF metadata.

    Args:
        architecture: The architecture.
        config: ``config.json`` with normalized key names.

    Returns:
        The key-value pairs.

    Raises:
        ConfigError: A number is missing, or llama.cpp does not support a setting.
    """
    name, settings = architecture.name, read_rope_settings(config)
    base = require_number(settings, "rope_theta", float, where=_WHERE)
    pairs: dict[str, Any] = {f"{name}.rope.freq_base": base}
    fraction = _read_rotary_fraction(settings)
    if architecture.reorders_heads or architecture.has_partial_rotary:
        pairs[f"{name}.rope.dimension_count"] = _compute_rotary_dim(config)
    if fraction != 1.0 and not architecture.has_partial_rotary:
        raise ConfigError(
            f"Cannot write GGUF: the model has RoPE on {fraction:.0%} of each head, but "
            f"llama.cpp's '{name}' has it on all of it. Choose another format."
        )
    kind = settings["rope_type"]
    scaling: dict[str, Any] = {}
    if kind == "linear":
        scaling = {"type": kind, "factor": require_number(settings, "factor", float, where=_WHERE)}
    elif kind == "yarn":
        scaling = _describe_yarn(config)
    elif kind in LONGROPE and architecture.has_longrope:
        scaling = _describe_longrope(config)
    elif kind not in ("default", "llama3"):
        raise ConfigError(
            f"Cannot write GGUF for the RoPE type '{kind}'; '{name}' supports default, linear, "
            f"yarn{', longrope' if architecture.has_longrope else ''} and llama3. "
            "Choose another format."
        )
    return pairs | {f"{name}.rope.scaling.{key}": value for key, value in scaling.items()}


def _describe_yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe YaRN: the scaling factor, and the attention factor if it is not the default."""
    settings, original = read_rope_settings(config), find_original_length(config)
    unsupported = [
        f"{key} {settings[key]}"
        for key, value in _YARN.items()
        if settings.get(key) is not None and settings[key] != value
    ]
    if unsupported:
        raise ConfigError(
            f"Cannot write GGUF: {_WHERE} have {' and '.join(unsupported)}, but llama.cpp computes "
            f"YaRN with {', '.join(f'{key} {value}' for key, value in _YARN.items())}. Choose "
            "another format."
        )
    length_ratio = require_number(config, "max_position_embeddings", int) / original
    factor = require_number(settings, "factor", float, length_ratio, where=_WHERE)
    default_attention = _compute_yarn_attention(factor)
    attention = default_attention
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        parts = [
            require_number(settings, k, float, where=_WHERE) for k in ("mscale", "mscale_all_dim")
        ]
        attention = _compute_yarn_attention(factor, parts[0])
        attention /= _compute_yarn_attention(factor, parts[1])
    attention = require_number(settings, "attention_factor", float, attention, where=_WHERE)
    # llama.cpp multiplies the default factor by this.
    extra = attention / default_attention
    pairs = {"type": "yarn", "factor": factor, "original_context_length": original}
    return pairs if math.isclose(extra, 1, rel_tol=1e-6) else {**pairs, "attn_factor": extra}


def _compute_yarn_attention(factor: float, mscale: float = 1.0) -> float:
    """Compute by how much YaRN scales attention for a scaling factor."""
    return 1 + 0.1 * mscale * math.log(factor) if factor > 1 else 1.0


def _describe_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Describe longrope: the length from which the long factors apply, and the attention factor."""
    settings, original = read_rope_settings(config), find_original_length(config)
    length_ratio = require_number(config, "max_position_embeddings", int) / original
    factor = require_number(settings, "factor", float, length_ratio, where=_WHERE)
    attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return {
        "original_context_length": original,
        "attn_factor": require_number(settings, "attention_factor", float, attention, where=_WHERE),
    }
