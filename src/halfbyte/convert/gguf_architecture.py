"""Which models llama.cpp knows by which names, and in what order it has their rows.

Source:
    llama.cpp ``gguf-py`` (tensor names) and ``conversion/`` (rows of q and k that are reordered,
    norms that are shifted by one), as read in November 2026; tests hold the names against the gguf
    package, and what is computed against llama.cpp itself.
"""

from __future__ import annotations

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

_FUSED = {"self_attn.qkv_proj": "attn_qkv", "mlp.gate_up_proj": "ffn_up"}
_PLAIN_MLP = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}

SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")
"""llama.cpp computes GELU by the hyperbolic tangent, and so do Gemma's models whatever they say."""

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
    activations: tuple[str, ...] = SILU
    """Of its MLP: what a config may name of what llama.cpp computes."""
    writes_head_size: bool = True
    ties_embeddings: bool = False
    """Whether it never has a head of its own."""
    has_window: bool = False
    """Whether llama.cpp knows its sliding window."""
    is_self_described: bool = False
    """Whether a config can be made out of a file's pairs."""

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


def _family(
    name: str, model: str, *parts: Mapping[str, str], model_type: str = "", **facts: Any
) -> Architecture:
    names = {key: value for part in (_BLOCK, *parts) for key, value in part.items()}
    return Architecture(
        name=name,
        model_class=f"{model}ForCausalLM",
        model_type=model_type or model.lower(),
        names=names,
        **facts,
    )


_OWN: Mapping[str, Any] = {"is_self_described": True}
_GEMMA: Mapping[str, Any] = {"norm_shift": 1.0, "ties_embeddings": True, "activations": GELU}
_LIKE_LLAMA: Mapping[str, Any] = {"reorders_heads": True}

ARCHITECTURES = (
    _family("llama", "Llama", _NORM_BEFORE, **_LIKE_LLAMA, **_OWN),
    _family("llama", "Mistral", _NORM_BEFORE, **_LIKE_LLAMA, **_OWN),
    _family("qwen2", "Qwen2", _NORM_BEFORE, writes_head_size=False, **_OWN),
    _family("qwen3", "Qwen3", _NORM_BEFORE, _HEAD_NORMS, **_OWN),
    _family("gemma", "Gemma", _NORM_BEFORE, **_GEMMA),
    _family("gemma2", "Gemma2", _NORMS_AROUND, has_window=True, **_GEMMA),
    _family(
        "gemma3", "Gemma3", _NORMS_AROUND, _HEAD_NORMS, model_type="gemma3_text", has_window=True,
        **_GEMMA,
    ),
    _family("phi3", "Phi3", _NORM_BEFORE, _FUSED, writes_head_size=False),
    _family("granite", "Granite", _NORM_BEFORE, **_LIKE_LLAMA),
    _family("olmo2", "Olmo2", _NORMS_AROUND, _HEAD_NORMS, writes_head_size=False, **_OWN),
    _family(
        "olmo2", "Olmo3", _NORMS_AROUND, _HEAD_NORMS, writes_head_size=False, has_window=True
    ),
    _family("smollm3", "SmolLM3", _NORM_BEFORE, **_LIKE_LLAMA),
    _family("starcoder2", "Starcoder2", _NORM_BEFORE, _PLAIN_MLP, activations=GELU[:2]),
    _family("seed_oss", "SeedOss", {"post_attention_layernorm": "post_attention_norm"},
            model_type="seed_oss"),
)  # fmt: skip


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
