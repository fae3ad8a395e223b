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
from halfbyte.plan.config_reader import FULL, NONE, SLIDING, ConfigReader

UNGATED = {
    "apertus", "arcee", "bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox",
    "gptj", "mpt", "nanochat", "nemotron", "opt", "persimmon", "phi", "starcoder2", "xglm",
}  # fmt: skip
"""Model types whose MLP has two matrices, not three."""

BIASED = {"bloom", "gpt2", "gpt_neox", "opt", "persimmon", "xglm"}
"""Types whose linears have biases though their configs name none."""

LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}

CHECKED = {
    "apertus", "arcee", "bitnet", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3",
    "diffllama", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_neox", "gpt_oss", "granite", "helium", "llama", "mistral", "mixtral", "nanochat",
    "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
}  # fmt: skip
"""Types whose counts tests hold against the models that Transformers builds."""

TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "mpt", "opt",
}  # fmt: skip
"""Types whose configs may leave ``tie_word_embeddings`` out and mean true."""

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
    reader = ConfigReader(values, name)
    hidden, layers, heads = (reader.need(key) for key in ("hidden", "layers", "heads"))
    model_type = reader.model_type
    attention = _attention(reader, hidden, layers, heads, notes)
    mlp, routers = _mlp(reader, hidden, layers)
    linears = [m for m in (*attention, *mlp) if m.count]
    vocabulary = int(values.get("vocab_size") or 0)
    embedding = vocabulary * hidden
    if model_type in LEARNED_POSITIONS:
        offset = 2 if model_type == "opt" else 0
        embedding += (reader.get("context") + offset) * hidden
    tied = values.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    if tied is None:
        tied = model_type in TIED_BY_DEFAULT
    cache = _cache(reader, layers, heads, hidden, notes)
    if model_type not in CHECKED:
        notes.append(
            f"Not checked against models of type {model_type}: counted as a usual transformer."
        )
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
        cache=cache,
        stored_bits=quantized.get("bits") if isinstance(quantized, dict) else None,
        stored_group_size=quantized.get("group_size") if isinstance(quantized, dict) else None,
        notes=tuple(notes),
    )


def _attention(
    reader: ConfigReader, hidden: int, layers: int, heads: int, notes: list[str]
) -> list[Matrix]:
    kinds = reader.layer_kinds(layers)
    count = layers - kinds.count(NONE)
    if count < layers:
        notes.append(
            f"{layers - count} of {layers} layers keep a state instead of a cache (linear "
            "attention, Mamba); their matrices are not counted."
        )
    if reader.get("kv_lora_rank"):
        return _latent_attention(reader, hidden, heads, count)
    kv_heads = reader.kv_heads(heads)
    size = reader.head_size(hidden, heads)
    values = reader.values
    bias = bool(values.get("attention_bias") or values.get("bias") or values.get("use_bias"))
    out_bias = bias or reader.model_type in BIASED
    qkv_bias = out_bias or reader.model_type in ("qwen2", "qwen2_moe")
    # Some types gate the attention's output by a second half of the query.
    gate = 2 if reader.model_type in ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text") else 1

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


def _latent_attention(reader: ConfigReader, hidden: int, heads: int, count: int) -> list[Matrix]:
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


def _mlp(reader: ConfigReader, hidden: int, layers: int) -> tuple[list[Matrix], int]:
    """Give the matrices of the MLPs, and the numbers of routers."""
    inner = reader.get("inner") or 4 * hidden
    experts = reader.get("experts")
    gates = 1 if reader.model_type in UNGATED else 2
    sparse = reader.sparse_layers(layers) if experts > 1 else 0
    bias = bool(reader.values.get("mlp_bias")) or reader.model_type in BIASED
    matrices = _mlp_matrices("mlp", hidden, inner, gates, layers - sparse, layers - sparse, bias)
    if not sparse:
        return matrices, 0
    width = reader.get("moe_intermediate_size") or reader.get("expert_ffn_hidden_size") or inner
    active = reader.get("active") or 1
    biased = reader.model_type == "gpt_oss"
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


def _cache(
    reader: ConfigReader, layers: int, heads: int, hidden: int, notes: list[str]
) -> tuple[CacheLayers, ...]:
    if rank := reader.get("kv_lora_rank"):
        notes.append(
            "The cache holds the latent vector of multi-head latent attention, as servers keep it; "
            "Transformers itself keeps whole keys and values, many times as much."
        )
        per_token = rank + reader.get("qk_rope_head_dim")
    else:
        per_token = 2 * reader.kv_heads(heads) * reader.head_size(hidden, heads)
    kinds = reader.layer_kinds(layers)
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
