"""What a conversion reads: coded linears, other tensors, and what is said about them.

Each format's file has a class that is a :class:`Source`; ``detect.py`` chooses one.
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


class Source(Protocol):
    """A quantized model that is open: names and sizes are known, no weight is in memory."""

    @property
    def format(self) -> str:
        """Name of the format, such as "gptq"."""

    @property
    def model_config(self) -> Mapping[str, Any]:
        """``config.json`` without its quantization section."""

    @property
    def linears(self) -> Mapping[str, object]:
        """Every coded module by its full name, in the order of the files."""

    @property
    def others(self) -> Mapping[str, TensorSpec]:
        """Every tensor that belongs to no coded module."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What was decided or rounded while reading."""

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and model card are."""

    def describe(self, name: str) -> CodedSpec:
        """Give a linear's facts; reads no more than its small tensors where they stand apart."""

    def load_linear(self, name: str) -> CodedLinear:
        """Read one coded linear."""

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor."""

    def copy_companions(self, output: Path) -> None:
        """Put tokenizer, chat template and licence into a folder."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorFilesView:
    """The tensors of a safetensors folder, read one at a time; names the file in its errors."""

    files: TensorFiles
    parts: Mapping[str, Mapping[str, TensorSpec]]
    """By coded module: its tensors by suffix."""
    others: Mapping[str, TensorSpec]

    def load(self, name: str, suffixes: tuple[str, ...]) -> dict[str, Tensor]:
        """Read those of a module's tensors that it has."""
        present = [suffix for suffix in suffixes if suffix in self.parts[name]]
        tensors = self.files.load([f"{name}.{suffix}" for suffix in present])
        return {suffix: tensors[f"{name}.{suffix}"] for suffix in present}

    def load_other(self, name: str) -> Tensor:
        """Read one tensor that belongs to no coded module."""
        return self.files.load([name])[name]


@dataclass(frozen=True, slots=True, kw_only=True)
class FolderSource:
    """What all safetensors folders have in common; a format adds how its linears are read."""

    folder: Path
    view: TensorFilesView
    model_config: Mapping[str, Any]
    notes: tuple[str, ...] = ()

    @property
    def linears(self) -> Mapping[str, object]:
        """Every coded module."""
        return self.view.parts

    @property
    def others(self) -> Mapping[str, TensorSpec]:
        """Every tensor that belongs to no coded module."""
        return self.view.others

    @property
    def tokenizer_folder(self) -> Path:
        """Where tokenizer and model card are."""
        return self.folder

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor."""
        return self.view.load_other(name)

    def copy_companions(self, output: Path) -> None:
        """Copy tokenizer, chat template and licence."""
        copy_companions(self.folder, output)


def view_tensors(
    files: TensorFiles, marker: str, allowed: Mapping[str, tuple[torch.dtype, ...]], method: str
) -> TensorFilesView:
    """Sort a folder's tensors into coded modules and others; check names and element types.

    Args:
        files: The folder.
        marker: The suffix that makes a module a coded one, such as "weight_packed".
        allowed: Element types by suffix; all but "bias" are needed where they are first, second
            and third.
        method: The format's name, for messages.

    Returns:
        The tensors, sorted.

    Raises:
        CheckpointError: No module is coded, or one has a tensor that does not belong to it.
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
                f"Cannot read {name} of {files.folder} as {method}: it has the element type "
                f"{str(info.dtype).removeprefix('torch.')}, and such a module has "
                f"{', '.join(allowed)} of fixed types. The file is damaged or of another format."
            )
        parts[module][suffix] = spec
    if not parts:
        raise CheckpointError(
            f"{files.folder} says that it is {method}, but it has no tensor that ends in "
            f".{marker}. The config or the weights belong to another model."
        )
    return TensorFilesView(files=files, parts=parts, others=others)


def require_matrices(name: str, parts: Mapping[str, TensorSpec], suffixes: tuple[str, ...]) -> None:
    """Check that a module has its tensors, and that they are matrices.

    Args:
        name: The module.
        parts: Its tensors.
        suffixes: Those needed.

    Raises:
        CheckpointError: One is missing or is no matrix.
    """
    for suffix in suffixes:
        if suffix not in parts:
            raise CheckpointError(
                f"The checkpoint has no {name}.{suffix} beside {', '.join(sorted(parts))}. "
                "It is incomplete; download it again."
            )
        shape = parts[suffix].shape
        if len(shape) != 2 or 0 in shape:
            raise CheckpointError(
                f"{name}.{suffix} has shape {list(shape)}; a matrix is needed. "
                "The file is damaged; download it again."
            )


def check_shape(name: str, spec: TensorSpec, expected: tuple[int, ...]) -> None:
    """Compare a tensor's shape with the one that its neighbours imply.

    Args:
        name: The tensor.
        spec: What it is.
        expected: What it must be.

    Raises:
        CheckpointError: They differ; names both.
    """
    if spec.shape != expected:
        raise CheckpointError(
            f"{name} has shape {list(spec.shape)}; {list(expected)} is needed. "
            "The file is damaged; download it again."
        )


def check_finite(name: str, tensor: Tensor) -> Tensor:
    """Refuse values that are infinite or not a number.

    Args:
        name: The tensor.
        tensor: Its values.

    Returns:
        The tensor.

    Raises:
        CheckpointError: Some are not finite; says how many.
    """
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise CheckpointError(
            f"{name} has {bad} of {tensor.numel()} values that are infinite or not a number. "
            "The file is damaged; download it again."
        )
    return tensor
