"""The model config for a GGUF file: the base model's, or one made from the file's metadata."""

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
"""Linears with a bias by config key, for the architectures whose metadata is complete."""


def read_config(file: GgufFile, base: Path | None) -> dict[str, Any]:
    """Read the base model's config, or make one from the file's metadata.

    Args:
        file: The model.
        base: A folder with ``config.json``, or None.

    Returns:
        The config; empty if the file's architecture is unknown.

    Raises:
        CheckpointError: The base has no config, or the file's metadata is insufficient.
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
    scales_rope = pairs.get(f"{name}.rope.scaling.type", "none") != "none"
    scales_rope = scales_rope or any(tensor in tensors for tensor in FACTOR_TENSORS)
    if has_experts or scales_rope or family.name not in BIASES:
        what = "it has experts" if has_experts else f"its architecture is '{name}'"
        what = "it has RoPE scaling" if scales_rope else what
        raise CheckpointError(_describe_missing_metadata(file, what))
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
    """Check that a file is not one of several and has all tensors of the model.

    Args:
        file: The file.
        architecture: Its architecture.
        config: The model config.

    Raises:
        CheckpointError: Something is missing; names it.
    """
    parts = file.pairs.get("split.count", 1)
    if parts != 1:
        raise CheckpointError(
            f"Cannot read {file.path}: it is one of {str(parts)[:40]} files of a split model. "
            "Merge them first with: llama-gguf-split --merge FIRST-FILE MERGED.gguf"
        )
    blocks = _require_number(file, "block_count")
    expected = normalize_config(config).get("num_hidden_layers", blocks)
    if expected != blocks:
        raise CheckpointError(
            f"Cannot read {file.path}: it has {blocks} blocks, but the base's config says "
            f"{str(expected)[:40]}. Give the folder of the model that the file was made from."
        )
    required = _list_required_tensors(file, architecture, config, blocks)
    missing = next((name for name in required if name not in file.tensors), None)
    if missing is not None:
        raise CheckpointError(
            f"Cannot read {file.path}: it has no tensor {missing}, which a model of the "
            f"architecture '{architecture.name}' with {blocks} blocks has. It is incomplete; "
            "download it again."
        )


def _list_required_tensors(
    file: GgufFile, architecture: Architecture, config: Mapping[str, Any], blocks: int
) -> Iterator[str]:
    """List the required tensors; each block must also have those that any other block has."""
    needs_head = architecture.needs_head or config.get("tie_word_embeddings") is False
    for module in architecture.top_names.values():
        if module != HEAD or needs_head:
            yield f"{module}.weight"
    in_block = dict.fromkeys(f"{module}.weight" for module in architecture.block_names.values())
    for name in file.tensors:
        if name.startswith("blk."):
            in_block.setdefault(name.split(".", 2)[-1])
    for number in range(blocks):
        yield from (f"blk.{number}.{name}" for name in in_block)


def _describe_biases(file: GgufFile, keys: Mapping[str, tuple[str, ...]]) -> dict[str, bool]:
    """Make the config keys that say which linears of a block have a bias."""
    biased = {module for module in (*_ATTENTION, *_MLP) if f"blk.0.{module}.bias" in file.tensors}
    flags = {key: bool(biased & set(modules)) for key, modules in keys.items() if key != _ALWAYS}
    expressed = {m for key, modules in keys.items() if flags.get(key, True) for m in modules}
    if expressed != biased:
        names = ", ".join(sorted(biased)) or "no linear"
        what = f"{names} of a block has a bias"
        raise CheckpointError(_describe_missing_metadata(file, what))
    return flags


def _describe_missing_metadata(file: GgufFile, what: str) -> str:
    return (
        f"Cannot make a config from {file.path}: {what}, which the file's metadata does not fully "
        "describe. Give the original model's folder with --base."
    )


def _require_number(
    file: GgufFile, key: str, kind: type[int | float] = int, default: float | None = None
) -> Any:
    """Read a positive number from the metadata of the file's architecture."""
    name = f"{file.pairs.get('general.architecture')}.{key}"
    value = file.pairs.get(name, default)
    if type(value) is not kind or not value > 0:
        raise CheckpointError(
            f"Cannot read {file.path}: {name[:80]} is {str(value)[:40]}; one positive number is "
            "needed. The file is damaged, or its blocks differ; give the original model's folder "
            "with --base."
        )
    return value
