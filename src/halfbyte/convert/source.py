"""The interface of sources of a conversion, and the code that folder formats share.

Each format's module has a class with the interface :class:`Source`; ``detect.py`` chooses one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.errors import CheckpointError

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class Source(Protocol):
    """An open quantized model: names and sizes are known, no weight is in memory."""

    @property
    def format(self) -> str:
        """Name of the format, such as "gptq"."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """``config.json`` without the quantization config."""

    @property
    def linears(self) -> Mapping[str, object]:
        """Every quantized module by its full name, in the order of the files."""

    @property
    def others(self) -> Mapping[str, TensorSpec]:
        """Every tensor outside the quantized modules."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Choices and rounding while reading."""

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of tokenizer and model card."""

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear; reads only its small tensors if the format has separate ones."""

    def load_linear(self, name: str) -> CodedLinear:
        """Read one quantized linear."""

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor."""

    def copy_companions(self, output: Path) -> None:
        """Copy tokenizer, chat template and license to a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFilesView:
    """The tensors of a safetensors folder, sorted into quantized modules and others."""

    files: TensorFiles
    parts: Mapping[str, Mapping[str, TensorSpec]]
    """Tensors by suffix, by quantized module."""
    others: Mapping[str, TensorSpec]

    def load(self, name: str, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
        """Read the tensors of a module with these suffixes, if it has them."""
        present = [suffix for suffix in suffixes if suffix in self.parts[name]]
        tensors = self.files.load([f"{name}.{suffix}" for suffix in present])
        return {suffix: tensors[f"{name}.{suffix}"] for suffix in present}

    def load_other(self, name: str) -> Tensor:
        """Read one tensor outside the quantized modules."""
        return self.files.load([name])[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """Base class of sources in safetensors folders; formats add the reading of linears."""

    folder: Path
    view: TensorFilesView
    model_config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def linears(self) -> Mapping[str, object]:
        """Every quantized module."""
        return self.view.parts

    @property
    def others(self) -> Mapping[str, TensorSpec]:
        """Every tensor outside the quantized modules."""
        return self.view.others

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of tokenizer and model card."""
        return self.folder

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor."""
        return self.view.load_other(name)

    def copy_companions(self, output: Path) -> None:
        """Copy tokenizer, chat template and license."""
        copy_companions(self.folder, output)


def view_tensors(
    files: TensorFiles, marker: str, allowed: Mapping[str, tuple[torch.dtype, ...]], method: str
) -> TensorFilesView:
    """Sort a folder's tensors into quantized modules and others; check names and types.

    Args:
        files: The folder.
        marker: Suffix that identifies a quantized module, such as "weight_packed".
        allowed: Allowed element types by suffix.
        method: Name of the format, for messages.

    Returns:
        The sorted tensors.

    Raises:
        CheckpointError: No module is quantized, or one has an unexpected tensor.
    """
    parts: dict[str, dict[str, TensorSpec]] = {
        name.removesuffix(f".{marker}"): {} for name in files.infos if name.endswith(f".{marker}")
    }
    others: dict[str, TensorSpec] = {}
    for name, info in files.infos.items():
        spec = TensorSpec(dtype=info.dtype, shape=info.shape)
        module, _, suffix = name.rpartition(".")
        if module not in parts:
            others[name] = spec
            continue
        if suffix not in allowed or info.dtype not in allowed[suffix]:
            raise CheckpointError(
                f"Cannot read {name} of {files.folder} as {method}: a quantized module has only "
                f"{', '.join(allowed)}, each with certain element types, but this has "
                f"{str(info.dtype).removeprefix('torch.')}. The file is damaged or of another "
                "format."
            )
        parts[module][suffix] = spec
    if not parts:
        raise CheckpointError(
            f"{files.folder} is {method} according to its config, but has no tensor whose name "
            f"ends in .{marker}. The config or the weights belong to another model."
        )
    return TensorFilesView(files=files, parts=parts, others=others)


def require_matrices(name: str, parts: Mapping[str, TensorSpec], suffixes: tuple[str, ...]) -> None:
    """Check that a module has the required tensors, and that they are matrices.

    Args:
        name: The module.
        parts: Its tensors.
        suffixes: Suffixes of the required tensors.

    Raises:
        CheckpointError: A tensor is missing or not a matrix.
    """
    for suffix in suffixes:
        if suffix not in parts:
            raise CheckpointError(
                f"The checkpoint has no {name}.{suffix}, only {', '.join(sorted(parts))}. "
                "It is incomplete; download it again."
            )
        shape = parts[suffix].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{name}.{suffix} has shape {list(shape)}; a matrix is needed. "
                "The file is damaged; download it again."
            )


def check_shape(name: str, spec: TensorSpec, expected: tuple[int, ...]) -> None:
    """Check a tensor's shape.

    Args:
        name: The tensor.
        spec: Its type and shape.
        expected: The expected shape.

    Raises:
        CheckpointError: The shapes differ; names both.
    """
    if spec.shape != expected:
        raise CheckpointError(
            f"{name} has shape {list(spec.shape)}; {list(expected)} is needed. "
            "The file is damaged; download it again."
        )


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Check that all values are finite.

    Args:
        name: The tensor.
        tensor: Its values.

    Returns:
        The tensor.

    Raises:
        CheckpointError: Some values are not finite; says how many.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{name} has {bad} of {tensor.numel()} values that are infinite or not a number. "
            "The file is damaged; download it again."
        )
    return tensor
