"""MLX's affine quantization: ``weight = scales * code + biases``, words along ``in``.

::

    <module>.weight  uint32 [out, in * bits / 32]  a little-endian stream of codes
    <module>.scales  float  [out, groups]
    <module>.biases  float  [out, groups]          - zero * scale

Source:
    MLX ``mlx/ops.cpp`` (``affine_quantize``) and the documentation of ``mx.quantize``; mlx-lm
    ``utils.py`` (``load_model``): per-module settings are in "quantization" under its path.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec
from halfbyte.convert.source import (
    FLOATS,
    FolderSource,
    check_finite,
    check_shape,
    require_matrices,
    view_tensors,
)
from halfbyte.errors import CheckpointError

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (128, 64, 32)
SECTION = "quantization"

_TENSORS = {
    "weight": (torch.uint32, *FLOATS),
    "scales": FLOATS,
    "biases": FLOATS,
    "bias": FLOATS,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxSource(FolderSource):
    """An mlx-lm checkpoint with affine quantization."""

    group_sizes: Mapping[str, int]
    format: str = "mlx"

    @classmethod
    def open(
        cls, folder: Path, labels: Mapping[str, Any], model_config: Mapping[str, Any]
    ) -> MlxSource:
        """Open a checkpoint and validate its config and shapes; no tensor is read.

        Args:
            folder: The checkpoint.
            labels: Its "quantization" section.
            model_config: ``config.json`` without that section.

        Returns:
            The source.

        Raises:
            CheckpointError: Its mode is not affine, or a shape is inconsistent.
        """
        if labels.get("mode", "affine") != "affine":
            raise CheckpointError(
                f"Cannot read {folder}: its MLX mode is '{labels['mode']}'; only 'affine' is "
                "supported. Convert it with the tool that made it."
            )
        view = view_tensors(TensorFiles.open(folder), "scales", _TENSORS, "MLX")
        sizes = {name: _read_group_size(name, labels) for name in view.parts}
        for name, parts in view.parts.items():
            _check_parts(name, parts, sizes[name])
        return cls(folder=folder, view=view, group_sizes=sizes, model_config=model_config)

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear."""
        return self.load_linear(name).describe()

    def load_linear(self, name: str) -> CodedLinear:
        """Read one quantized linear."""
        tensors = self.view.load(name, tuple(_TENSORS))
        for suffix in ("scales", "biases", "bias"):
            if suffix in tensors:
                check_finite(f"{name}.{suffix}", tensors[suffix])
        scales, bits = tensors["scales"], _infer_bits(self.view.parts[name], self.group_sizes[name])
        zeros, free_minima = find_zeros(scales, tensors["biases"], bits)
        return CodedLinear(
            words=tensors["weight"].view(torch.int32),
            scales=scales,
            zeros=zeros,
            bits=bits,
            group_size=self.group_sizes[name],
            g_idx=None,
            bias=tensors.get("bias"),
            free_minima=free_minima,
        )


def find_zeros(scales: Tensor, minima: Tensor, bits: int) -> tuple[Tensor, Tensor | None]:
    """Find integer zeros that give the minima: -zero * scale, rounded to their type.

    Args:
        scales: Float, any shape.
        minima: The values of code 0, of the same shape and type.
        bits: Width of a code.

    Returns:
        int16 zeros 0..2**bits-1, and None; if some minimum has no such zero, zeros of 0 and the
        minima.
    """
    middle = 2 ** (bits - 1)
    # With a scale of 0, every weight is 0 for any zero.
    ratio = torch.where(scales == 0, float(middle), -minima.double() / scales.double())
    zeros = torch.nan_to_num(ratio).round().clamp(0, 2**bits - 1)
    recomputed = -(zeros.float() * scales.float())
    if not torch.equal(recomputed.to(minima.dtype), minima):
        return torch.zeros_like(scales, dtype=torch.int16), minima
    return zeros.to(torch.int16), None


def _read_group_size(name: str, labels: Mapping[str, Any]) -> int:
    override = labels.get(name)
    size = (override if isinstance(override, dict) else labels).get("group_size")
    if type(size) is not int or not 0 < size <= 2**24:
        raise CheckpointError(
            f"Cannot read the MLX settings of {name}: group_size is {str(size)[:40]!r}; a positive "
            "number is needed. Correct config.json, or download it again."
        )
    return size


def _infer_bits(parts: Mapping[str, TensorSpec], group_size: int) -> int:
    """Infer the width of a code from the number of words per row."""
    in_features = parts["scales"].shape[1] * group_size
    return parts["weight"].shape[1] * 32 // in_features


def _check_parts(name: str, parts: Mapping[str, TensorSpec], group_size: int) -> None:
    require_matrices(name, parts, ("weight", "scales", "biases"))
    out_features, groups = parts["scales"].shape
    bits = _infer_bits(parts, group_size)
    in_features = groups * group_size
    if parts["weight"].dtype != torch.uint32 or bits not in BITS or in_features * bits % 32:
        raise CheckpointError(
            f"{name}.weight has shape {list(parts['weight'].shape)}, which is {bits} bits for "
            f"{groups} groups of {group_size}; allowed are {BITS}. Correct config.json, or "
            "download it again."
        )
    check_shape(f"{name}.weight", parts["weight"], (out_features, in_features * bits // 32))
    check_shape(f"{name}.biases", parts["biases"], (out_features, groups))
    if parts["biases"].dtype != parts["scales"].dtype:
        raise CheckpointError(
            f"{name}.biases and {name}.scales have different types. The file is damaged; download "
            "it again."
        )
    if "bias" in parts:
        check_shape(f"{name}.bias", parts["bias"], (out_features,))


@dataclass(frozen=True, slots=True, kw_only=True)
class MlxTarget:
    """MLX's affine quantization, with scales and minima in fp16."""

    format: str = "mlx"

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Return the metadata of each file: the framework."""
        return {"format": "mlx"}

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be represented exactly; None if it can."""
        if reason := self._find_incompatibility(spec):
            return reason
        if not spec.minima_fit_half:
            return "minima (zero times scale) that fp16 cannot represent"
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Describe how a linear is rounded; None if it is exact or not representable."""
        if spec.minima_fit_half or self._find_incompatibility(spec):
            return None
        return "minima rounded to fp16"

    def _find_incompatibility(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be represented, even with rounding; None if it can."""
        if not spec.is_ordered:
            return "act-order (desc_act); MLX has no g_idx"
        if not spec.scales_fit_half:
            return "a scale that fp16 cannot represent"
        if spec.even_group % GROUP_SIZES[-1]:
            return f"groups of {spec.group_size}; MLX needs equal groups of {GROUP_SIZES}"
        return None

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""
        words = spec.in_features * spec.bits // 32
        grid = (spec.out_features, spec.in_features // choose_group(spec))
        tensors = {
            "weight": TensorSpec(dtype=torch.uint32, shape=(spec.out_features, words)),
            "scales": TensorSpec(dtype=torch.float16, shape=grid),
            "biases": TensorSpec(dtype=torch.float16, shape=grid),
        }
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""
        linear = linear.split_groups(choose_group(linear.describe()))
        tensors = {
            "weight": linear.words_in_rows().view(torch.uint32),
            "scales": linear.scales.to(torch.float16).contiguous(),
            "biases": linear.minima().to(torch.float16),
        }
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear:
        """Decode a linear from its tensors, with stored minima as in MLX."""
        return CodedLinear(
            words=tensors["weight"].view(torch.int32),
            scales=tensors["scales"],
            zeros=torch.zeros_like(tensors["scales"], dtype=torch.int16),
            bits=spec.bits,
            group_size=choose_group(spec),
            g_idx=None,
            bias=tensors.get("bias"),
            free_minima=tensors["biases"],
        )

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
        settings = {name: (choose_group(spec), spec.bits) for name, spec in coded.items()}
        default = Counter(settings.values()).most_common(1)[0][0]
        section = _make_settings(default)
        section |= {
            name: _make_settings(setting)
            for name, setting in settings.items()
            if setting != default
        }
        return {**model_config, SECTION: section, "quantization_config": section}


def choose_group(spec: CodedSpec) -> int:
    """Choose the largest of MLX's group sizes into which the groups can be split."""
    return next(size for size in GROUP_SIZES if spec.even_group % size == 0)


def _make_settings(setting: tuple[int, int]) -> dict[str, Any]:
    return {"group_size": setting[0], "bits": setting[1], "mode": "affine"}
