"""Detect the format of a model folder or file, and open it as the source of a conversion."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from halfbyte.checkpoint.labels import (
    GGUF_SUFFIX,
    drop_quantization_config,
    name_method,
    read_model_config,
    read_quantization_config,
)
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert import mlx
from halfbyte.convert.awq import AwqSource
from halfbyte.convert.compressed_tensors import METHOD, CompressedTensorsSource
from halfbyte.convert.gguf_source import GgufSource
from halfbyte.convert.gptq import GptqSource
from halfbyte.convert.mlx import MlxSource
from halfbyte.convert.source import Source
from halfbyte.errors import CheckpointError, ConfigError


def open_source(path: Path, base: Path | None = None) -> Source:
    """Open a quantized model of any supported format.

    Args:
        path: A folder, or a .gguf file.
        base: For a .gguf file: a folder with the model's ``config.json`` and tokenizer.

    Returns:
        The model; no weight is in memory.

    Raises:
        ConfigError: There is a base, but the source is not a .gguf file.
        CheckpointError: The format is not supported, or a file is damaged.
    """
    if path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob(f"*{GGUF_SUFFIX}"))
        if len(files) == 1:
            path = files[0]
    if path.name.endswith(GGUF_SUFFIX):
        return GgufSource.open(path, base)
    if base is not None:
        raise ConfigError(
            f"Cannot use {base} as the base of {path}: only a .gguf file needs one, as a folder "
            "has its own config and tokenizer. Leave --base out."
        )
    config = read_model_config(path)
    section = read_quantization_config(path)
    model_config = drop_quantization_config(config)
    model_config.pop(mlx.SECTION, None)
    # mlx-lm writes the same dict under both names, without a method.
    if mlx.SECTION in config and "quant_method" not in section:
        return MlxSource.open(path, _read_section(path, config, mlx.SECTION), model_config)
    method = name_method(section)
    if method == "awq":
        return AwqSource.open(path, section, model_config)
    if method == METHOD:
        return CompressedTensorsSource.open(path, section, model_config)
    return _open_gptq(path, model_config)


def _open_gptq(path: Path, config: dict[str, Any]) -> GptqSource:
    checkpoint = open_checkpoint(path)
    others = {
        name: TensorSpec(dtype=info.dtype, shape=info.shape)
        for name, info in checkpoint.files.infos.items()
        if name.rpartition(".")[0] not in checkpoint.linears
    }
    return GptqSource(checkpoint=checkpoint, model_config=config, others=others)


def _read_section(path: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    section = config.get(key) or {}
    if not isinstance(section, dict):
        raise CheckpointError(
            f"Cannot read {key} of {path / 'config.json'}: it is a {type(section).__name__}; an "
            "object is needed. Download the file again."
        )
    return section
