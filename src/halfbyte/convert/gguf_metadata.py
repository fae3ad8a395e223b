"""The metadata of a GGUF file: origin, hyperparameters, tokenizer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from halfbyte.checkpoint.front_matter import read_front_matter
from halfbyte.checkpoint.identity import name_folder
from halfbyte.convert.coded_linear import CodedSpec
from halfbyte.convert.gguf_architecture import Architecture
from halfbyte.convert.gguf_blocks import PLAIN
from halfbyte.convert.gguf_file import BF16, F16, F32, Q4_0, Q4_1, Q8_0, BlockType
from halfbyte.convert.gguf_hyperparameters import describe_model
from halfbyte.convert.gguf_tokenizer import describe_tokenizer
from halfbyte.convert.hints import HINT_KEY, format_hints
from halfbyte.convert.source import Source
from halfbyte.version import __version__

_FILE_TYPES = {F32: 0, F16: 1, Q4_0: 2, Q4_1: 3, Q8_0: 7, BF16: 32}


def build_metadata(
    source: Source,
    specs: Mapping[str, CodedSpec],
    architecture: Architecture,
    kinds: Mapping[str, BlockType],
    pre_tokenizer: str | None,
) -> dict[str, Any]:
    """Build the metadata of a file.

    Args:
        source: The model; tokenizer and model card are in its folder.
        specs: Properties of its linears.
        architecture: Its architecture.
        kinds: Block type by linear.
        pre_tokenizer: llama.cpp's name of the pre-tokenizer; None to detect it.

    Returns:
        The key-value pairs.
    """
    most_common = Counter(kinds.values()).most_common(1)[0][0]
    config = source.model_config
    pairs: dict[str, Any] = {
        "general.architecture": architecture.name,
        "general.type": "model",
        "general.name": name_folder(source.tokenizer_folder),
        "general.quantization_version": 2,
        "general.file_type": _FILE_TYPES[most_common],
        "general.quantized_by": f"halfbyte {__version__}",
        HINT_KEY: format_hints({n: s for n, s in specs.items() if kinds[n] not in PLAIN}),
    }
    pairs |= _describe_origin(source)
    pairs |= describe_model(architecture, config)
    return pairs | describe_tokenizer(source.tokenizer_folder, config, pre_tokenizer)


def _describe_origin(source: Source) -> dict[str, Any]:
    """Copy base model and license from the front matter of the README."""
    front = read_front_matter(source.tokenizer_folder)
    pairs: dict[str, Any] = {}
    if isinstance(front.get("license"), str):
        pairs["general.license"] = front["license"]
    base = front.get("base_model")
    bases = [name for name in (base if isinstance(base, list) else [base]) if isinstance(name, str)]
    if bases:
        pairs["general.base_model.count"] = len(bases)
    for number, name in enumerate(bases):
        pairs[f"general.base_model.{number}.name"] = name.rpartition("/")[2]
    return pairs
