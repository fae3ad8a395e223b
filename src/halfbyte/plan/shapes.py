"""What a config.json says about a model's size: its matrices, and what it caches per token.

Nothing is asked of Transformers, so that a plan takes milliseconds and needs no torch. Tests hold
the counts against the models that Transformers builds from the same configs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError

UNGATED = {
    "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt",
    "nemotron", "opt", "phi", "starcoder2", "xglm",
}  # fmt: skip
"""Model types whose MLP has two matrices, not three."""

LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt", "xglm"}

TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "mpt", "opt",
}  # fmt: skip
"""Types whose configs may leave ``tie_word_embeddings`` out and mean true."""

NAMES = {
    "hidden": ("hidden_size", "n_embd", "d_model", "dim"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads", "n_heads"),
    "inner": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"),
    "context": ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"),
    "experts": ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
    "active": ("num_experts_per_tok", "experts_per_token", "num_experts_per_token", "moe_topk"),
}
"""What families call the same number."""

KNOWN: Mapping[str, Mapping[str, Any]] = {
    name: {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
        "max_position_embeddings": context,
    }
    for name, hidden, layers, heads, kv, inner, vocabulary, context in (
        ("7B", 4096, 32, 32, 32, 11008, 32000, 4096),
        ("8B", 4096, 32, 32, 8, 14336, 128256, 131072),
        ("13B", 5120, 40, 40, 40, 13824, 32000, 4096),
        ("30B", 6656, 60, 52, 52, 17920, 32000, 2048),
        ("65B", 8192, 80, 64, 64, 22016, 32000, 2048),
        ("70B", 8192, 80, 64, 8, 28672, 32000, 4096),
    )
}
"""Well-known sizes by name: Llama 2 (7B, 13B, 70B), Llama 1 (30B, 65B) and Llama 3.1 (8B)."""

FULL, SLIDING, NONE = "full", "sliding", "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A kind of weight matrix and how often it occurs."""

    name: str
    out_features: int
    in_features: int
    count: int
    active: int
    """How many of them one token goes through."""
    bias: bool = False

    @property
    def numbers(self) -> int:
        """Weights of all of them."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayers:
    """Layers that keep the same amount per token."""

    kind: str
    """"full", "sliding", or "none" for layers that keep a state of fixed size instead."""
    count: int
    numbers_per_token: int
    window: int | None = None
    """Tokens that a sliding layer keeps at the most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """A model's size, as its config.json gives it."""

    name: str
    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    inner: int
    """Widest input of a matrix that a token goes through."""
    context: int | None
    linears: tuple[Matrix, ...]
    """Matrices within the blocks, which are quantized."""
    embedding_numbers: int
    """Token and learned position embeddings."""
    head_numbers: int
    """Of the output layer; 0 where it is the embedding itself."""
    other_numbers: int
    """Norms, biases and routers, which stay in 16 bits."""
    cache: tuple[CacheLayers, ...]
    stored_bits: int | None
    """Bits of its weights where it is quantized already."""
    stored_group_size: int | None
    notes: tuple[str, ...]

    @property
    def linear_numbers(self) -> int:
        """Weights that are quantized."""
        return sum(matrix.numbers for matrix in self.linears)

    @property
    def numbers(self) -> int:
        """All parameters, each counted once."""
        outside = self.embedding_numbers + self.head_numbers + self.other_numbers
        return self.linear_numbers + outside

    @property
    def active_numbers(self) -> int:
        """Weights of linears that one token goes through."""
        return sum(m.numbers // m.count * m.active for m in self.linears)


def read_shapes(model: str | Path) -> ModelShapes:
    """Read a model's size.

    Args:
        model: A folder with a config.json, that file itself, or one of ``KNOWN``, such as "7B".

    Returns:
        Its shapes.

    Raises:
        ConfigError: There is no such thing, or the config is none of a language model.
    """
    name = str(model)
    if not Path(model).exists():
        known = {key.casefold(): key for key in KNOWN}
        if name.casefold() in known:
            return parse_config(KNOWN[known[name.casefold()]], name)
        raise ConfigError(
            f"Cannot plan for '{name}': there is no such folder, and it is none of the known sizes "
            f"{', '.join(KNOWN)}. Give a folder with config.json, or that file; the weights are "
            "not needed."
        )
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(f"'{path}' is not JSON: {error}.") from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' holds no object; a model's config.json is needed.")
    return parse_config(values, name)


def parse_config(config: Mapping[str, Any], name: str) -> ModelShapes:
    """Work out a model's size from its config.

    Args:
        config: The content of a config.json.
        name: For messages.

    Returns:
        Its shapes.

    Raises:
        ConfigError: A number that every language model has is missing.
    """
    notes: list[str] = []
    inner_config = config.get("text_config") or config.get("llm_config")
    values: dict[str, Any] = (
        {**config, **inner_config} if isinstance(inner_config, dict) else {**config}
    )
    if isinstance(inner_config, dict):
        notes.append("Only the language model is counted, not what reads pictures or sound.")
    reader = _Reader(values, name)
    hidden, layers, heads = (reader.need(key) for key in ("hidden", "layers", "heads"))
    model_type = str(values.get("model_type", "?"))
    attention = _attention(reader, model_type, hidden, layers, heads, notes)
    mlp, routers = _mlp(reader, model_type, hidden, layers)
    linears = [m for m in (*attention, *mlp) if m.count]
    vocabulary = int(values.get("vocab_size") or 0)
    embedding = vocabulary * hidden
    if model_type in LEARNED_POSITIONS:
        offset = 2 if model_type == "opt" else 0
        embedding += (reader.get("context") + offset) * hidden
    tied = values.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        tied = model_type in TIED_BY_DEFAULT
    biases = sum(m.out_features * m.count for m in linears if m.bias)
    norms = (2 * layers + 1) * hidden * (2 if model_type in UNGATED else 1)
    quantized = config.get("quantization_config") or {}
    return ModelShapes(
        name=name,
        model_type=model_type,
        hidden=hidden,
        layers=layers,
        vocabulary=vocabulary,
        inner=max((m.in_features for m in linears), default=hidden),
        context=reader.get("context") or None,
        linears=tuple(linears),
        embedding_numbers=embedding,
        head_numbers=0 if tied else vocabulary * hidden,
        other_numbers=norms + biases + routers,
        cache=_cache(reader, model_type, layers, heads, hidden, notes),
        stored_bits=quantized.get("bits") if isinstance(quantized, dict) else None,
        stored_group_size=quantized.get("group_size") if isinstance(quantized, dict) else None,
        notes=tuple(notes),
    )


class _Reader:
    """Finds numbers under whatever name a family gives them."""

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self.values = values
        self._name = name

    def get(self, key: str) -> int:
        """Give a whole number, 0 where it is missing."""
        for alias in NAMES.get(key, (key,)):
            value = self.values.get(alias)
            # Some families give one number per layer or expert kind.
            if isinstance(value, list) and value and all(isinstance(v, int) for v in value):
                value = max(value)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        return 0

    def need(self, key: str) -> int:
        """Give a number that every model has."""
        value = self.get(key)
        if value <= 0:
            raise ConfigError(
                f"Cannot plan for '{self._name}': its config.json has none of "
                f"{', '.join(NAMES[key])}. Is it the config of a language model?"
            )
        return value


def _attention(
    reader: _Reader, model_type: str, hidden: int, layers: int, heads: int, notes: list[str]
) -> list[Matrix]:
    kinds = _layer_kinds(reader, layers)
    count = layers - kinds.count(NONE)
    if count < layers:
        notes.append(
            f"{layers - count} of {layers} layers keep a state instead of a cache (linear "
            "attention, Mamba); their matrices are not counted."
        )
    if reader.get("kv_lora_rank"):
        return _latent_attention(reader, hidden, heads, count)
    kv_heads = _kv_heads(reader, model_type, heads)
    size = _head_size(reader, hidden, heads)
    values = reader.values
    bias = bool(values.get("attention_bias") or values.get("bias") or values.get("use_bias"))
    qkv_bias = bias or model_type in ("qwen2", "qwen2_moe", "gpt2", "opt", "gpt_neox", "bloom")
    out_bias = bias or model_type in ("gpt2", "opt", "gpt_neox", "bloom")
    # Some types gate the attention's output by a second half of the query.
    gate = 2 if model_type in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") else 1

    def matrix(name: str, rows: int, columns: int, has_bias: bool) -> Matrix:
        return Matrix(
            name=name, out_features=rows, in_features=columns, count=count, active=count,
            bias=has_bias,
        )  # fmt: skip

    return [
        matrix("q_proj", gate * heads * size, hidden, qkv_bias),
        matrix("k_proj", kv_heads * size, hidden, qkv_bias),
        matrix("v_proj", kv_heads * size, hidden, qkv_bias),
        matrix("o_proj", hidden, heads * size, out_bias),
    ]


def _latent_attention(reader: _Reader, hidden: int, heads: int, count: int) -> list[Matrix]:
    """Multi-head latent attention (DeepSeek V2): keys and values come out of one small vector."""
    rank, query_rank = reader.get("kv_lora_rank"), reader.get("q_lora_rank")
    plain, rotary = reader.get("qk_nope_head_dim"), reader.get("qk_rope_head_dim")
    value = reader.get("v_head_dim")
    shapes = [
        ("kv_a_proj", rank + rotary, hidden),
        ("kv_b_proj", heads * (plain + value), rank),
        ("o_proj", hidden, heads * value),
    ]
    if query_rank:
        shapes += [("q_a_proj", query_rank, hidden)]
        shapes += [("q_b_proj", heads * (plain + rotary), query_rank)]
    else:
        shapes += [("q_proj", heads * (plain + rotary), hidden)]
    return [
        Matrix(name=name, out_features=rows, in_features=columns, count=count, active=count)
        for name, rows, columns in shapes
    ]


def _mlp(reader: _Reader, model_type: str, hidden: int, layers: int) -> tuple[list[Matrix], int]:
    """Give the matrices of the MLPs, and the numbers of routers."""
    inner = reader.get("inner") or 4 * hidden
    experts = reader.get("experts")
    gates = 1 if model_type in UNGATED else 2
    sparse = _sparse_layers(reader, layers) if experts > 1 else 0
    bias = bool(reader.values.get("mlp_bias")) or model_type in ("gpt2", "opt", "gpt_neox", "bloom")
    matrices = _mlp_matrices("mlp", hidden, inner, gates, layers - sparse, layers - sparse, bias)
    if not sparse:
        return matrices, 0
    width = reader.get("moe_intermediate_size") or reader.get("expert_ffn_hidden_size") or inner
    active = reader.get("active") or 1
    biased = model_type == "gpt_oss"
    matrices += _mlp_matrices(
        "experts", hidden, width, gates, sparse * experts, sparse * active, biased
    )
    shared = reader.get("shared_expert_intermediate_size")
    shared = shared or reader.get("n_shared_experts") * width
    matrices += _mlp_matrices(
        "shared_expert", hidden, shared, gates, sparse if shared else 0, sparse, False
    )
    return matrices, sparse * experts * hidden


def _mlp_matrices(
    name: str, hidden: int, inner: int, gates: int, count: int, active: int, bias: bool
) -> list[Matrix]:
    names = ("gate_proj", "up_proj") if gates == 2 else ("up_proj",)
    return [
        *(
            Matrix(
                name=f"{name}.{part}", out_features=inner, in_features=hidden, count=count,
                active=active, bias=bias,
            )
            for part in names
        ),
        Matrix(
            name=f"{name}.down_proj", out_features=hidden, in_features=inner, count=count,
            active=active, bias=bias,
        ),
    ]  # fmt: skip


def _sparse_layers(reader: _Reader, layers: int) -> int:
    """Count the layers with experts."""
    values = reader.values
    first = reader.get("first_k_dense_replace") or reader.get("num_dense_layers")
    types = values.get("mlp_layer_types")
    if isinstance(types, list) and len(types) == layers:
        return sum(kind == "sparse" for kind in types)
    every = reader.get("moe_layer_freq") or reader.get("decoder_sparse_step") or 1
    dense = set(values.get("mlp_only_layers") or ())
    if reader.get("decoder_sparse_step"):
        return sum((i + 1) % every == 0 and i not in dense for i in range(layers))
    return sum(i >= first and i % every == 0 and i not in dense for i in range(layers))


def _cache(
    reader: _Reader, model_type: str, layers: int, heads: int, hidden: int, notes: list[str]
) -> tuple[CacheLayers, ...]:
    if rank := reader.get("kv_lora_rank"):
        notes.append(
            "The cache holds the latent vector of multi-head latent attention, as servers keep it; "
            "Transformers itself keeps whole keys and values, many times as much."
        )
        per_token = rank + reader.get("qk_rope_head_dim")
    else:
        per_token = 2 * _kv_heads(reader, model_type, heads) * _head_size(reader, hidden, heads)
    kinds = _layer_kinds(reader, layers)
    window = reader.get("sliding_window") or reader.get("attention_chunk_size")
    groups = []
    for kind in (FULL, SLIDING):
        count = kinds.count(kind)
        if count:
            groups.append(
                CacheLayers(
                    kind=kind,
                    count=count,
                    numbers_per_token=per_token,
                    window=window if kind == SLIDING else None,
                )
            )
    return tuple(groups)


def _layer_kinds(reader: _Reader, layers: int) -> list[str]:
    """Give what each layer keeps."""
    values = reader.values
    types = values.get("layer_types")
    window = reader.get("sliding_window") or reader.get("attention_chunk_size")
    if isinstance(types, list) and len(types) == layers:
        words = {"full_attention": FULL, "attention": FULL, "sliding_attention": SLIDING,
                 "chunked_attention": SLIDING, "linear_attention": NONE, "mamba": NONE,
                 "conv": NONE}  # fmt: skip
        kinds = [words.get(str(kind), FULL) for kind in types]
        return [FULL if kind == SLIDING and not window else kind for kind in kinds]
    if not window or values.get("use_sliding_window") is False:
        return [FULL] * layers
    model_type = values.get("model_type")
    pattern = reader.get("sliding_window_pattern")
    if not pattern:
        pattern = {"gemma2": 2, "gemma3_text": 6, "gemma3": 6, "cohere2": 4, "gpt_oss": 2}.get(
            str(model_type), 0
        )
    if pattern:
        return [FULL if (i + 1) % pattern == 0 else SLIDING for i in range(layers)]
    if "max_window_layers" in values:
        full = reader.get("max_window_layers")
        return [FULL if i < full else SLIDING for i in range(layers)]
    return [SLIDING] * layers


def _kv_heads(reader: _Reader, model_type: str, heads: int) -> int:
    values = reader.values
    if model_type == "falcon" and not values.get("new_decoder_architecture"):
        return 1 if values.get("multi_query", True) else heads
    if model_type == "gpt_bigcode" and values.get("multi_query", True):
        return 1
    return reader.get("num_key_value_heads") or reader.get("num_kv_heads") or heads


def _head_size(reader: _Reader, hidden: int, heads: int) -> int:
    return reader.get("head_dim") or hidden // heads
