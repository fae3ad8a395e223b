"""What a conversion into a folder of safetensors asks of a format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from torch import Tensor

from halfbyte.checkpoint.write import TensorSpec
from halfbyte.convert.coded_linear import CodedLinear, CodedSpec


class FolderTarget(Protocol):
    """A format that spells a linear as a few named tensors, and describes them in a config."""

    @property
    def format(self) -> str:
        """Name of the format, such as "awq"."""

    def metadata(self, coded: Mapping[str, CodedSpec]) -> dict[str, str]:
        """Give what the header of each file says beside the tensors, "format" at least."""

    def find_obstacle(self, spec: CodedSpec) -> str | None:
        """Say why a linear is not to be held in this format unless asked for; None: it is."""

    def find_rounding(self, spec: CodedSpec) -> str | None:
        """Say what this format rounds of it; None where nothing, or where it cannot hold it."""

    def list_tensors(self, spec: CodedSpec) -> dict[str, TensorSpec]:
        """Give the tensors that it will be, by suffix."""

    def encode(self, linear: CodedLinear) -> dict[str, Tensor]:
        """Make them."""

    def decode(self, tensors: Mapping[str, Tensor], spec: CodedSpec) -> CodedLinear | Tensor:
        """Read them back: the linear, or its weight in float32 where it is no longer one."""

    def make_config(
        self, coded: Mapping[str, CodedSpec], dense: list[str], model_config: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Give the whole ``config.json``."""
