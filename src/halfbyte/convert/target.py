"""The interface of target formats that are folders of safetensors files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec


class FolderTarget(Protocol):
    """A format that encodes a linear as named tensors and describes them in a config."""

    @property
    def format(self) -> str:
        """Name of the format, such as "awq"."""

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Return the metadata of each file's header, at least "format"."""

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Explain why a linear cannot be written without ``allow_error``; None if it can."""

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Describe how a linear is rounded; None if it is exact or not representable."""

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """List the tensors of an encoded linear, by suffix."""

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Encode a linear as these tensors."""

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear | Tensor:
        """Decode the tensors: a linear, or the weight in float32 if the format is dense."""

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Make the content of ``config.json``."""
