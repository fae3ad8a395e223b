"""The config of a model that is a GGUF file: the base's, or one made out of the file's pairs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.labels import (
    MODEL_CONFIG,
    drop_quantization_config,
    read_model_config,
)
from halfbyte.convert.gguf_architecture import ARCHITECTURES, EMBEDDING, HEAD, Architecture
from halfbyte.convert.gguf_fields import normalize_config
from halfbyte.convert.gguf_file import BF16, GgufFile
from halfbyte.convert.gguf_positions import FACTOR_TENSORS
from halfbyte.errors import CheckpointError

_ATTENTION = ("attn_q", "attn_k", "attn_v", "attn_output")
_MLP = ("ffn_gate", "ffn_up", "ffn_down")
_ALWAYS = ""
BIASES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "llama": {"attention_bias": _ATTENTION, "mlp_bias": _MLP},
    "qwen2": {_ALWAYS: _ATTENTION[:3]},
    "qwen3": {"attention_bias": _ATTENTION},
    "olmo2": {"attention_bias": _ATTENTION},
}
"""By family whose files say all: which linears have a bias where the config has a key."""


def read_config(file: GgufFile, base: Path | None) -> dict[str, Any]:
    """Take the base's config, or make one out of the pairs.

    Args:
        file: The model.
        base: A folder with ``config.json``, or None.

    Returns:
        The config; empty where the file is of no family that is known.

    Raises:
        CheckpointError: The base has no config, or the file does not say all that one needs.
    """
    if base is not None:
        if not (base / MODEL_CONFIG).is_file():
            raise CheckpointError(
                f"Cannot use {base} as the base of {file.path}: it has no {MODEL_CONFIG}. Give "
                "the folder of the original model."
            )
        return drop_quantization_config(read_model_config(base))
    pairs, tensors = file.pairs, file.tensors
    name = pairs.get("general.architecture")
    family = next((family for family in ARCHITECTURES if family.name == name), None)
    if family is None:
        return {}
    has_experts = f"{name}.expert_count" in pairs
    scales = pairs.get(f"{name}.rope.scaling.type", "none") != "none"
    scales = scales or any(tensor in tensors for tensor in FACTOR_TENSORS)
    if has_experts or scales or family.name not in BIASES:
        what = "it has experts" if has_experts else f"it is of the family '{name}'"
        error = _describe_missing_metadata(file, "it scales positions" if scales else what)
        raise error
    get = partial(_require_number, file)
    heads = get("attention.head_count")
    embeddings = tensors.get(f"{EMBEDDING}.weight")
    return {
        "architectures": [family.model_class],
        "model_type": family.model_type,
        "num_hidden_layers": get("block_count"),
        "max_position_embeddings": get("context_length"),
        "hidden_size": get("embedding_length"),
        "intermediate_size": get("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", default=heads),
        "head_dim": get("attention.key_length", default=get("embedding_length") // heads),
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon", float),
        "rope_theta": get("rope.freq_base", float, default=10000.0),
        "vocab_size": len(pairs.get("tokenizer.ggml.tokens") or []),
        "bos_token_id": pairs.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": pairs.get("tokenizer.ggml.eos_token_id"),
        "tie_word_embeddings": f"{HEAD}.weight" not in tensors,
        "dtype": "float16" if embeddings is None or embeddings.kind != BF16 else "bfloat16",
        **_describe_biases(file, BIASES[family.name]),
    }


def check_complete(file: GgufFile, architecture: Architecture, config: Mapping[str, Any]) -> None:
    """Refuse a part of a model: one file of a split one, or one without all of its tensors.

    Args:
        file: The file.
        architecture: Its family.
        config: The model's.

    Raises:
        CheckpointError: Something is missing; names it.
    """
    parts = file.pairs.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"Cannot read {file.path}: it is one of the {str(parts)[:40]} files of a model. Make "
            "one of them first, with: llama-gguf-split --merge FIRST-FILE ONE.gguf"
        )
    blocks = _require_number(file, "block_count")
    promised = normalize_config(config).get("num_hidden_layers", blocks)
    if promised != blocks:
        raise CheckpointError(
            f"Cannot read {file.path}: it has {blocks} blocks, and the base's config says "
            f"{str(promised)[:40]}. Give the folder of the model that the file was made of."
        )
    needed = _list_required_tensors(file, architecture, config, blocks)
    missing = next((name for name in needed if name not in file.tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"Cannot read {file.path}: it has no tensor {missing}, which a model of the family "
            f"'{architecture.name}' with {blocks} blocks has. It is incomplete; download it again."
        )


def _list_required_tensors(
    file: GgufFile, architecture: Architecture, config: Mapping[str, Any], blocks: int
) -> Iterator[str]:
    """Name what a file must have: each block what its family has, and what any other block has."""
    for module in architecture.top.values():
        is_own = architecture.needs_head or config.get("tie_word_embeddings") is False
        if module != HEAD or is_own:
            yield f"{module}.weight"
    in_block = dict.fromkeys(f"{module}.weight" for module in architecture.names.values())
    for name in file.tensors:
        if name.startswith("blk."):
            in_block.setdefault(name.split(".", 2)[-1])
    for number in range(blocks):
        yield from (f"blk.{number}.{name}" for name in in_block)


def _describe_biases(file: GgufFile, keys: Mapping[str, tuple[str, ...]]) -> dict[str, bool]:
    """Say in a config's words which linears of the first block have a bias."""
    found = {module for module in (*_ATTENTION, *_MLP) if f"blk.0.{module}.bias" in file.tensors}
    flags = {key: bool(found & set(modules)) for key, modules in keys.items() if key != _ALWAYS}
    given = {m for key, modules in keys.items() if flags.get(key, True) for m in modules}
    if given != found:
        names = ", ".join(sorted(found)) or "no linear"
        error = _describe_missing_metadata(file, f"{names} of a block has a bias")
        raise error
    return flags


def _describe_missing_metadata(file: GgufFile, what: str) -> CheckpointError:
    return CheckpointError(
        f"Cannot make a config out of {file.path}: {what}, and not all of how stands in the file. "
        "Give the original model's folder with --base."
    )


def _require_number(
    file: GgufFile, key: str, kind: type[int | float] = int, default: float | None = None
) -> Any:
    """Read one of a family's pairs that is a positive number."""
    name = f"{file.pairs.get('general.architecture')}.{key}"
    value = file.pairs.get(name, default)
    if type(value) is not kind or not value > 0:
        raise CheckpointError(
            f"Cannot read {file.path}: its {name[:80]} is {str(value)[:40]}; one positive number "
            "is needed. The file is damaged, or its blocks differ; give the original model's "
            "folder with --base."
        )
    return value
