"""Plain weights in 16 or 32 bits: what every program reads, at four times the size.

fp32 holds the product of any code and fp16 scale exactly; 16 bits round it once, to nearest.
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
"""Model types whose blocks have Transformers' Conv1D, which stores [in, out]."""
CONV1D = ("c_attn", "q_attn", "c_fc", "c_proj")
"""What these are called; the head is a linear there too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseTarget:
    """Writes ``<module>.weight`` in one floating-point type."""

    dtype: torch.dtype
    stores_inputs_first: bool = False
    """Whether the matrices are [in, out]."""
    format: str = "hf"

    @classmethod
    def from_config(cls, dtype: torch.dtype, model_config: Mapping[str, Any]) -> DenseTarget:
        """Choose the order of axes that a model's own blocks have."""
        is_transposed = model_config.get("model_type") in CONV1D_MODELS
        return cls(dtype=dtype, stores_inputs_first=is_transposed)

    def form_of(self, name: str) -> DenseTarget:
        """Give the order of axes of one module."""
        is_transposed = self.stores_inputs_first and name.rpartition(".")[2] in CONV1D
        return replace(self, stores_inputs_first=is_transposed)

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Give the name of the framework."""
        return {"format": "pt"}

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Give None: rounding each weight once is what this format is for."""
        return None

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Say how a linear is held; None where that is exact."""
        # (code - zero) has 9 bits at most and an fp16 scale 11; fp32 has 24.
        if self.dtype == torch.float32 and spec.scales_fit_half and not spec.has_free_minima:
            return None
        return f"each weight rounded once to {str(self.dtype).removeprefix('torch.')}"

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """Give the tensors that a linear will be, by suffix."""
        shape = (spec.out_features, spec.in_features)
        shape = shape[::-1] if self.stores_inputs_first else shape
        tensors = {"weight": TensorSpec(dtype=self.dtype, shape=shape)}
        return tensors if spec.bias is None else {**tensors, "bias": spec.bias}

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Make them."""
        weight = linear.dequantize(self.dtype)
        tensors = {"weight": weight.t().contiguous() if self.stores_inputs_first else weight}
        return tensors if linear.bias is None else {**tensors, "bias": linear.bias}

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> Tensor:
        """Give the weight in float32."""
        weight = tensors["weight"].float()
        return weight.t() if self.stores_inputs_first else weight

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Give the whole ``config.json``."""
        name = str(self.dtype).removeprefix("torch.")
        # Transformers 4 called it torch_dtype, which would stand beside it and say another.
        kept = {key: value for key, value in model_config.items() if key != "torch_dtype"}
        return {**kept, "dtype": name}
