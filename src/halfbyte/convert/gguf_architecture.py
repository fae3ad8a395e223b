"""Which models llama.cpp knows by which names, and in what order it has their rows.

Source:
    llama.cpp ``gguf-py`` (tensor names) and ``conversion/`` (rows of q and k that are reordered,
    norms that are shifted by one, experts in one tensor), as read in November 2026; tests hold the
    names against the gguf package, and what is computed against llama.cpp itself.
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
"""What llama.cpp computes with in float32 only, or decides by."""

SILU = ("silu", "swish")
GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu")
"""llama.cpp computes GELU by the hyperbolic tangent, and so do Gemma's models whatever they say."""

COMPUTED = re.compile(r".*\.(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")
"""Buffers in the files of older Transformers that every program computes for itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One family as llama.cpp has it."""

    name: str
    model_class: str
    model_type: str
    names: Mapping[str, str]
    """Within a block: Transformers' name -> GGUF's. "*" is the number of an expert, of which GGUF
    has all in one tensor."""
    top: Mapping[str, str]
    """The same outside the blocks."""
    blocks: str
    """What the blocks are called."""
    reorders_heads: bool = False
    """Whether rows of q and k alternate between the halves of a head."""
    interleaves_qkv: bool = False
    """Whether rows of query_key_value have a head's query, key and value together."""
    norm_shift: float = 0.0
    """What is added to the weights of norms."""
    epsilon: str = "rms_norm_eps"
    """What the config calls the epsilon of its norms; RMS norms where that says so."""
    has_rotary: bool = True
    has_partial_rotary: bool = False
    """Whether positions may turn a part of each head only."""
    has_longrope: bool = False
    """Whether llama.cpp knows the two sets of factors of this family."""
    normalizes_experts: bool | None = None
    """Of a family with experts: whether the weights of those chosen are made to sum to one."""
    stores_inputs_first: bool = False
    """Whether matrices within its blocks are [in, out]: Transformers' Conv1D."""
    activations: tuple[str, ...] = SILU
    """Of its MLP: what a config may name of what llama.cpp computes."""
    writes_head_size: bool = True
    ties_embeddings: bool = False
    """Whether it never has a head of its own."""
    needs_head: bool = False
    """Whether llama.cpp asks for a head even where it is the embeddings over again."""
    has_window: bool = False
    """Whether llama.cpp knows its sliding window."""

    def to_gguf(self, name: str) -> str | None:
        """Translate a module's name; None where llama.cpp has none for it."""
        if name in self.top:
            return self.top[name]
        match = re.fullmatch(re.escape(self.blocks) + r"\.(\d+)\.(.+)", name)
        inner = self.names.get(re.sub(r"experts\.\d+\.", "experts.*.", match[2])) if match else None
        return f"blk.{match[1]}.{inner}" if match and inner else None

    def from_gguf(self, name: str) -> str | None:
        """Translate a GGUF name back, experts with "*"; None where it is none of this family."""
        top = {theirs: ours for ours, theirs in self.top.items()}
        if name in top:
            return top[name]
        match = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        inner = {theirs: ours for ours, theirs in self.names.items()}
        found = inner.get(match[2]) if match else None
        return f"{self.blocks}.{match[1]}.{found}" if match and found else None

    def is_tied(self, config: Mapping[str, Any]) -> bool:
        """Whether a model's head is its embeddings."""
        return self.ties_embeddings or bool(config.get("tie_word_embeddings"))

    def is_transposed(self, name: str) -> bool:
        """Whether a dense matrix of that name is stored [in, out]."""
        return self.stores_inputs_first and name.startswith(f"{self.blocks}.")

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
    """Give the number of the expert that a module belongs to; None where it is of none."""
    match = re.search(r"\.experts\.(\d+)\.", name)
    return int(match[1]) if match else None


def _check_heads(name: str, heads: object, rows: int, parts: int) -> int:
    """Check that rows are those of so many heads, each of equal parts."""
    if not isinstance(heads, int) or heads < 1 or rows % (parts * heads):
        raise ConfigError(
            f"{name} has {rows} rows, and the config says {str(heads)[:40]} heads of "
            f"{'an even width' if parts == 2 else 'three parts'}. The config or the weights belong "
            "to another model."
        )
    return heads


def _family(
    name: str, model: str, *parts: Mapping[str, str], model_type: str = "", **facts: Any
) -> Architecture:
    names = {key: value for part in parts for key, value in part.items()}
    return Architecture(
        name=name,
        model_class=f"{model}ForCausalLM",
        model_type=model_type or model.lower(),
        names=names,
        top=_TOP,
        blocks="model.layers",
        **facts,
    )


_GEMMA: Mapping[str, Any] = {"norm_shift": 1.0, "ties_embeddings": True, "activations": GELU}
_LIKE_LLAMA: Mapping[str, Any] = {"reorders_heads": True}

_LLAMA = (_NORMS_BEFORE, _ATTENTION, _MLP)
"""What most blocks are made of."""

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
        name="gpt2", model_class="GPT2LMHeadModel", model_type="gpt2", names=_GPT2_BLOCK,
        top=_GPT2_TOP, blocks="transformer.h", activations=GELU[:2], epsilon="layer_norm_epsilon",
        writes_head_size=False, has_rotary=False, stores_inputs_first=True,
    ),
    Architecture(
        name="gptneox", model_class="GPTNeoXForCausalLM", model_type="gpt_neox",
        names=_NEOX_BLOCK, top=_NEOX_TOP, blocks="gpt_neox.layers", interleaves_qkv=True,
        activations=(*GELU, "gelu_fast"), epsilon="layer_norm_eps", writes_head_size=False,
        has_partial_rotary=True, needs_head=True,
    ),
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
