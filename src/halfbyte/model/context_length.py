"""The maximum context length of a model."""

from __future__ import annotations

from typing import Any


def max_context_length(config: Any) -> int | None:
    """Return the most tokens that a model's positions support.

    Args:
        config: The Transformers configuration of its text decoder.

    Returns:
        The number of tokens; None if there is no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("yarn", "dynamic"):
        # Qwen's cards enable these by rope parameters alone, without raising the limit above.
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * (rope.get("factor") or 1)))
    return limit
