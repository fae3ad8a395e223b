"""Which models llama.cpp knows by which names: tensors, hyperparameters, order of rows.

Source:
    llama.cpp ``gguf-py`` (tensor and key names) and ``conversion/`` (rows of q and k that are
    reordered, norms that are shifted by one), as read in November 2026; tests hold the tensor
    names against the gguf package.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError

_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_BLOCK = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NORM_BEFORE = {"post_attention_layernorm": "ffn_norm"}
_NORMS_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

LARGE_GEMMA_BLOCKS = 46

EMBEDDING, HEAD = "token_embd", "output"


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family as llama.cpp has it."""

    name: str
    model_class: str
    model_type: str
    names: Mapping[str, str]
    """Within a block: Transformers' name -> GGUF's."""
    reorders_heads: bool = False
    """Whether rows of q and k alternate between the halves of a head."""
    norm_shift: float = 0.0
    """What is added to the weights of norms."""
    writes_head_size: bool = True
    ties_embeddings: bool = False
    """Whether it never has a head of its own."""

    def to_gguf(self, name: str) -> str | None:
        """Translate a module's name; None where llama.cpp has none for it."""
        if name in _TOP:
            return _TOP[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        inner = self.names.get(match[2]) if match else None
        return f"blk.{match[1]}.{inner}" if match and inner else None

    def from_gguf(self, name: str) -> str | None:
        """Translate a GGUF name back; None where it is none of this family."""
        top = {theirs: ours for ours, theirs in _TOP.items()}
        if name in top:
            return top[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        inner = {theirs: ours for ours, theirs in self.names.items()}
        found = inner.get(match[2]) if match else None
        return f"model.layers.{match[1]}.{found}" if match and found else None

    def row_order(self, name: str, config: Mapping[str, Any], rows: int) -> Tensor | None:
        """Give the order of a module's rows: GGUF's row r is row order[r]; None: as they are.

        Args:
            name: Transformers' name of the module.
            config: The model's.
            rows: That the module has.

        Returns:
            int64 [rows], or None.

        Raises:
            ConfigError: The config's heads do not have that many rows.
        """
        leaf = name.rpartition(".")[2]
        if not self.reorders_heads or leaf not in ("q_proj", "k_proj"):
            return None
        key = "num_attention_heads" if leaf == "q_proj" else "num_key_value_heads"
        heads = config.get(key) or config.get("num_attention_heads")
        if not isinstance(heads, int) or heads < 1 or rows % (2 * heads):
            raise ConfigError(
                f"{name} has {rows} rows, and the config says {str(heads)[:40]} heads of an even "
                "width. The config or the weights belong to another model."
            )
        order = torch.arange(rows).view(heads, 2, rows // heads // 2)
        return order.transpose(1, 2).reshape(-1)


def _family(name: str, model: str, *parts: Mapping[str, str], **facts: Any) -> Architecture:
    names = {key: value for part in (_BLOCK, *parts) for key, value in part.items()}
    return Architecture(
        name=name, model_class=f"{model}ForCausalLM", model_type=model.lower(), names=names, **facts
    )


ARCHITECTURES = (
    _family("llama", "Llama", _NORM_BEFORE, reorders_heads=True),
    _family("llama", "Mistral", _NORM_BEFORE, reorders_heads=True),
    _family("qwen2", "Qwen2", _NORM_BEFORE, writes_head_size=False),
    _family("qwen3", "Qwen3", _NORM_BEFORE, _HEAD_NORMS),
    _family("gemma2", "Gemma2", _NORMS_AROUND, norm_shift=1.0, ties_embeddings=True),
    _family("olmo2", "Olmo2", _NORMS_AROUND, _HEAD_NORMS, writes_head_size=False),
)


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Find a model's family by the class that its config names.

    Args:
        config: ``config.json``.

    Returns:
        The family.

    Raises:
        ConfigError: It is none that is written here.
    """
    classes = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if architecture.model_class in classes:
            return architecture
    known = ", ".join(architecture.model_class for architecture in ARCHITECTURES)
    raise ConfigError(
        f"Cannot write GGUF for {', '.join(map(str, classes)) or 'a model without architectures'}: "
        f"written are {known}. Choose another format."
    )


def head_size(config: Mapping[str, Any]) -> int:
    """Give the width of an attention head."""
    width = config.get("head_dim")
    return int(width or int(config["hidden_size"]) // int(config["num_attention_heads"]))


def describe_model(architecture: Architecture, config: Mapping[str, Any]) -> dict[str, Any]:
    """Give the hyperparameters as GGUF pairs.

    Args:
        architecture: The family.
        config: ``config.json``.

    Returns:
        The pairs.

    Raises:
        ConfigError: The positions are scaled in a way that is not written here.
    """
    name, heads = architecture.name, int(config["num_attention_heads"])
    pairs: dict[str, Any] = {
        f"{name}.block_count": int(config["num_hidden_layers"]),
        f"{name}.context_length": int(config["max_position_embeddings"]),
        f"{name}.embedding_length": int(config["hidden_size"]),
        f"{name}.feed_forward_length": int(config["intermediate_size"]),
        f"{name}.attention.head_count": heads,
        f"{name}.attention.head_count_kv": int(config.get("num_key_value_heads") or heads),
        f"{name}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{name}.vocab_size": int(config["vocab_size"]),
    }
    width = head_size(config)
    if architecture.writes_head_size:
        pairs[f"{name}.attention.key_length"] = width
        pairs[f"{name}.attention.value_length"] = width
    if architecture.reorders_heads:
        pairs[f"{name}.rope.dimension_count"] = width
    pairs |= _describe_positions(name, config)
    if name == "gemma2":
        # llama.cpp takes the head's width; its exception for the 27B model goes by 46 blocks.
        if (
            config.get("query_pre_attn_scalar", width) != width
            and pairs[f"{name}.block_count"] != LARGE_GEMMA_BLOCKS
        ):
            raise ConfigError(
                f"Cannot write GGUF: the config's query_pre_attn_scalar is "
                f"{config['query_pre_attn_scalar']}, and llama.cpp takes the head size {width}. "
                "Choose another format."
            )
        pairs[f"{name}.attn_logit_softcapping"] = float(config["attn_logit_softcapping"])
        pairs[f"{name}.final_logit_softcapping"] = float(config["final_logit_softcapping"])
        pairs[f"{name}.attention.sliding_window"] = int(config["sliding_window"])
    return pairs


def note_limits(architecture: Architecture, config: Mapping[str, Any]) -> tuple[str, ...]:
    """Say what llama.cpp does not do of what the model does."""
    window = config.get("sliding_window")
    if architecture.name != "llama" or not isinstance(window, int):
        return ()
    return (
        f"llama.cpp has no sliding window for this architecture: beyond {window} tokens it "
        "attends to more than the model does",
    )


def rope_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Gather what a config says of rotary positions, under Transformers 5's names."""
    settings = {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": "default"}
    scaling = config.get("rope_scaling")
    if isinstance(scaling, dict):
        settings |= {"rope_type": scaling.get("type", "default"), **scaling}
    own = config.get("rope_parameters")
    return settings | own if isinstance(own, dict) else settings


def _describe_positions(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    settings = rope_settings(config)
    pairs: dict[str, Any] = {f"{name}.rope.freq_base": float(settings["rope_theta"])}
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
