"""The quantization config of a checkpoint ("labels"), from all files and under all key names.

Labels are hints: shapes determine bits and groups, ``g_idx`` the order, and symmetric zeros the
dialect. A label is used only if the tensors leave a choice.

::

    config.json["quantization_config"]  ┐
    quantize_config.json                ├─> one QuantizationLabels + notes on what disagreed
    quant_config.json                   ┘

Source:
    Transformers and vLLM read ``config.json`` first; GPTQModel reads ``quantize_config.json``
    first. If both exist and disagree, ``config.json`` wins here, with a note.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from halfbyte.checkpoint.header import parse_json_object
from halfbyte.checkpoint.layout import (
    CONFIG_ALIASES,
    CONFIG_FILES,
    FORMAT_V1,
    METHOD,
    METHODS,
    ZERO_OFFSETS,
)
from halfbyte.errors import CheckpointError

MODEL_CONFIG = "config.json"
CONFIG_SECTION = "quantization_config"
ADAPTER_CONFIG = "adapter_config.json"
"""PEFT's file."""
GGUF_SUFFIX = ".gguf"

AWQ_VERSIONS = ("gemm", "gemv", "gemv_fast", "marlin", "llm-awq")

_KEY_TYPES: Mapping[str, tuple[type, ...]] = {
    "bits": (int,),
    "group_size": (int,),
    "sym": (bool,),
    "desc_act": (bool,),
    "lm_head": (bool,),
    "quant_method": (str,),
    "checkpoint_format": (str,),
    "pack_dtype": (str,),
    "dynamic": (dict,),
    "modules_in_block_to_quantize": (list,),
}
"""The keys that are read, with their types; null counts as absent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizationLabels:
    """The quantization config of a checkpoint, validated and with normalized key names."""

    source: str | None
    """The file it was read from; None if the checkpoint has no config."""
    bits: int | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    desc_act: bool | None = None
    checkpoint_format: str | None = None
    lm_head: bool = False
    dynamic: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    modules_in_block: tuple[str, ...] = ()
    """Names inside a block, flattened, in execution order."""
    raw: Mapping[str, Any] = field(default_factory=dict)
    """The dict as in the file."""
    disagreements: Mapping[str, str] = field(default_factory=dict)
    """How the folder's config files contradict each other, by key."""
    notes: tuple[str, ...] = ()
    """Choices made where the files were incomplete or contradictory."""

    @property
    def zero_offset(self) -> int:
        """What the declared dialect (v1 by default) subtracts from each zero."""
        return ZERO_OFFSETS[self.checkpoint_format or FORMAT_V1]


def read_labels(folder: Path) -> QuantizationLabels:
    """Read the quantization config of a checkpoint from any of its possible files.

    Args:
        folder: The checkpoint.

    Returns:
        The labels, with a note for each key on which the files disagree. Without a config, as in
        old checkpoints, the labels have no values: the shapes determine most of them.

    Raises:
        CheckpointError: A file is not valid JSON, a value has the wrong type, or the config is for
            another method (AWQ, Marlin, bitsandbytes); names the file and the key.
    """
    found = _find_configs(folder)
    if not found:
        note = (
            f"No quantization config in {MODEL_CONFIG}, {' or '.join(CONFIG_FILES)}: bits and "
            "groups are inferred from the shapes, and asymmetric zeros are read as v1."
        )
        return QuantizationLabels(source=None, notes=(note,))
    source, raw = found[0]
    labels = _check_labels(source, raw)
    disagreements: dict[str, str] = {}
    for other_source, other_raw in found[1:]:
        other = _check_labels(other_source, other_raw)
        disagreements |= _find_disagreements(source, labels, other_source, other)
        labels = other | labels
    return _make_labels(source, raw, labels, disagreements)


def read_model_config(folder: Path) -> dict[str, Any]:
    """Read ``config.json``; an empty dict if there is none.

    Args:
        folder: A model folder.

    Returns:
        The model's config.

    Raises:
        CheckpointError: The file cannot be read or is not a JSON object.
    """
    return _read_json(folder / MODEL_CONFIG) or {}


def describe_missing_config(folder: Path) -> str:
    """Describe why a folder without ``config.json`` is not a model, for messages.

    Args:
        folder: The folder; may not exist.

    Returns:
        What it is or lacks.

    Raises:
        CheckpointError: The config of an adapter cannot be read or is not a JSON object.
    """
    if not folder.is_dir():
        if not folder.exists():
            return "no such folder"
        return _describe_gguf("it is", folder) if folder.suffix == GGUF_SUFFIX else "it is a file"
    adapter = _read_json(folder / ADAPTER_CONFIG)
    if adapter is None:
        missing = f"it has no {MODEL_CONFIG}"
        for gguf in sorted(folder.glob(f"*{GGUF_SUFFIX}")):
            return _describe_gguf(f"{missing}, only", gguf)
        return missing
    base = adapter.get("base_model_name_or_path") or "a model"
    return (
        f"it is an adapter on {base} ({ADAPTER_CONFIG} and no {MODEL_CONFIG}). To make one model "
        f"of both: halfbyte merge BASE {folder} -o OUT"
    )


def _describe_gguf(found: str, path: Path) -> str:
    return f"{found} a GGUF file. To make a folder of it: halfbyte convert {path} --to hf -o OUT"


def read_quantization_config(folder: Path) -> dict[str, Any]:
    """Read the quantization config unchanged, for any method; empty if there is none.

    Args:
        folder: A model folder.

    Returns:
        The config; if there are several, the one that takes precedence.

    Raises:
        CheckpointError: A file cannot be read or is not a JSON object.
    """
    found = _find_configs(folder)
    return found[0][1] if found else {}


def drop_quantization_config(model_config: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the quantization config from a model config.

    Args:
        model_config: ``config.json``; left unchanged.

    Returns:
        A copy without it, at the top level and in ``text_config``.
    """
    remaining = {key: value for key, value in model_config.items() if key != CONFIG_SECTION}
    if isinstance(remaining.get("text_config"), dict):
        remaining["text_config"] = drop_quantization_config(remaining["text_config"])
    return remaining


def name_method(config: Mapping[str, Any]) -> str:
    """Return the method of a quantization config; AutoAWQ's own file has only a version."""
    is_awq = str(config.get("version", "")).lower() in AWQ_VERSIONS
    return "awq" if is_awq else str(config.get("quant_method") or METHOD).lower()


def _find_configs(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """List the configs in the folder, in order of precedence."""
    found: list[tuple[str, dict[str, Any]]] = []
    model_config = read_model_config(folder)
    text_config = model_config.get("text_config")
    places = [(MODEL_CONFIG, model_config)]
    if isinstance(text_config, dict):
        places.append((f"{MODEL_CONFIG}[text_config]", text_config))
    for where, config in places:
        section = config.get(CONFIG_SECTION)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise CheckpointError(
                f"Cannot read {CONFIG_SECTION} of {where} in {folder}: it is a "
                f"{type(section).__name__}; an object is needed. Download the file again."
            )
        found.append((where, section))
        break
    for name in CONFIG_FILES:
        config_file = _read_json(folder / name)
        if config_file is not None:
            found.append((name, config_file))
    return found


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        text = file.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"Cannot read {file}: {error.strerror or error}. Check the path and its permissions."
        ) from error
    return parse_json_object(text, str(file))


def _check_labels(source: str, raw: Mapping[str, Any]) -> dict[str, Any]:
    """Normalize the key names, check the types, and reject other methods."""
    labels: dict[str, Any] = {}
    for key, value in raw.items():
        name = CONFIG_ALIASES.get(key, key)
        # The standard name takes precedence over its alias: GPTQModel writes both.
        if name not in _KEY_TYPES or value is None or (name != key and raw.get(name) is not None):
            continue
        if type(value) not in _KEY_TYPES[name]:
            wanted = " or ".join(kind.__name__ for kind in _KEY_TYPES[name])
            raise CheckpointError(
                f"Cannot use {key} of {source}: it is {str(value)[:60]!r}; a {wanted} is needed. "
                "Correct the file, or download it again."
            )
        labels[name] = value.lower() if isinstance(value, str) else value
    _check_method(source, raw, labels)
    _check_values(source, labels)
    return labels


def _check_method(source: str, raw: Mapping[str, Any], labels: Mapping[str, Any]) -> None:
    found = name_method(raw)
    if found not in METHODS:
        raise CheckpointError(
            f"Cannot read the checkpoint: the quantization method in {source} is '{found}'; only "
            "'gptq' is supported. Convert it (halfbyte convert FOLDER --to gptq -o OUT), use the "
            "tool that made it, or quantize the base model again."
        )
    kind = labels.get("checkpoint_format", FORMAT_V1)
    if kind not in ZERO_OFFSETS:
        raise CheckpointError(
            f"Cannot read the checkpoint: {source} has checkpoint_format '{kind}'; allowed are "
            f"{', '.join(ZERO_OFFSETS)}. Save it again as 'gptq' with the tool that made it."
        )
    if labels.get("pack_dtype", "int32") != "int32":
        raise CheckpointError(
            f"Cannot read the checkpoint: {source} has pack_dtype '{labels['pack_dtype']}'; only "
            "int32 is supported. Save it again with pack_dtype int32."
        )


def _check_values(source: str, labels: Mapping[str, Any]) -> None:
    group_size = labels.get("group_size", -1)
    if group_size != -1 and group_size < 1:
        raise CheckpointError(
            f"Cannot use group_size of {source}: it is {str(group_size)[:20]}; allowed are -1 or a "
            "positive number. Correct the file, or download it again."
        )
    for pattern, override in labels.get("dynamic", {}).items():
        if not isinstance(override, dict):
            raise CheckpointError(
                f"Cannot use dynamic of {source}: the value of '{pattern}' is "
                f"{str(override)[:60]!r}; an object is needed. Correct the file."
            )
    for entry in labels.get("modules_in_block_to_quantize", []):
        names = entry if isinstance(entry, list) else [entry]
        if not all(isinstance(name, str) for name in names):
            raise CheckpointError(
                f"Cannot use modules_in_block_to_quantize of {source}: {str(entry)[:60]!r} is not "
                "a name or a list of names. Correct the file."
            )


def _find_disagreements(
    source: str, labels: Mapping[str, Any], other_source: str, other: Mapping[str, Any]
) -> dict[str, str]:
    return {
        key: f"{key} is {str(labels[key])[:40]} in {source} and {str(other[key])[:40]} in "
        f"{other_source}"
        for key in ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "dynamic")
        if key in labels and key in other and labels[key] != other[key]
    }


def _make_labels(
    source: str,
    raw: Mapping[str, Any],
    labels: Mapping[str, Any],
    disagreements: Mapping[str, str],
) -> QuantizationLabels:
    modules: list[str] = []
    for entry in labels.get("modules_in_block_to_quantize", []):
        modules.extend(entry if isinstance(entry, list) else [entry])
    return QuantizationLabels(
        source=source,
        bits=labels.get("bits"),
        group_size=labels.get("group_size"),
        symmetric=labels.get("sym"),
        desc_act=labels.get("desc_act"),
        checkpoint_format=labels.get("checkpoint_format"),
        lm_head=labels.get("lm_head", False),
        dynamic=labels.get("dynamic", {}),
        modules_in_block=tuple(modules),
        raw=raw,
        disagreements=disagreements,
        notes=tuple(
            f"{found}; {source} is used, as Transformers and vLLM do."
            for found in disagreements.values()
        ),
    )
