"""Convert a quantized model: plan by its small tensors, then write one linear at a time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.output_folder import check_outside
from halfbyte.convert.awq import AwqTarget
from halfbyte.convert.coded_linear import CodedSpec
from halfbyte.convert.compressed_tensors import CompressedTensorsTarget
from halfbyte.convert.dense import DTYPES, DenseTarget
from halfbyte.convert.detect import open_source
from halfbyte.convert.folder import write_folder
from halfbyte.convert.gguf_plan import EMBEDDING_TYPES, GgufOptions
from halfbyte.convert.gguf_write import write_gguf
from halfbyte.convert.gptq import GptqTarget
from halfbyte.convert.mlx import MlxTarget
from halfbyte.convert.reorder import fold_act_order
from halfbyte.convert.report import ConversionReport
from halfbyte.convert.source import Source
from halfbyte.convert.target import FolderTarget
from halfbyte.errors import ConfigError

FORMATS = ("gguf", "awq", "mlx", "compressed-tensors", "hf", "gptq")

KEPT = "keep"

DESCRIBED_AT_ONCE = 4
"""Number of linears described in parallel: most of the time is spent waiting for the disk."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionConfig:
    """Target format of a conversion, and its options."""

    to: str
    allow_error: bool = False
    """Use the closest representation for linears that the target cannot represent exactly."""
    widen: bool = False
    """GGUF: store asymmetric 4-bit codes exactly in 8 bits."""
    dtype: str = "float16"
    """Type of dense weights: all for "hf", otherwise those that the format cannot represent."""
    embeddings: str = KEPT
    """GGUF: type of the embeddings."""
    head: str = KEPT
    """GGUF: type of the output head, if it is not tied to the embeddings."""
    pre_tokenizer: str | None = None
    """GGUF: llama.cpp's name of the pre-tokenizer; None to detect it."""

    def __post_init__(self) -> None:
        choices = {
            "to": FORMATS,
            "dtype": tuple(DTYPES),
            "embeddings": EMBEDDING_TYPES,
            "head": EMBEDDING_TYPES,
        }
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(f"{name} is '{value}'; allowed are {', '.join(allowed)}.")
        gguf_options = {
            "embeddings": self.embeddings != KEPT,
            "head": self.head != KEPT,
            "widen": self.widen,
            "pre_tokenizer": self.pre_tokenizer is not None,
        }
        given = [name for name, is_given in gguf_options.items() if is_given]
        if given and self.to != "gguf":
            raise ConfigError(
                f"{', '.join(given)} has no effect for the format {self.to}, only for gguf. "
                "Leave it out."
            )


def convert(
    model: str | Path,
    output: str | Path,
    *,
    config: ConversionConfig,
    base: str | Path | None = None,
) -> ConversionReport:
    """Write a quantized model in another format.

    Args:
        model: A folder (GPTQ, AWQ, MLX, compressed-tensors) or a .gguf file.
        output: A folder that does not exist or is empty; for GGUF also a name ending in .gguf.
        config: Target format and options.
        base: For a .gguf file: a folder with the model's ``config.json`` and tokenizer.

    Returns:
        The report.

    Raises:
        ConfigError: The target cannot represent the model exactly, and no error is allowed; or the
            output is not empty or inside the model's folder.
        CheckpointError: The source is damaged, its format is not supported, or the disk is full.
    """
    started = time.monotonic()
    folders = [Path(path) for path in (model, base) if path is not None and Path(path).is_dir()]
    check_outside(Path(output), *folders)
    source = open_source(Path(model), None if base is None else Path(base))
    specs = describe_linears(source)
    source, specs, folded = _fold(source, specs, config)
    output = Path(output)
    if config.to == "gguf":
        options = GgufOptions(
            embeddings=config.embeddings,
            head=config.head,
            allow_error=config.allow_error,
            widen=config.widen,
            pre_tokenizer=config.pre_tokenizer,
        )
        written = write_gguf(source, specs, output, options)
    else:
        written = write_folder(
            source,
            specs,
            choose_target(config, specs, source.model_config),
            output,
            allow_error=config.allow_error,
            dense_dtype=DTYPES[config.dtype],
        )
    return ConversionReport(
        source=str(model),
        source_format=source.format,
        target_format=config.to,
        output=written.path,
        num_linears=len(specs),
        holds=dict(Counter(written.encodings.values())),
        rounded=written.rounded,
        folded=folded,
        num_bytes=written.num_bytes,
        seconds=time.monotonic() - started,
        notes=(*source.notes, *written.notes),
    )


def describe_linears(source: Source) -> dict[str, CodedSpec]:
    """Read the properties of every linear, several in parallel.

    Args:
        source: The model.

    Returns:
        The properties by name, in the source's order.
    """
    with ThreadPoolExecutor(DESCRIBED_AT_ONCE) as pool:
        return dict(zip(source.linears, pool.map(source.describe, source.linears), strict=True))


def choose_target(
    config: ConversionConfig, specs: Mapping[str, CodedSpec], model_config: Mapping[str, Any]
) -> FolderTarget:
    """Create the target for a model.

    Args:
        config: The options, with the name of the format.
        specs: Properties of the model's linears.
        model_config: ``config.json``.

    Returns:
        The target, with its settings for the whole model.
    """
    if config.to == "awq":
        return AwqTarget.from_specs(specs)
    if config.to == "gptq":
        return GptqTarget.from_specs(specs)
    if config.to == "hf":
        return DenseTarget.from_config(DTYPES[config.dtype], model_config)
    return MlxTarget() if config.to == "mlx" else CompressedTensorsTarget()


def _fold(
    source: Source, specs: dict[str, CodedSpec], config: ConversionConfig
) -> tuple[Source, dict[str, CodedSpec], int]:
    """Fold act-order if the target does not support it."""
    if config.to in ("gptq", "hf") or all(spec.is_ordered for spec in specs.values()):
        return source, specs, 0
    folded = fold_act_order(source, specs)
    if folded is None:
        return source, specs, 0
    return folded, describe_linears(folded), len(folded.columns)
