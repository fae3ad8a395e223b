"""How long a text a model's positions reach."""

from __future__ import annotations

from typing import Any


def longest_text(config: Any) -> int | None:
    """Say how many tokens a model takes.

    Args:
        config: Of its text decoder, as Transformers reads it.

    Returns:
        The most; None where its positions have no limit.
    """
    limit = getattr(config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") in ("yarn", "dynamic"):
        # Both are switched on by this alone, as Qwen's cards say, and leave the limit as it was.
        original = rope.get("original_max_position_embeddings") or limit
        limit = max(limit, int(original * (rope.get("factor") or 1)))
    return limit
