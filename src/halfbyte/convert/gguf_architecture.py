"""The architectures that llama.cpp supports: tensor names and differences in storage.

Source:
    llama.cpp ``gguf-py`` (tensor names) and ``conversion/`` (reordered rows of q and k, norms
    shifted by one, experts in one tensor), as of November 2026; tests compare the names with the
    gguf package, and the outputs with llama.cpp itself.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError

EMBEDDING, HEAD, POSITIONS = "token_embd", "output", "position_embd"

_TOP = {"model.embed_tokens": EMBEDDING, "model.norm": "output_norm", "lm_head": HEAD}
_INPUT_NORM = {"input_layernorm": "attn_norm"}
_NORMS_BEFORE = {**_INPUT_NORM, "post_attention_layernorm": "ffn_norm"}
_NORMS_AFTER = {
    "post_attention_layernorm": "post_attention_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_NORMS_AROUND = {**_INPUT_NORM, **_NORMS_AFTER, "pre_feedforward_layernorm": "ffn_norm"}
_HEAD_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}

_OUTPUT = {"self_attn.o_proj": "attn_output"}
_ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    **_OUTPUT,
}
_FUSED_ATTENTION = {"self_attn.qkv_proj": "attn_qkv", **_OUTPUT}
_MLP = {
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FUSED_MLP = {"mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
_PLAIN_MLP = {"mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"}
_EXPERTS = {
    "mlp.gate": "ffn_gate_inp",
    "mlp.experts.*.gate_proj": "ffn_gate_exps",
    "mlp.experts.*.up_proj": "ffn_up_exps",
    "mlp.experts.*.down_proj": "ffn_down_exps",
}
_MIXTRAL_EXPERTS = {
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.*.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.*.w3": "ffn_up_exps",
    "block_sparse_moe.experts.*.w2": "ffn_down_exps",
}
_SHARED_EXPERT = {
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
}
_GPT2_TOP = {
    "transformer.wte": EMBEDDING,
    "transformer.wpe": POSITIONS,
    "transformer.ln_f": "output_norm",
    "lm_head": HEAD,
}
_GPT2_BLOCK = {
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    **_PLAIN_MLP,
}
_NEOX_TOP = {
    "gpt_neox.embed_in": EMBEDDING,
    "gpt_neox.final_layer_norm": "output_norm",
    "embed_out": HEAD,
}
_NEOX_BLOCK = {
    "input_layernorm": "attn_norm",
    "attention.query_key_value": "attn_qkv",
    "attention.dense": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.dense_h_to_4h": "ffn_up",
    "mlp.dense_4h_to_h": "ffn_down",
}

IN_FLOAT32 = ("ffn_gate_inp", "ffn_gate_inp_shexp", POSITIONS)
"""Tensors that llama.cpp needs in float32, and routers, which are kept in it."""

SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")
"""llama.cpp computes GELU with the tanh approximation; so do Gemma models, whatever their config
says."""

COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")
"""Buffers stored by older versions of Transformers, which every program computes itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model architecture as llama.cpp represents it."""

    name: str
    model_class: str
    model_type: str
    block_names: Mapping[str, str]
    """Names inside a block: Transformers' -> GGUF's. "*" stands for an expert's number; GGUF stores
    all experts in one tensor."""
    top_names: Mapping[str, str]
    """The same outside the blocks."""
    block_prefix: str
    """Transformers' name of the list of blocks."""
    reorders_heads: bool = False
    """Whether rows of q and k alternate between the halves of a head."""
    interleaves_qkv: bool = False
    """Whether rows of query_key_value are grouped by head: its query, key and value."""
    norm_shift: float = 0.0
    """Constant added to the weights of norms."""
    epsilon: str = "rms_norm_eps"
    """Config key of the norms' epsilon; also determines whether they are RMS norms."""
    has_rotary: bool = True
    has_partial_rotary: bool = False
    """Whether llama.cpp supports rotary embeddings on a part of each head."""
    has_longrope: bool = False
    """Whether llama.cpp supports longrope for this architecture."""
    normalizes_experts: bool | None = None
    """Whether the weights of the selected experts sum to one; None without experts."""
    stores_inputs_first: bool = False
    """Whether matrices in its blocks are [in, out]: Transformers' Conv1D."""
    activations: tuple[str, ...] = SILU
    """Names in configs of the MLP activation that llama.cpp computes."""
    writes_head_size: bool = True
    ties_embeddings: bool = False
    """Whether the output head is always tied to the embeddings."""
    needs_head: bool = False
    """Whether llama.cpp requires a head tensor even if it is tied to the embeddings."""
    has_window: bool = False
    """Whether llama.cpp supports its sliding window."""

    def to_gguf(self, name: str) -> str | None:
        """Translate a module name to GGUF's; None if llama.cpp has none for it."""
        if name in self.top_names:
            return self.top_names[name]
        match = re.fullmatch(re.escape(self.block_prefix) + r"\.(\d+)\.(.+)", name)
        if match is None:
            return None
        inner = self.block_names.get(re.sub(r"experts\.\d+\.", "experts.*.", match[2]))
        return f"blk.{match[1]}.{inner}" if inner else None

    def from_gguf(self, name: str) -> str | None:
        """Translate a GGUF name to a module name, experts as "*"; None if it is unknown."""
        top_names = {theirs: ours for ours, theirs in self.top_names.items()}
        if name in top_names:
            return top_names[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        if match is None:
            return None
        inner = {theirs: ours for ours, theirs in self.block_names.items()}.get(match[2])
        return f"{self.block_prefix}.{match[1]}.{inner}" if inner else None

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Return whether a model's head is tied to its embeddings."""
        return self.ties_embeddings or bool(config.get("tie_word_embeddings"))

    def is_transposed(self, name: str) -> bool:
        """Return whether the dense matrix of that name is stored as [in, out]."""
        return self.stores_inputs_first and name.startswith(f"{self.block_prefix}.")

    def row_order(self, name: str, config: Mapping[str, Any], rows: int) -> Tensor | None:
        """Return the order of a module's rows in GGUF: row r is Transformers' row order[r].

        Args:
            name: Transformers' name of the module.
            config: The model config.
            rows: Number of rows of the module.

        Returns:
            int64 [rows]; None if the order is the same.

        Raises:
            ConfigError: The number of rows does not match the config's heads.
        """
        leaf = name.rpartition(".")[2]
        if self.interleaves_qkv and leaf == "query_key_value":
            heads = _check_heads(name, config.get("num_attention_heads"), rows, 3)
            return torch.arange(rows).view(heads, 3, -1).transpose(0, 1).reshape(-1)
        if not self.reorders_heads or leaf not in ("q_proj", "k_proj"):
            return None
        key = "num_attention_heads" if leaf == "q_proj" else "num_key_value_heads"
        heads = _check_heads(name, config.get(key) or config.get("num_attention_heads"), rows, 2)
        order = torch.arange(rows).view(heads, 2, rows // heads // 2)
        return order.transpose(1, 2).reshape(-1)


def find_expert(name: str) -> int | None:
    """Return the number of the expert that a module belongs to; None if it is not in one."""
    match = re.search(r"\.experts\.(\d+)\.", name)
    return int(match[1]) if match else None


def _check_heads(name: str, heads: object, rows: int, parts: int) -> int:
    """Check that rows are divisible into heads of equal parts; returns the number of heads."""
    if not isinstance(heads, int) or heads < 1 or rows % (parts * heads):
        raise ConfigError(
            f"{name} has {rows} rows, but the config says {str(heads)[:40]} heads of "
            f"{'an even size' if parts == 2 else 'three parts'}. The config or the weights belong "
            "to another model."
        )
    return heads


def _family(
    name: str, model: str, *parts: Mapping[str, str], model_type: str = "", **options: Any
) -> Architecture:
    """Create an architecture with Llama's names outside the blocks."""
    return Architecture(
        name=name,
        model_class=f"{model}ForCausalLM",
        model_type=model_type or model.lower(),
        block_names={key: value for part in parts for key, value in part.items()},
        top_names=_TOP,
        block_prefix="model.layers",
        **options,
    )


_GEMMA: Mapping[str, Any] = {"norm_shift": 1.0, "ties_embeddings": True, "activations": GELU}
_LIKE_LLAMA: Mapping[str, Any] = {"reorders_heads": True}

_LLAMA = (_NORMS_BEFORE, _ATTENTION, _MLP)
"""The modules of most blocks."""

ARCHITECTURES = (
    _family("llama", "Llama", *_LLAMA, **_LIKE_LLAMA),
    _family("llama", "Mistral", *_LLAMA, **_LIKE_LLAMA),
    _family("qwen2", "Qwen2", *_LLAMA, writes_head_size=False),
    _family("qwen3", "Qwen3", *_LLAMA, _HEAD_NORMS),
    _family("gemma", "Gemma", *_LLAMA, **_GEMMA),
    _family("gemma2", "Gemma2", _NORMS_AROUND, _ATTENTION, _MLP, has_window=True, **_GEMMA),
    _family(
        "gemma3", "Gemma3", _NORMS_AROUND, _ATTENTION, _HEAD_NORMS, _MLP, model_type="gemma3_text",
        has_window=True, **_GEMMA,
    ),
    _family("phi3", "Phi3", _NORMS_BEFORE, _FUSED_ATTENTION, _FUSED_MLP, writes_head_size=False,
            has_partial_rotary=True, has_longrope=True),
    _family("granite", "Granite", *_LLAMA, **_LIKE_LLAMA),
    _family("olmo2", "Olmo2", _NORMS_AFTER, _ATTENTION, _HEAD_NORMS, _MLP, writes_head_size=False,
            needs_head=True),
    _family(
        "olmo2", "Olmo3", _NORMS_AFTER, _ATTENTION, _HEAD_NORMS, _MLP, writes_head_size=False,
        has_window=True, needs_head=True,
    ),
    _family("smollm3", "SmolLM3", *_LLAMA, **_LIKE_LLAMA),
    _family("starcoder2", "Starcoder2", _NORMS_BEFORE, _ATTENTION, _PLAIN_MLP,
            activations=GELU[:2], epsilon="norm_epsilon"),
    _family("seed_oss", "SeedOss", _INPUT_NORM,
            {"post_attention_layernorm": "post_attention_norm"}, _ATTENTION, _MLP,
            model_type="seed_oss"),
    _family("llama", "Mixtral", _NORMS_BEFORE, _ATTENTION, _MIXTRAL_EXPERTS,
            normalizes_experts=True, **_LIKE_LLAMA),
    _family("qwen2moe", "Qwen2Moe", _NORMS_BEFORE, _ATTENTION, _EXPERTS, _SHARED_EXPERT,
            model_type="qwen2_moe", writes_head_size=False, normalizes_experts=False,
            needs_head=True),
    _family("qwen3moe", "Qwen3Moe", _NORMS_BEFORE, _ATTENTION, _HEAD_NORMS, _EXPERTS,
            model_type="qwen3_moe", normalizes_experts=True),
    _family("olmoe", "Olmoe", _NORMS_BEFORE, _ATTENTION, _HEAD_NORMS, _EXPERTS,
            writes_head_size=False, normalizes_experts=False, needs_head=True),
    Architecture(
        name="gpt2", model_class="GPT2LMHeadModel", model_type="gpt2", block_names=_GPT2_BLOCK,
        top_names=_GPT2_TOP, block_prefix="transformer.h", activations=GELU[:2],
        epsilon="layer_norm_epsilon", writes_head_size=False, has_rotary=False,
        stores_inputs_first=True,
    ),
    Architecture(
        name="gptneox", model_class="GPTNeoXForCausalLM", model_type="gpt_neox",
        block_names=_NEOX_BLOCK, top_names=_NEOX_TOP, block_prefix="gpt_neox.layers",
        interleaves_qkv=True,
        activations=(*GELU, "gelu_fast"), epsilon="layer_norm_eps", writes_head_size=False,
        has_partial_rotary=True, needs_head=True,
    ),
)  # fmt: skip


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Find a model's architecture by the class that its config names.

    Args:
        config: ``config.json``.

    Returns:
        The architecture.

    Raises:
        ConfigError: The architecture is not supported.
    """
    classes = config.get("architectures") or []
    for architecture in ARCHITECTURES:
        if architecture.model_class in classes:
            return architecture
    known = ", ".join(architecture.model_class for architecture in ARCHITECTURES)
    raise ConfigError(
        f"Cannot write GGUF for {', '.join(map(str, classes)) or 'a model without architectures'}: "
        f"the supported classes are {known}. Choose another format."
    )
