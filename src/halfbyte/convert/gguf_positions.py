"""Rotary positions under GGUF's keys and tensors, and what of them llama.cpp does otherwise.

Source:
    llama.cpp ``src/llama-model.cpp`` (keys that every family reads), ``src/llama-context.cpp`` and
    ``ggml/src/ggml.c`` (how YaRN is computed), as read in November 2026; Transformers
    ``modeling_rope_utils.py`` (what its settings mean).
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
"""Of YaRN: what llama.cpp takes for granted."""
LONG, SHORT = "long_factor", "short_factor"
FACTOR_TENSORS = {
    "rope_freqs.weight": "llama3",
    "rope_factors_long.weight": LONG,
    "rope_factors_short.weight": SHORT,
}
"""Tensors of a file that are made from the config: what of it."""


def read_rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
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
    config = normalize_config(config)
    settings = read_rope_settings(config)
    if settings["rope_type"] in LONGROPE:
        return {
            name: _check_factors(settings.get(part), part, _rotary_dim(config))
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
    """Give the length that a model was first trained on, as Transformers finds it.

    Args:
        config: ``config.json``.

    Returns:
        The length. Unit: tokens.

    Raises:
        ConfigError: The config says no length, or one that is no positive number.
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
            f"Cannot write GGUF: the config's {part} has {found} numbers, and positions turn "
            f"{width} of each head, which needs {width // 2}. The config is damaged."
        )
    return torch.tensor(values, dtype=torch.float32)


def _rotary_dim(config: Mapping[str, Any]) -> int:
    """Give how much of a head positions turn."""
    return int(head_size(config) * _rotary_fraction(read_rope_settings(config)))


def _rotary_fraction(settings: Mapping[str, Any]) -> float:
    return require_number(settings, "partial_rotary_factor", float, 1.0, where=_WHERE)


def describe_positions(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Give what GGUF says of rotary positions.

    Args:
        architecture: The family.
        config: ``config.json`` with its names spelled out.

    Returns:
        The pairs.

    Raises:
        ConfigError: A number is missing, or positions turn as they do not in llama.cpp.
    """
    name, settings = architecture.name, read_rope_settings(config)
    base = require_number(settings, "rope_theta", float, where=_WHERE)
    pairs: dict[str, Any] = {f"{name}.rope.freq_base": base}
    share = _rotary_fraction(settings)
    if architecture.reorders_heads or architecture.has_partial_rotary:
        pairs[f"{name}.rope.dimension_count"] = _rotary_dim(config)
    if share != 1.0 and not architecture.has_partial_rotary:
        raise ConfigError(
            f"Cannot write GGUF: positions turn {share:.0%} of each head, and llama.cpp's "
            f"'{name}' turns all of it. Choose another format."
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
            f"Cannot write GGUF for positions of the type '{kind}'; written for '{name}' are "
            f"default, linear, yarn{', longrope' if architecture.has_longrope else ''} and llama3. "
            "Choose another format."
        )
    return pairs | {f"{name}.rope.scaling.{key}": value for key, value in scaling.items()}


def _describe_yarn(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say how far positions are stretched, and by what attention grows beyond the usual."""
    settings, original = read_rope_settings(config), find_original_length(config)
    others = [
        f"{key} {settings[key]}"
        for key, usual in _YARN.items()
        if settings.get(key) is not None and settings[key] != usual
    ]
    if others:
        raise ConfigError(
            f"Cannot write GGUF: {_WHERE} have {' and '.join(others)}, and llama.cpp computes YaRN "
            f"with {', '.join(f'{key} {usual}' for key, usual in _YARN.items())}. Choose another "
            "format."
        )
    times = require_number(config, "max_position_embeddings", int) / original
    factor = require_number(settings, "factor", float, times, where=_WHERE)
    grown = _grow(factor)
    if settings.get("mscale") and settings.get("mscale_all_dim"):
        parts = [
            require_number(settings, k, float, where=_WHERE) for k in ("mscale", "mscale_all_dim")
        ]
        grown = _grow(factor, parts[0]) / _grow(factor, parts[1])
    grown = require_number(settings, "attention_factor", float, grown, where=_WHERE)
    # llama.cpp itself lets attention grow with the factor, and multiplies by this.
    extra = grown / _grow(factor)
    pairs = {"type": "yarn", "factor": factor, "original_context_length": original}
    return pairs if math.isclose(extra, 1, rel_tol=1e-6) else {**pairs, "attn_factor": extra}


def _grow(factor: float, share: float = 1.0) -> float:
    """By what YaRN lets attention grow with the factor."""
    return 1 + 0.1 * share * math.log(factor) if factor > 1 else 1.0


def _describe_longrope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Say from where on the long factors hold, and by what attention grows with them."""
    settings, original = read_rope_settings(config), find_original_length(config)
    times = require_number(config, "max_position_embeddings", int) / original
    times = require_number(settings, "factor", float, times, where=_WHERE)
    grown = math.sqrt(1 + math.log(times) / math.log(original)) if times > 1 else 1.0
    return {
        "original_context_length": original,
        "attn_factor": require_number(settings, "attention_factor", float, grown, where=_WHERE),
    }
