"""Read a GGUF file as quantized linears, with Transformers' names and order of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.convert.dense import DTYPES
from halfbyte.convert.gguf_architecture import (
    ARCHITECTURES,
    EMBEDDING,
    HEAD,
    IN_FLOAT32,
    Architecture,
)
from halfbyte.convert.gguf_blocks import PLAIN, decode_blocks, decode_plain
from halfbyte.convert.gguf_config import check_complete, read_config
from halfbyte.convert.gguf_file import F32, Q4_0, Q4_1, Q8_0, GgufFile, GgufTensor, open_gguf
from halfbyte.convert.gguf_positions import FACTOR_TENSORS
from halfbyte.convert.hints import HINT_KEY, read_hints, restore_groups
from halfbyte.errors import CheckpointError, require_extra

CODED = (Q4_0, Q4_1, Q8_0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufSource:
    """A GGUF file of a supported architecture."""

    file: GgufFile
    architecture: Architecture
    model_config: Mapping[str, Any]
    base: Path | None
    linears: Mapping[str, GgufTensor]
    others: Mapping[str, TensorSpec]
    places: Mapping[str, GgufTensor]
    """Every tensor except quantized weights, by Transformers' name; slices for experts."""
    hints: Mapping[str, tuple[int, int]]
    """Original bits and group size by module, from the notes of a halfbyte conversion."""
    notes: tuple[str, ...]
    dtype: torch.dtype
    """Type of the model's unquantized weights."""
    format: str = "gguf"

    @classmethod
    def open(cls, path: Path, base: Path | None) -> GgufSource:
        """Open a file and validate its header; only data that GGUF widens is read.

        Args:
            path: The file.
            base: A folder with the model's ``config.json`` and tokenizer; None to make both from
                the file's metadata.

        Returns:
            The source.

        Raises:
            CheckpointError: The file is damaged, incomplete, or of an unsupported architecture; or
                the base has no config.
        """
        file = open_gguf(path)
        config = read_config(file, base)
        architecture = _find_architecture(file, config)
        check_complete(file, architecture, config)
        linears, places = _sort_tensors(file, architecture, config)
        if not linears:
            raise CheckpointError(
                f"{path} has no linear in Q4_0, Q4_1 or Q8_0 among {len(file.tensors)} tensors."
            )
        others = {
            name: _describe_other(architecture, name, info)
            for name, info in places.items()
            if name.removesuffix(".bias") not in linears
        }
        source = cls(
            file=file,
            architecture=architecture,
            model_config=config,
            base=base,
            linears=linears,
            others=others,
            places=places,
            hints=read_hints(file.pairs.get(HINT_KEY), str(file.path)),
            notes=tuple(
                f"{info.name} is {info.kind.name} and was decoded to float16"
                for info in {info.name: info for info in places.values()}.values()
                if info.kind not in PLAIN
            ),
            dtype=DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.float32),
        )
        narrowed = {
            name: replace(spec, dtype=source.load_other(name).dtype)
            for name, spec in others.items()
            if _is_widened(places[name])
        }
        return replace(source, others=others | narrowed)

    @property
    def tokenizer_folder(self) -> Path:
        """The base model's folder, or the one that contains the file."""
        return self.file.path.parent if self.base is None else self.base

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear."""
        return self.load_linear(name).describe()

    def load_linear(self, name: str) -> CodedLinear:
        """Read one linear, in Transformers' order of rows.

        Args:
            name: Transformers' name of the module.

        Returns:
            The linear, with its original bits and groups if the file notes them and the blocks
            are consistent with them.

        Raises:
            CheckpointError: It is damaged.
        """
        info = self.linears[name]
        linear = decode_blocks(info.name, self.file.read(info), info.kind, info.shape)
        if f"{name}.bias" in self.places:
            linear = replace(linear, bias=self._narrow(self._load_plain(f"{name}.bias")))
        order = self._find_row_order(name, linear.out_features)
        if order is not None:
            linear = linear.take_rows(order)
        return restore_groups(linear, *self.hints[name]) if name in self.hints else linear

    def load_other(self, name: str) -> Tensor:
        """Read one other tensor."""
        module = name.rpartition(".")[0]
        tensor = self._load_plain(name)
        order = self._find_row_order(module, tensor.shape[0])
        tensor = tensor if order is None else tensor[order]
        if self.architecture.norm_shift and name.endswith("norm.weight"):
            tensor = tensor - self.architecture.norm_shift
        if tensor.dim() == 2 and self.architecture.is_transposed(name):
            tensor = tensor.t().contiguous()
        spec = self.others[name]
        is_widened = _is_widened(self.places[name])
        return (self._narrow(tensor) if is_widened else tensor.to(spec.dtype)).view(spec.shape)

    def copy_companions(self, output: Path) -> None:
        """Copy the tokenizer of the base, or make one from the file's metadata.

        Args:
            output: The folder.

        Raises:
            MissingExtraError: The package that reads the metadata is not installed.
            CheckpointError: Transformers cannot make a tokenizer from the metadata.
        """
        if self.base is not None:
            copy_companions(self.base, output)
            return
        from transformers import AutoTokenizer

        with require_extra("gguf", "convert", "Making a tokenizer from a .gguf file"):
            import gguf  # noqa: F401 - needed by Transformers
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.file.path.parent, gguf_file=self.file.path.name
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
            raise CheckpointError(
                f"Cannot make a tokenizer from {self.file.path}: {error}. Give the folder of the "
                "original model with --base."
            ) from error
        tokenizer.save_pretrained(output)

    def _load_plain(self, name: str) -> Tensor:
        info = self.places[name]
        return decode_plain(info.name, self.file.read(info), info.kind, info.shape)

    def _narrow(self, tensor: Tensor) -> Tensor:
        """Convert a tensor that GGUF stores in 32 bits to the model's type, if that is exact."""
        narrow = tensor.to(self.dtype)
        return narrow if torch.equal(narrow.to(tensor.dtype), tensor) else tensor

    def _find_row_order(self, module: str, rows: int) -> Tensor | None:
        order = self.architecture.row_order(module, self.model_config, rows)
        return None if order is None else torch.argsort(order)


def _sort_tensors(
    file: GgufFile, architecture: Architecture, config: Mapping[str, Any]
) -> tuple[dict[str, GgufTensor], dict[str, GgufTensor]]:
    """Map Transformers' names to quantized weights (by module) and all other tensors."""
    has_tied_head = architecture.needs_head and architecture.is_tied(config)
    linears: dict[str, GgufTensor] = {}
    places: dict[str, GgufTensor] = {}
    for name, info in file.tensors.items():
        stem, _, suffix = name.rpartition(".")
        if name in FACTOR_TENSORS or (has_tied_head and stem == HEAD):
            continue
        module = architecture.from_gguf(stem)
        has_experts = module is not None and "*" in module
        if (
            module is None
            or suffix not in ("weight", "bias")
            or (has_experts and len(info.shape) < 2)
        ):
            raise CheckpointError(
                f"Cannot read {file.path}: '{architecture.name}' has no tensor {name[:80]} with "
                f"{len(info.shape)} dimensions. It is damaged, or was made by another version of "
                "llama.cpp."
            )
        parts = {module: info}
        if has_experts:
            parts = {
                module.replace("*", str(number)): info.part(number)
                for number in range(info.shape[0])
            }
        is_coded = suffix == "weight" and info.kind in CODED and stem not in (EMBEDDING, HEAD)
        for one, part in parts.items():
            if is_coded and len(part.shape) == 2:
                linears[one] = part
            else:
                places[f"{one}.{suffix}"] = part
    return linears, places


def _is_widened(info: GgufTensor) -> bool:
    """Return whether GGUF always stores this tensor in 32 bits."""
    module = info.name.rpartition(".")[0].rpartition(".")[2]
    return info.kind == F32 and (len(info.shape) < 2 or module in IN_FLOAT32)


def _describe_other(architecture: Architecture, name: str, info: GgufTensor) -> TensorSpec:
    """Return a tensor's type and shape in Transformers' order of dimensions."""
    shape = info.shape
    if len(shape) == 2 and architecture.is_transposed(name):
        shape = shape[::-1]
    if name.endswith("shared_expert_gate.weight"):
        shape = (1, *shape)
    return TensorSpec(dtype=PLAIN.get(info.kind, torch.float16), shape=shape)


def _find_architecture(file: GgufFile, config: Mapping[str, Any]) -> Architecture:
    """Find the file's architecture; if several share the name, the one of the config's class."""
    name = file.pairs.get("general.architecture")
    families = [family for family in ARCHITECTURES if family.name == name]
    if not families:
        known = ", ".join(dict.fromkeys(family.name for family in ARCHITECTURES))
        raise CheckpointError(
            f"Cannot read {file.path}: its architecture is '{str(name)[:40]}'; the supported "
            f"ones are {known}."
        )
    classes = config.get("architectures") or []
    return next((f for f in families if f.model_class in classes), families[0])
