"""Dequantized weights in 16 or 32 bits, for any program, at four times the size.

fp32 represents the product of any code and fp16 scale exactly; 16-bit types round it once, to
nearest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec

DTYPES: Mapping[str, torch.dtype] = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


CONV1D_MODELS = ("gpt2",)
"""Model types whose blocks use Transformers' Conv1D, which stores [in, out]."""
CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
"""Names of these modules; the output head is a Linear in these models too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTarget:
    """Dense weights, ``<module>.weight``, in one floating-point type."""

    dtype: torch.dtype
    stores_inputs_first: bool = False
    """Whether the matrices are [in, out]."""
    format: str = "hf"

    @classmethod
    def from_config(cls, dtype: torch.dtype, model_config: Mapping[str, Any]) -> DenseTarget:
        """Choose the order of axes that the model's blocks have."""
        stores_inputs_first = model_config.get("model_type") in CONV1D_MODELS
        return cls(dtype=dtype, stores_inputs_first=stores_inputs_first)

    def for_module(self, name: str) -> DenseTarget:
        """Return the target with the order of axes of one module."""
        is_conv1d = name.rpartition(".")[2] in CONV1D
        return replace(self, stores_inputs_first=self.stores_inputs_first and is_conv1d)

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Return the metadata of each file: the framework."""
        return {"format": "pt"}

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Return None: rounding each weight once is expected in this format."""
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Describe how a linear is rounded; None if it is represented exactly."""
        # (code - zero) has at most 9 bits and an fp16 scale 11; fp32 has 24.
        if self.dtype == torch.float32 and spec.scales_fit_half and not spec.has_free_minima:
            return None
        return f"each weight rounded once to {str(self.dtype).removeprefix('torch.')}"

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""
        shape = (spec.out_features, spec.in_features)
        shape = shape[::-1] if self.stores_inputs_first else shape
        tensors = {"weight": TensorSpec(dtype=self.dtype, shape=shape)}
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""
        weight = linear.dequantize(self.dtype)
        tensors = {"weight": weight.t().contiguous() if self.stores_inputs_first else weight}
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> Tensor:
        """Return the weight in float32."""
        weight = tensors["weight"].float()
        return weight.t() if self.stores_inputs_first else weight

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
        name = str(self.dtype).removeprefix("torch.")
        # Transformers 4 called it torch_dtype, which could contradict the new key.
        kept = {key: value for key, value in model_config.items() if key != "torch_dtype"}
        return {**kept, "dtype": name}
