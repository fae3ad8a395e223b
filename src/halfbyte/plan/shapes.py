"""A model's dimensions from its config.json: weight matrices and KV cache per token.

Transformers is not used, so planning takes milliseconds and needs no torch. The tests compare the
counts with the models that Transformers builds from the same configs.
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
"""Model types whose MLP has two matrices (no gate) instead of three."""

BIASED = {"bloom", "gpt2", "gpt_neox", "opt", "persimmon", "xglm"}
"""Model types whose linears have biases although their configs do not say so."""

LEARNED_POSITIONS = {"gpt2", "gpt_bigcode", "gpt_neo", "opt"}
"""Model types with a learned position embedding."""

CHECKED = {
    "apertus", "arcee", "bitnet", "bloom", "cohere", "cohere2", "deepseek_v2", "deepseek_v3",
    "diffllama", "ernie4_5", "exaone4", "falcon", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt2", "gpt_neox", "gpt_oss", "granite", "helium", "llama", "mistral", "mixtral", "nanochat",
    "olmo", "olmo2", "opt", "persimmon", "phi", "phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "xglm",
}  # fmt: skip
"""Model types whose counts are tested against the models that Transformers builds."""

TIED_BY_DEFAULT = {
    "bloom", "cohere", "cohere2", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_bigcode",
    "gpt_neo", "mpt", "opt",
}  # fmt: skip
"""Model types for which a missing ``tie_word_embeddings`` means true."""

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
    """A weight matrix of given shape, and how many of them the model has."""

    name: str
    out_features: int
    in_features: int
    count: int
    active: int
    """How many of them process one token."""
    bias: bool = False

    @property
    def numbers(self) -> int:
        """Number of weights of all of them."""
        return self.out_features * self.in_features * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheLayers:
    """Layers that cache the same amount per token."""

    kind: str
    """``FULL`` or ``SLIDING``."""
    count: int
    numbers_per_token: int
    window: int | None = None
    """Tokens that a sliding-window layer keeps at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShapes:
    """A model's dimensions, as derived from its config.json."""

    name: str
    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    inner: int
    """Largest input width of any matrix."""
    context: int | None
    linears: tuple[Matrix, ...]
    """Matrices inside the blocks; these are quantized."""
    embedding_numbers: int
    """Token and learned position embeddings."""
    head_numbers: int
    """Weights of the output layer; 0 if it is tied to the embedding."""
    other_numbers: int
    """Norms, biases and routers; these stay in 16 bits."""
    cache: tuple[CacheLayers, ...]
    stored_bits: int | None
    """Bits per weight, if the model is already quantized."""
    stored_group_size: int | None
    notes: tuple[str, ...]

    @property
    def linear_numbers(self) -> int:
        """Number of weights that are quantized."""
        return sum(matrix.numbers for matrix in self.linears)

    @property
    def numbers(self) -> int:
        """Number of parameters, tied ones counted once."""
        outside = self.embedding_numbers + self.head_numbers + self.other_numbers
        return self.linear_numbers + outside

    @property
    def active_numbers(self) -> int:
        """Number of linear weights that process one token."""
        return sum(m.numbers // m.count * m.active for m in self.linears)


def read_shapes(model: str | Path) -> ModelShapes:
    """Read a model's dimensions.

    Args:
        model: A folder with a config.json, that file itself, or one of ``KNOWN``, such as "7B".

    Returns:
        Its shapes.

    Raises:
        ConfigError: The file does not exist, or is not the config of a language model.
    """
    name = str(model)
    if not Path(model).exists():
        known = {key.casefold(): key for key in KNOWN}
        if name.casefold() in known:
            return parse_config(KNOWN[known[name.casefold()]], name)
        raise ConfigError(
            f"Cannot plan for '{name}': there is no such file or folder, and it is not one of the "
            f"known sizes {', '.join(KNOWN)}. Give a folder with a config.json, or that file; the "
            "weights are not needed."
        )
    path = Path(model) / "config.json" if Path(model).is_dir() else Path(model)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read '{path}': {error.strerror}.") from error
    except ValueError as error:
        raise ConfigError(
            f"'{path}' is not JSON: {error}. Give a model's config.json, or the folder with it."
        ) from error
    if not isinstance(values, dict):
        raise ConfigError(f"'{path}' does not hold a JSON object. Give a model's config.json.")
    return parse_config(values, name)


def parse_config(config: Mapping[str, Any], name: str) -> ModelShapes:
    """Derive a model's dimensions from its config.

    Args:
        config: The content of a config.json.
        name: The model's name in messages.

    Returns:
        Its shapes.

    Raises:
        ConfigError: A required number is missing.
    """
    notes: list[str] = []
    inner_config = config.get("text_config") or config.get("llm_config")
    values: dict[str, Any] = (
        {**config, **inner_config} if isinstance(inner_config, dict) else {**config}
    )
    if isinstance(inner_config, dict):
        notes.append("Only the language model is counted, not the vision or audio encoders.")
    reader = ConfigReader(values, name)
    hidden, layers, heads = (reader.require(key) for key in ("hidden", "layers", "heads"))
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
            f"Model type {model_type} is not among the tested ones; it is counted as a standard "
            "transformer."
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
            f"{layers - count} of {layers} layers keep a recurrent state instead of a KV cache "
            "(linear attention, Mamba); their matrices are not counted."
        )
    if reader.get("kv_lora_rank"):
        return _latent_attention(reader, hidden, heads, count)
    kv_heads = reader.kv_heads(heads)
    size = reader.head_size(hidden, heads)
    values = reader.values
    bias = bool(values.get("attention_bias") or values.get("bias") or values.get("use_bias"))
    out_bias = bias or reader.model_type in BIASED
    qkv_bias = out_bias or reader.model_type in ("qwen2", "qwen2_moe")
    # In these types the second half of the query projection gates the attention output.
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
    """Multi-head latent attention (DeepSeek V2): keys and values are projected from one latent."""
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
    """Return the matrices of the MLPs, and the number of router weights."""
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
            "The KV cache holds the latent vector of multi-head latent attention, as in servers; "
            "Transformers itself caches full keys and values, which takes many times as much."
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
