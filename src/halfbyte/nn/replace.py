"""Replace linears of a model by quantized ones, and back.

::

    model (often on the meta device) + StoredLinear by module name -> QuantLinear in place
    model with QuantLinears -> nn.Linear or Conv1D with the dequantized weights
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from halfbyte.checkpoint.read import LinearInfo
from halfbyte.errors import CheckpointError
from halfbyte.kernels.contract import LinearSpec
from halfbyte.nn.linear import QuantLinear


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredLinear:
    """A quantized linear of a checkpoint: its layout, and the dtypes of its tensors."""

    facts: LinearInfo
    dtypes: Mapping[str, torch.dtype]
    """By suffix: "scales" and, if present in the file, "g_idx" and "bias"."""

    def make_spec(self, dtype: torch.dtype, device_type: str) -> LinearSpec:
        """Make the spec by which a kernel is selected.

        Args:
            dtype: Dtype to compute in.
            device_type: Type of the device to compute on.

        Returns:
            The spec.
        """
        layout = self.facts.layout
        return LinearSpec(
            bits=layout.bits,
            group_size=min(layout.group_size, layout.in_features),
            in_features=layout.in_features,
            out_features=layout.out_features,
            symmetric=self.facts.zeros.is_symmetric,
            act_order=not self.facts.has_trivial_groups,
            zero_offset=self.facts.zeros.zero_offset,
            dtype=dtype,
            device_type=device_type,
        )


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """Iterate over a model's quantized linears with their full names."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def replace_linears(
    model: nn.Module, stored: Mapping[str, StoredLinear], *, dtype: torch.dtype
) -> None:
    """Replace ordinary linears by quantized ones, with tensors still to be loaded.

    Args:
        model: Changed in place.
        stored: The quantized linears by name in the model.
        dtype: Dtype to compute in.

    Raises:
        CheckpointError: A module is not a linear, or its size differs from the packed tensors;
            names the tensor.
    """
    for name, linear in stored.items():
        old = model.get_submodule(name)
        _check_fits(name, old, linear)
        device = old.get_parameter("weight").device
        new = QuantLinear(linear.make_spec(dtype, device.type), linear.dtypes, device)
        new.replaces_conv1d = isinstance(old, Conv1D)
        new.train(old.training)
        _set_module(model, name, new)


def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """Convert a model's quantized linears to ordinary ones.

    Args:
        model: Changed in place.
        dtype: Dtype of the new weights.

    Returns:
        The names of the linears.
    """
    names = []
    for name, old in list(quantized_linears(model)):
        new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
        new.weight = nn.Parameter(old.dequantize(dtype).contiguous())
        if old.bias is not None:
            new.bias = nn.Parameter(old.bias.to(dtype))
        new.train(old.training)
        _set_module(model, name, new)
        if old.replaces_conv1d:
            restore_conv1d(model, name)
        names.append(name)
    return names


def restore_conv1d(model: nn.Module, name: str) -> None:
    """Replace a linear by the Conv1D that the model's class has there, which files store [in, out].

    Args:
        model: Changed in place.
        name: The linear, with a bias, as every Conv1D.
    """
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    with torch.device("meta"):
        conv1d = Conv1D(linear.out_features, linear.in_features)
    conv1d.weight = nn.Parameter(linear.weight.data.t().contiguous(), linear.weight.requires_grad)
    conv1d.bias = linear.bias
    conv1d.train(linear.training)
    _set_module(model, name, conv1d)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    model.get_submodule(parent).register_module(child, module)


def _check_fits(name: str, module: nn.Module, linear: StoredLinear) -> None:
    layout = linear.facts.layout
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
    elif isinstance(module, nn.Linear):
        out_features, in_features = module.weight.shape
    else:
        raise CheckpointError(
            f"The checkpoint has {name}.qweight, but the model's {name} is a "
            f"{type(module).__name__}, not a linear. The checkpoint belongs to another model, or "
            "to another version of Transformers."
        )
    if (layout.in_features, layout.out_features) != (in_features, out_features):
        raise CheckpointError(
            f"{name}.qweight is a {layout.in_features} -> {layout.out_features} linear of "
            f"{layout.bits} bits, but the model's is {in_features} -> {out_features}. config.json "
            "and the tensors belong to different models; download both again."
        )
    if module.bias is not None and not layout.has_bias:
        raise CheckpointError(
            f"The checkpoint has no {name}.bias, which the model's linear needs. "
            "It is incomplete; download or quantize it again."
        )
