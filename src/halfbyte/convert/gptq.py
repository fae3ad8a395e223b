"""GPTQ: ``qweight``, ``qzeros``, ``scales``, ``g_idx``; see :mod:`halfbyte.checkpoint.layout`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.companions import copy_companions
from halfbyte.checkpoint.labels import CONFIG_SECTION
from halfbyte.checkpoint.layout import FORMAT_V1, FORMAT_V2, ZERO_OFFSETS
from halfbyte.checkpoint.read import Checkpoint
from halfbyte.checkpoint.write import TensorSpec, build_quantization_config
from halfbyte.convert.coded_linear import FREE_MINIMA, CodedLinear, CodedSpec, describe_grid
from halfbyte.errors import ConfigError
from halfbyte.packing import pack_zeros, unpack_zeros
from halfbyte.quant_config import SUPPORTED_BITS, QuantConfig, Scheme
from halfbyte.version import __version__


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqSource:
    """A GPTQ checkpoint of any dialect as the source of a conversion."""

    checkpoint: Checkpoint
    model_config: Mapping[str, Any]
    others: Mapping[str, TensorSpec]
    format: str = "gptq"

    @property
    def linears(self) -> Mapping[str, object]:
        """Every quantized module."""
        return self.checkpoint.linears

    @property
    def notes(self) -> tuple[str, ...]:
        """Contradictions between config and tensors."""
        return self.checkpoint.notes

    @property
    def tokenizer_folder(self) -> Path:
        """Folder of tokenizer and model card."""
        return self.checkpoint.folder

    def describe(self, name: str) -> CodedSpec:
        """Describe a linear; its codes are not read.

        Args:
            name: A module of :attr:`linears`.

        Returns:
            Its properties.

        Raises:
            ConfigError: It has offsets.
        """
        facts = self.checkpoint.load_info(name)
        layout = facts.layout
        if layout.has_offsets:
            raise ConfigError(
                f"Cannot convert {self.checkpoint.folder}: {name} has offsets of a merged adapter, "
                "which no other format supports. Convert the base and serve it with the adapter, "
                "or merge into 16 bits with: halfbyte merge BASE ADAPTER -o OUT"
            )
        wanted = [f"{name}.scales"]
        if not facts.zeros.is_symmetric:
            wanted.append(f"{name}.qzeros")
        tensors = self.checkpoint.files.load(wanted)
        bias = self.checkpoint.files.infos.get(f"{name}.bias")
        if facts.zeros.is_symmetric:
            zeros = torch.tensor([[2 ** (layout.bits - 1)]])
        else:
            zeros = unpack_zeros(tensors[f"{name}.qzeros"], layout.bits, facts.zeros.zero_offset)
        return describe_grid(
            tensors[f"{name}.scales"].t(),
            zeros,
            bits=layout.bits,
            in_features=layout.in_features,
            group_size=layout.group_size,
            is_ordered=facts.has_trivial_groups,
            bias=None if bias is None else TensorSpec(dtype=bias.dtype, shape=bias.shape),
        )

    def load_linear(self, name: str) -> CodedLinear:
        """Read one quantized linear."""
        linear = self.checkpoint.load_linear(name)
        layout = linear.layout
        groups = torch.arange(layout.in_features, dtype=torch.int32) // layout.group_size
        zeros = unpack_zeros(linear.qzeros, layout.bits, linear.zero_offset)
        return CodedLinear(
            words=linear.qweight.t(),
            scales=linear.scales.t().contiguous(),
            zeros=zeros,
            bits=layout.bits,
            group_size=layout.group_size,
            g_idx=None if torch.equal(linear.g_idx, groups) else linear.g_idx,
            bias=linear.bias,
        )

    def load_other(self, name: str) -> Tensor:
        """Read one tensor that is not quantized."""
        return self.checkpoint.files.load([name])[name]

    def copy_companions(self, output: Path) -> None:
        """Copy tokenizer, chat template and license."""
        copy_companions(self.checkpoint.folder, output)


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqTarget:
    """The GPTQ format: dialect v1, or v2 if a zero is 0, which v1 cannot represent."""

    dialect: str
    format: str = "gptq"

    @classmethod
    def from_specs(cls, specs: Mapping[str, CodedSpec]) -> GptqTarget:
        """Choose the dialect that represents every zero."""
        zeros = (spec.zero_low for spec in specs.values() if not spec.has_free_minima)
        lowest = min(zeros, default=1)
        return cls(dialect=FORMAT_V1 if lowest >= ZERO_OFFSETS[FORMAT_V1] else FORMAT_V2)

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Return the metadata of each file: the framework."""
        return {"format": "pt"}

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be represented exactly; None if it can."""
        if spec.has_free_minima:
            return FREE_MINIMA
        if not spec.scales_fit_half:
            return "a scale that fp16 cannot represent"
        if spec.out_features % 32:
            return f"{spec.out_features} outputs, which is not a multiple of 32"
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Return None: the format has no approximate representation."""
        return None

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""
        bits, out = _find_stored_bits(spec.bits), spec.out_features
        tensors = {
            "qweight": TensorSpec(dtype=torch.int32, shape=(spec.in_features * bits // 32, out)),
            "qzeros": TensorSpec(dtype=torch.int32, shape=(spec.num_groups, out * bits // 32)),
            "g_idx": TensorSpec(dtype=torch.int32, shape=(spec.in_features,)),
            "scales": TensorSpec(dtype=torch.float16, shape=(spec.num_groups, out)),
        }
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""
        linear = linear.widen(_find_stored_bits(linear.bits))
        tensors = {
            "qweight": linear.words_in_columns(),
            "qzeros": pack_zeros(linear.zeros, linear.bits, ZERO_OFFSETS[self.dialect]),
            "g_idx": linear.groups().to(torch.int32),
            "scales": linear.scales.to(torch.float16).t().contiguous(),
        }
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear:
        """Decode a linear from its tensors."""
        bits = _find_stored_bits(spec.bits)
        return CodedLinear(
            words=tensors["qweight"].t(),
            scales=tensors["scales"].t(),
            zeros=unpack_zeros(tensors["qzeros"], bits, ZERO_OFFSETS[self.dialect]),
            bits=bits,
            group_size=spec.group_size,
            g_idx=tensors["g_idx"],
            bias=tensors.get("bias"),
        )

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
        schemes = {name: _make_scheme(spec) for name, spec in coded.items()}
        has_act_order = any(not spec.is_ordered for spec in coded.values())
        first = next(iter(schemes.values()))
        config = QuantConfig(
            bits=first.bits,
            group_size=first.group_size,
            symmetric=first.symmetric,
            desc_act=has_act_order,
        )
        section = build_quantization_config(
            config,
            quantized=schemes,
            skipped=dict.fromkeys(dense, "not quantized in the source"),
            module_groups=[[name] for name in _list_names_in_block(coded)],
            version=__version__,
        )
        # The settings of the original quantization are unknown.
        for key in ("damp_percent", "static_groups", "true_sequential"):
            del section[key]
        section["checkpoint_format"] = self.dialect
        return {**model_config, CONFIG_SECTION: section}


def _find_stored_bits(bits: int) -> int:
    """Return the smallest width in GPTQ for codes of ``bits`` bits: 8 for 5 and 6."""
    return next(width for width in SUPPORTED_BITS if width >= bits)


def _make_scheme(spec: CodedSpec) -> Scheme:
    bits = _find_stored_bits(spec.bits)
    symmetric = spec.zero_low == spec.zero_high == 2 ** (bits - 1)
    group_size = -1 if spec.num_groups == 1 else spec.group_size
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def _list_names_in_block(names: Mapping[str, object]) -> list[str]:
    """List the names of modules inside a block: the part after the first number."""
    inner = [re.split(r"\.\d+\.", name, maxsplit=1) for name in names]
    return list(dict.fromkeys(parts[1] for parts in inner if len(parts) == 2))
