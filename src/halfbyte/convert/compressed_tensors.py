"""compressed-tensors, format "pack-quantized": written by llm-compressor and read by vLLM.

::

    <module>.weight_packed      int32 [out, in * bits / 32]      codes, a stream along ``in``
    <module>.weight_scale       float [out, groups]
    <module>.weight_zero_point  int32 [out * bits / 32, groups]  if asymmetric; packed along ``out``
    <module>.weight_shape       int64 [2]                        out, in

The stored codes are unsigned: the library's signed values plus half the range.

Source:
    compressed-tensors 0.20 ``compressors/pack_quantized`` and ``quantization/quant_config.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.foreign_patterns import PatternError, match_pattern
from halfbyte.checkpoint.labels import CONFIG_SECTION
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import FREE_MINIMA, CodedLinear, CodedSpec, describe_grid
from halfbyte.convert.source import (
    FLOATS,
    FolderSource,
    check_finite,
    check_shape,
    require_matrices,
    view_tensors,
)
from halfbyte.errors import CheckpointError
from halfbyte.packing import codes_per_run, pack_codes, unpack_codes

METHOD = "compressed-tensors"
PACKED = "pack-quantized"
BITS = (2, 3, 4, 5, 6, 8)

_TENSORS = {
    "weight_packed": (torch.int32,),
    "weight_scale": FLOATS,
    "weight_zero_point": (torch.int32,),
    "weight_shape": (torch.int64, torch.int32),
    "bias": FLOATS,
}
_GRID = ("weight_scale", "weight_zero_point", "weight_shape")


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensorsSource(FolderSource):
    """A compressed-tensors checkpoint with packed integer weights."""

    bits: Mapping[str, int]
    format: str = METHOD

    @classmethod
    def open(
        cls, folder: Path, labels: Mapping[str, Any], model_config: Mapping[str, Any]
    ) -> CompressedTensorsSource:
        """Open a checkpoint and validate its config and shapes; no weight is read.

        Args:
            folder: The checkpoint.
            labels: Its quantization config.
            model_config: ``config.json`` without the quantization config.

        Returns:
            The source.

        Raises:
            CheckpointError: Its format is not pack-quantized, it has quantized activations or
                act-order, or a shape is inconsistent.
        """
        widths = _read_schemes(folder, labels)
        view = view_tensors(TensorFiles.open(folder), "weight_packed", _TENSORS, METHOD)
        bits = {name: _choose_bits(name, parts, widths) for name, parts in view.parts.items()}
        for name, parts in view.parts.items():
            _check_parts(name, parts, bits[name])
        return cls(folder=folder, view=view, bits=bits, model_config=model_config)

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear; its codes are not read."""
        scales, zeros, in_features = self._check_grid(name, self.view.load(name, _GRID))
        return describe_grid(
            scales,
            zeros,
            bits=self.bits[name],
            in_features=in_features,
            group_size=in_features // scales.shape[1],
            is_ordered=True,
            bias=self.view.parts[name].get("bias"),
        )

    def load_linear(self, name: str) -> CodedLinear:
        """Read one quantized linear."""
        tensors = self.view.load(name, tuple(_TENSORS))
        scales, zeros, in_features = self._check_grid(name, tensors)
        if "bias" in tensors:
            check_finite(f"{name}.bias", tensors["bias"])
        return CodedLinear(
            words=tensors["weight_packed"],
            scales=scales,
            zeros=zeros,
            bits=self.bits[name],
            group_size=in_features // scales.shape[1],
            g_idx=None,
            bias=tensors.get("bias"),
        )

    def _check_grid(self, name: str, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, int]:
        """Validate a module's small tensors; returns scales, zeros and the number of inputs."""
        bits, parts = self.bits[name], self.view.parts[name]
        scales = check_finite(f"{name}.weight_scale", tensors["weight_scale"])
        in_features = parts["weight_packed"].shape[1] * 32 // bits
        shape = tensors["weight_shape"].tolist()
        if shape != [scales.shape[0], in_features]:
            raise CheckpointError(
                f"{name}.weight_shape says {str(shape)[:80]}, but the tensors have "
                f"{[scales.shape[0], in_features]}. The file is damaged; download it again."
            )
        if "weight_zero_point" in tensors:
            zeros = unpack_codes(tensors["weight_zero_point"], bits).to(torch.int16)
        else:
            zeros = torch.full(scales.shape, 2 ** (bits - 1), dtype=torch.int16)
        return scales, zeros, in_features


def _read_schemes(folder: Path, labels: Mapping[str, Any]) -> list[tuple[list[str], int]]:
    """List the targets and bits of each scheme; reject schemes other than packed weights."""
    groups = labels.get("config_groups")
    kind = labels.get("format")
    if kind != PACKED or not isinstance(groups, dict):
        raise CheckpointError(
            f"Cannot read {folder}: its compressed-tensors format is '{str(kind)[:40]}'; only "
            f"'{PACKED}' with config_groups is supported."
        )
    found: list[tuple[list[str], int]] = []
    for key, scheme in groups.items():
        weights = scheme.get("weights") if isinstance(scheme, dict) else None
        targets = scheme.get("targets") if isinstance(scheme, dict) else None
        bits = weights.get("num_bits") if isinstance(weights, dict) else None
        if bits not in BITS or not isinstance(targets, list) or not isinstance(weights, dict):
            raise CheckpointError(
                f"Cannot read config_groups.{key} of {folder}: its weights have "
                f"{str(bits)[:40]} bits; allowed are {BITS}, with a list of targets."
            )
        for part in ("input_activations", "output_activations"):
            if scheme.get(part) is not None:
                raise CheckpointError(
                    f"Cannot read {folder}: config_groups.{key} also quantizes activations "
                    f"({part}), which no other supported format does."
                )
        if weights.get("actorder") in ("group", "dynamic", True):
            raise CheckpointError(
                f"Cannot read {folder}: it has act-order (actorder '{weights['actorder']}'), which "
                "is not supported for compressed-tensors."
            )
        found.append(([str(target) for target in targets], int(bits)))
    return found


def _choose_bits(
    name: str, parts: Mapping[str, TensorSpec], widths: list[tuple[list[str], int]]
) -> int:
    """Return the bits of the scheme that names a module, else of the one for its class."""
    for targets, bits in widths:
        if any(_matches_target(target, name) for target in targets):
            return bits
    for targets, bits in widths:
        if "Linear" in targets:
            return bits
    raise CheckpointError(
        f"The quantization config has no scheme for {name}. Download config.json again."
    )


def _matches_target(target: str, name: str) -> bool:
    if not target.startswith("re:"):
        return target == name
    try:
        return match_pattern(target.removeprefix("re:"), name)
    except PatternError as error:
        raise CheckpointError(
            f"Cannot use the target '{target[:80]}': it {error}. Correct the config, or download "
            "it again."
        ) from error


def _check_parts(name: str, parts: Mapping[str, TensorSpec], bits: int) -> None:
    require_matrices(name, parts, ("weight_packed", "weight_scale"))
    out_features, words = parts["weight_packed"].shape
    groups = parts["weight_scale"].shape[1]
    in_features, rest = divmod(words * 32, bits)
    if rest or in_features % groups or words * 32 % (codes_per_run(bits) * bits):
        raise CheckpointError(
            f"{name}.weight_packed has {words} words for {bits} bits and {groups} groups; codes "
            "without padding and groups of equal size are needed. The file is damaged, or padded."
        )
    check_shape(f"{name}.weight_scale", parts["weight_scale"], (out_features, groups))
    if "weight_shape" not in parts:
        raise CheckpointError(f"The checkpoint has no {name}.weight_shape. It is incomplete.")
    check_shape(f"{name}.weight_shape", parts["weight_shape"], (2,))
    if "weight_zero_point" in parts:
        if out_features % codes_per_run(bits):
            raise CheckpointError(
                f"{name} has {out_features} outputs with zero points; only a multiple of "
                f"{codes_per_run(bits)} is supported."
            )
        shape = (out_features * bits // 32, groups)
        check_shape(f"{name}.weight_zero_point", parts["weight_zero_point"], shape)
    if "bias" in parts:
        check_shape(f"{name}.bias", parts["bias"], (out_features,))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompressedTensorsTarget:
    """The format pack-quantized, with fp16 scales."""

    format: str = METHOD

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Return the metadata of each file: the framework."""
        return {"format": "pt"}

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be represented exactly; None if it can."""
        if spec.has_free_minima:
            return FREE_MINIMA
        if not spec.is_ordered:
            return "act-order (desc_act); the library reads no g_idx"
        if not spec.scales_fit_half:
            return "a scale that fp16 cannot represent"
        multiple = codes_per_run(spec.bits)
        if not spec.is_symmetric and spec.out_features % multiple:
            return f"{spec.out_features} outputs with zero points, not a multiple of {multiple}"
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Return None: the format has no approximate representation."""
        return None

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""
        out, groups = spec.out_features, spec.in_features // spec.even_group
        packed = (out, spec.in_features * spec.bits // 32)
        tensors = {
            "weight_shape": TensorSpec(dtype=torch.int64, shape=(2,)),
            "weight_packed": TensorSpec(dtype=torch.int32, shape=packed),
        }
        if not spec.is_symmetric:
            shape = (out * spec.bits // 32, groups)
            tensors["weight_zero_point"] = TensorSpec(dtype=torch.int32, shape=shape)
        tensors["weight_scale"] = TensorSpec(dtype=torch.float16, shape=(out, groups))
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""
        spec = linear.describe()
        linear = linear.split_groups(spec.even_group)
        tensors = {
            "weight_shape": torch.tensor([linear.out_features, linear.in_features]),
            "weight_packed": linear.words_in_rows(),
        }
        if not spec.is_symmetric:
            tensors["weight_zero_point"] = pack_codes(linear.zeros, linear.bits)
        tensors["weight_scale"] = linear.scales.to(torch.float16).contiguous()
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear:
        """Decode a linear from its tensors."""
        scales = tensors["weight_scale"]
        if "weight_zero_point" in tensors:
            zeros = unpack_codes(tensors["weight_zero_point"], spec.bits).to(torch.int16)
        else:
            zeros = torch.full(scales.shape, 2 ** (spec.bits - 1), dtype=torch.int16)
        return CodedLinear(
            words=tensors["weight_packed"],
            scales=scales,
            zeros=zeros,
            bits=spec.bits,
            group_size=spec.even_group,
            g_idx=None,
            bias=tensors.get("bias"),
        )

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
        members: dict[tuple[int, int | None, bool], list[str]] = {}
        for name, spec in coded.items():
            size = None if spec.even_group == spec.in_features else spec.even_group
            members.setdefault((spec.bits, size, spec.is_symmetric), []).append(name)
        # A single scheme applies to all linears except those in "ignore"; several need names.
        targets = [["Linear"]] if len(members) == 1 else list(members.values())
        groups = {
            f"group_{number}": _make_scheme(setting, names)
            for number, (setting, names) in enumerate(zip(members, targets, strict=True))
        }
        section = {
            "quant_method": METHOD,
            "format": PACKED,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*dense, *_list_tied_heads(coded, dense)],
            "kv_cache_scheme": None,
        }
        return {**model_config, CONFIG_SECTION: section}


def _list_tied_heads(coded: Mapping[str, CodedSpec], dense: list[str]) -> list[str]:
    """List the head if it is tied to the embeddings: it has no tensor, but is a linear."""
    return [] if "lm_head" in coded or "lm_head" in dense else ["lm_head"]


def _make_scheme(setting: tuple[int, int | None, bool], targets: list[str]) -> dict[str, Any]:
    bits, group_size, symmetric = setting
    return {
        "targets": targets,
        "weights": {
            "num_bits": bits,
            "type": "int",
            "symmetric": symmetric,
            "strategy": "channel" if group_size is None else "group",
            "group_size": group_size,
            "dynamic": False,
        },
        "input_activations": None,
        "output_activations": None,
    }
