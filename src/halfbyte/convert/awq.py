"""AWQ in the GEMM version: codes packed along ``out``, interleaved for its kernels.

::

    <module>.qweight  int32 [in, out / 8]      nibble i of word c: output 8 * c + ORDER[i]
    <module>.qzeros   int32 [groups, out / 8]  zeros in the same order
    <module>.scales   fp16  [groups, out]

Only four bits, one group size for the whole model, zeros from 0 to 15.

Source:
    AutoAWQ ``awq/modules/linear/gemm.py`` (``order_map``) and ``utils/packing_utils.py``; vLLM
    ``quantization/awq.py`` and ``awq_marlin.py`` for the group sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.header import read_metadata
from halfbyte.checkpoint.labels import CONFIG_SECTION
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.bit_order import ORDER, from_awq, to_awq
from halfbyte.convert.coded_linear import FREE_MINIMA, CodedLinear, CodedSpec
from halfbyte.convert.hints import HINT_KEY, format_hints, read_hints, restore_groups
from halfbyte.convert.source import (
    FLOATS,
    FolderSource,
    check_finite,
    check_shape,
    require_matrices,
    view_tensors,
)
from halfbyte.errors import CheckpointError

BITS = 4
PER_WORD = 32 // BITS
GROUP_SIZES = (128, 64, 32)

_TENSORS = {
    "qweight": (torch.int32,),
    "qzeros": (torch.int32,),
    "scales": FLOATS,
    "bias": FLOATS,
}


def pack_outputs(values: Tensor) -> Tensor:
    """Pack 4-bit values [out, n] along ``out`` into int32 [n, out / 8].

    Args:
        values: uint8 0..15; ``out`` is a multiple of 8.

    Returns:
        The words, contiguous.
    """
    parts = values.reshape(-1, 8, values.shape[1])
    words = parts[:, ORDER[0]].to(torch.int32)
    for place, output in enumerate(ORDER[1:], start=1):
        words |= parts[:, output].to(torch.int32) << (BITS * place)
    return words.t().contiguous()


def unpack_outputs(words: Tensor) -> Tensor:
    """Invert :func:`pack_outputs`: int32 [n, out / 8] to uint8 [out, n]."""
    transposed = words.t().contiguous()
    values = torch.empty((words.shape[1], 8, words.shape[0]), dtype=torch.uint8)
    for place, output in enumerate(ORDER):
        values[:, output] = (transposed >> (BITS * place)) & 15
    return values.view(-1, words.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqSource(FolderSource):
    """An AWQ checkpoint of the GEMM version."""

    hints: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Original bits and group size by module, from the notes of a halfbyte conversion."""
    format: str = "awq"

    @classmethod
    def open(
        cls, folder: Path, labels: Mapping[str, Any], model_config: Mapping[str, Any]
    ) -> AwqSource:
        """Open a checkpoint and validate its config and shapes; no tensor is read.

        Args:
            folder: The checkpoint.
            labels: Its quantization config.
            model_config: ``config.json`` without the quantization config.

        Returns:
            The source.

        Raises:
            CheckpointError: It is not of the GEMM version, or a shape is inconsistent.
        """
        version = str(labels.get("version", labels.get("format", "gemm"))).lower()
        bits = labels.get("bits", labels.get("w_bit", BITS))
        if version != "gemm" or bits != BITS:
            raise CheckpointError(
                f"Cannot read {folder}: it is AWQ of version '{version}' with {bits} bits; only "
                "'gemm' with 4 bits is supported. Save it in that version with the tool that made "
                "it."
            )
        files = TensorFiles.open(folder)
        view = view_tensors(files, "qweight", _TENSORS, "AWQ")
        hints: dict[str, tuple[int, int]] = {}
        for file in files.files:
            hints |= read_hints(read_metadata(file).get(HINT_KEY), str(file))
        for name, parts in view.parts.items():
            _check_parts(name, parts)
        return cls(folder=folder, view=view, model_config=model_config, hints=hints)

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear; its codes are read only if it originally had other bits."""
        hint = self.hints.get(name)
        if hint is not None and hint[0] != BITS:
            return self.load_linear(name).describe()
        parts = self.view.parts[name]
        inputs, words = parts["qweight"].shape
        placeholder = torch.empty(words * PER_WORD, inputs // PER_WORD, device="meta")
        linear = self._assemble(name, self.view.load(name, ("scales", "qzeros")), placeholder)
        return replace(linear.describe(), bias=parts.get("bias"))

    def load_linear(self, name: str) -> CodedLinear:
        """Read one quantized linear, with its original bits and groups if the file notes them."""
        tensors = self.view.load(name, tuple(_TENSORS))
        return self._assemble(name, tensors, from_awq(tensors["qweight"]).t())

    def _assemble(self, name: str, tensors: Mapping[str, Tensor], words: Tensor) -> CodedLinear:
        scales = check_finite(f"{name}.scales", tensors["scales"])
        if "bias" in tensors:
            check_finite(f"{name}.bias", tensors["bias"])
        linear = CodedLinear(
            words=words,
            scales=scales.t().contiguous(),
            zeros=unpack_outputs(tensors["qzeros"]).to(torch.int16),
            bits=BITS,
            group_size=words.shape[1] * PER_WORD // scales.shape[0],
            g_idx=None,
            bias=tensors.get("bias"),
        )
        return restore_groups(linear, *self.hints[name]) if name in self.hints else linear


def _check_parts(name: str, parts: Mapping[str, TensorSpec]) -> None:
    require_matrices(name, parts, ("qweight", "qzeros", "scales"))
    in_features, words = parts["qweight"].shape
    groups = parts["scales"].shape[0]
    check_shape(f"{name}.scales", parts["scales"], (groups, words * 8))
    check_shape(f"{name}.qzeros", parts["qzeros"], (groups, words))
    if "bias" in parts:
        check_shape(f"{name}.bias", parts["bias"], (words * 8,))
    if in_features % groups or in_features % 8:
        raise CheckpointError(
            f"{name}.scales has {groups} groups for {in_features} inputs; groups of equal size and "
            "a multiple of 8 inputs are needed. The file is damaged; download it again."
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqTarget:
    """The AWQ GEMM version, with one group size for the whole model."""

    group_size: int
    format: str = "awq"

    @classmethod
    def from_specs(cls, specs: Mapping[str, CodedSpec]) -> AwqTarget:
        """Choose the largest group size into which the groups of all linears can be split."""
        even = math.gcd(*(spec.even_group for spec in specs.values() if _is_encodable(spec)))
        return cls(group_size=next((size for size in GROUP_SIZES if even % size == 0), even))

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Note the linears whose groups are split, so that converting back restores them."""
        split = {
            name: spec
            for name, spec in coded.items()
            if spec.bits == BITS and spec.group_size != self.group_size
        }
        return {"format": "pt"} | ({HINT_KEY: format_hints(split)} if split else {})

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be represented exactly; None if it can."""
        if spec.has_free_minima:
            return FREE_MINIMA
        if spec.bits > BITS:
            return f"{spec.bits} bits; AWQ has 4"
        if not spec.is_ordered:
            return "act-order (desc_act); AWQ has no g_idx"
        if not spec.scales_fit_half:
            return "a scale that fp16 cannot represent"
        if spec.out_features % 8:
            return f"{spec.out_features} outputs, which is not a multiple of 8"
        if self.group_size not in GROUP_SIZES:
            return f"groups of {spec.group_size}; AWQ's kernels need equal groups of {GROUP_SIZES}"
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Return None: the format has no approximate representation."""
        return None

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""
        out, groups = spec.out_features, spec.in_features // self.group_size
        tensors = {
            "qweight": TensorSpec(dtype=torch.int32, shape=(spec.in_features, out // 8)),
            "qzeros": TensorSpec(dtype=torch.int32, shape=(groups, out // 8)),
            "scales": TensorSpec(dtype=torch.float16, shape=(groups, out)),
        }
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""
        linear = linear.widen(BITS).split_groups(self.group_size)
        tensors = {
            "qweight": to_awq(linear.words_in_columns()),
            "qzeros": pack_outputs(linear.zeros.to(torch.uint8)),
            "scales": linear.scales.to(torch.float16).t().contiguous(),
        }
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear:
        """Decode a linear from its tensors."""
        return CodedLinear(
            words=from_awq(tensors["qweight"]).t(),
            scales=tensors["scales"].t(),
            zeros=unpack_outputs(tensors["qzeros"]).to(torch.int16),
            bits=BITS,
            group_size=self.group_size,
            g_idx=None,
            bias=tensors.get("bias"),
        )

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
        section = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": BITS,
            "group_size": self.group_size,
            "zero_point": True,
            "modules_to_not_convert": dense or None,
        }
        return {**model_config, CONFIG_SECTION: section}


def _is_encodable(spec: CodedSpec) -> bool:
    return spec.bits <= BITS and spec.is_ordered and not spec.has_free_minima
