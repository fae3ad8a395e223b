"""Reads model dimensions from a config.json, whatever field names the model family uses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.errors import ConfigError

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads", "attention_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "active": ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk"),
}
"""Field names that different families use for the same quantity, in order of lookup."""

FULL, SLIDING, NONE = "full", "sliding", "none"


class ConfigReader:
    """Looks up dimensions in a config under the field names of any model family."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        """Wrap the content of a config.json.

        Args:
            values: The content, with the language model's fields at the top level.
            name: The model's name in error messages.
        """
        self.values = values
        self.model_type = str(values.get("model_type", "?"))
        self._name = name

    def get(self, key: str) -> int:
        """Return an integer field, or 0 if it is missing."""
        for alias in NAMES.get(key, (key,)):
            value = self.values.get(alias)
            # Some families give one number per layer or per kind of expert.
            if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return 0

    def require(self, key: str) -> int:
        """Return a number that every language model must define.

        Args:
            key: One of ``NAMES``.

        Returns:
            The number, above 0.

        Raises:
            ConfigError: It is missing; the message lists the names that were looked up.
        """
        value = self.get(key)
        if value <= 0:
            raise ConfigError(
                f"Cannot plan for '{self._name}': its config.json has none of "
                f"{', '.join(NAMES[key])}. Is it the config of a language model?"
            )
        return value

    def layer_kinds(self, layers: int) -> list[str]:
        """Return the kind of KV cache of each layer: ``FULL``, ``SLIDING`` or ``NONE``."""
        values = self.values
        types = values.get("layer_types")
        window = self.get("sliding_window") or self.get("attention_chunk_size")
        if isinstance(types, list) and len(types) == layers:
            kind_of = {"full_attention": FULL, "attention": FULL, "sliding_attention": SLIDING,
                       "chunked_attention": SLIDING, "linear_attention": NONE, "mamba": NONE,
                       "conv": NONE}  # fmt: skip
            kinds = [kind_of.get(str(kind), FULL) for kind in types]
            return [FULL if kind == SLIDING and not window else kind for kind in kinds]
        if not window or values.get("use_sliding_window") is False:
            return [FULL] * layers
        pattern = self.get("sliding_window_pattern")
        if not pattern:
            pattern = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "gpt_oss": 2}.get(
                self.model_type, 0
            )
        if pattern:
            return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
        if "max_window_layers" in values:
            full = self.get("max_window_layers")
            return [FULL if i < full else SLIDING for i in range(layers)]
        return [SLIDING] * layers

    def sparse_layers(self, layers: int) -> int:
        """Count the mixture-of-experts layers."""
        first = self.get("first_k_dense_replace") or self.get("num_dense_layers")
        types = self.values.get("mlp_layer_types")
        if isinstance(types, list) and len(types) == layers:
            return sum(kind == "sparse" for kind in types)
        every = self.get("moe_layer_freq") or self.get("decoder_sparse_step") or 1
        dense = set(self.values.get("mlp_only_layers") or ())
        if self.get("decoder_sparse_step"):
            return sum((i + 1) % every == 0 and i not in dense for i in range(layers))
        return sum(i >= first and i % every == 0 and i not in dense for i in range(layers))

    def kv_heads(self, heads: int) -> int:
        """Return the number of key-value heads."""
        values = self.values
        if self.model_type == "falcon" and not values.get("new_decoder_architecture"):
            return 1 if values.get("multi_query", True) else heads
        if self.model_type == "gpt_bigcode" and values.get("multi_query", True):
            return 1
        return self.get("num_key_value_heads") or self.get("num_kv_heads") or heads

    def head_size(self, hidden: int, heads: int) -> int:
        """Return the width of one attention head."""
        return self.get("head_dim") or hidden // heads
