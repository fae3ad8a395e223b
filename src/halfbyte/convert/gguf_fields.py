"""Read model configs under the key names that most architectures use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from halfbyte.errors import ConfigError

Number = TypeVar("Number", int, float)

KEY_ALIASES = {
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
"""Standard key name by the name that some architectures use instead."""


def normalize_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the keys of a config to their standard names.

    Args:
        config: ``config.json``.

    Returns:
        The same values, with GPT-2's default for ``intermediate_size``.
    """
    normalized = {KEY_ALIASES.get(key, key): value for key, value in config.items()}
    if "n_embd" in config and not normalized.get("intermediate_size"):
        normalized["intermediate_size"] = 4 * require_number(config, "n_embd", int)
    return normalized


def require_number(
    config: Mapping[str, Any],
    key: str,
    kind: type[Number],
    default: Number | None = None,
    *,
    where: str = "config.json",
) -> Number:
    """Read a positive number from a config.

    Args:
        config: ``config.json``, or a section of it.
        key: Name of the value.
        kind: int or float.
        default: Value if the config has none.
        where: Name of the config, for messages.

    Returns:
        The number.

    Raises:
        ConfigError: It is missing and has no default, or is not a positive number.
    """
    value = default if config.get(key) is None else config[key]
    if value is None:
        raise ConfigError(
            f"Cannot write GGUF: {where} has no {key}. Save the config again with "
            "AutoConfig.from_pretrained(...).save_pretrained(...)."
        )
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < value < math.inf:
        raise ConfigError(
            f"Cannot write GGUF: {key} of {where} is {str(value)[:40]!r}; a positive number is "
            "needed. Correct the file, or download it again."
        )
    return kind(value)


def head_size(config: Mapping[str, Any]) -> int:
    """Return the dimension of an attention head."""
    heads = require_number(config, "num_attention_heads", int)
    return require_number(
        config, "head_dim", int, require_number(config, "hidden_size", int) // heads
    )
