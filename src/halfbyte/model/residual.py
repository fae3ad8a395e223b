"""Finds the linears that read and write the residual stream by running a block.

A linear whose input is the output of a norm reads the stream; any other linear whose output is as
wide as the stream is assumed to write it. No model family is special-cased, so the result is a
hypothesis that the caller must verify.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from halfbyte.model.blocks import linear_weight
from halfbyte.model.experts import UnfusedExperts


@dataclass(slots=True, kw_only=True)
class ResidualRoles:
    """Readers and writers of the residual stream in a block, by name within the block."""

    readers: dict[str, list[str]] = field(default_factory=dict)
    """Linears and routers, by the norm whose output they read."""
    writers: list[str] = field(default_factory=list)
    routed: bool = False
    """Whether tokens are routed to experts, where a rounding difference may change the route."""


def find_roles(
    root: nn.Module, width: int, run: Callable[[], Any], include: Callable[[str], bool]
) -> tuple[Any, ResidualRoles]:
    """Run a part of a model and find the readers and writers of the stream.

    Args:
        root: A block with its experts split, or a model.
        width: Width of the stream.
        run: Runs the part.
        include: Whether to consider a module, by name.

    Returns:
        The output of ``run``, and the roles.
    """
    outputs: list[tuple[str, Tensor]] = []  # kept alive, so that no address is reused
    inputs: list[tuple[str, Tensor]] = []
    modules = {n: m for n, m in root.named_modules() if include(n)}
    experts = {n: m for n, m in modules.items() if isinstance(m, UnfusedExperts)}
    inside = tuple(f"{name}." for name in experts)
    matrices = {
        n: m for n, m in modules.items() if _is_matrix(m, width) and not n.startswith(inside)
    }
    with ExitStack() as stack:
        for name, module in modules.items():
            parameters = dict(module.named_parameters(recurse=False))
            if [*parameters] == ["weight"] and parameters["weight"].shape == (width,):
                after = module.register_forward_hook(
                    lambda _m, _x, out, n=name: outputs.append((n, out))
                )
                stack.callback(after.remove)
        for name, module in (matrices | experts).items():
            before = module.register_forward_pre_hook(
                lambda _m, x, n=name: inputs.append((n, x[0]))
            )
            stack.callback(before.remove)
        output = run()
    norms = {_address(out): name for name, out in outputs}
    return output, _assign(norms, inputs, matrices, experts, width)


def _assign(
    norms: Mapping[int, str],
    inputs: list[tuple[str, Tensor]],
    matrices: Mapping[str, nn.Module],
    experts: Mapping[str, UnfusedExperts],
    width: int,
) -> ResidualRoles:
    roles = ResidualRoles(routed=bool(experts))
    for name, tensor in inputs:
        norm = norms.get(_address(tensor))
        if name in experts:
            reading, writing = (
                [f"{name}.{linear}" for group in stage for linear in group]
                for stage in experts[name].stages().values()
            )
        elif norm is not None:
            reading, writing = [name], []
        else:
            reading = []
            writing = [name] if len(linear_weight(matrices[name])) == width else []
        if norm is not None:
            roles.readers.setdefault(norm, []).extend(reading)
        roles.writers += writing
    return roles


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's storage, which its views and slices share."""
    return tensor.untyped_storage().data_ptr()


def _is_matrix(module: nn.Module, width: int) -> bool:
    """Whether a module multiplies by a weight matrix: a linear or a router."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[1] == width
