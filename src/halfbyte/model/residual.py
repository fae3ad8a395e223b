"""Which parts of a block read the residual stream, and which write it: found by running it.

A linear reads the stream where its input is what a norm gives; any other linear whose outputs are
as wide as the stream is taken to write it. Nothing here knows a model family, so what is found is a
proposal: whoever builds on it checks that it holds.
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
    """What the parts of a block have to do with the residual stream, by name within it."""

    readers: dict[str, list[str]] = field(default_factory=dict)
    """Linears and routers by the norm that feeds them."""
    writers: list[str] = field(default_factory=list)
    routed: bool = False
    """Whether tokens are routed to experts; the last digit may send one elsewhere."""


def find_roles(
    root: nn.Module, width: int, run: Callable[[], Any], counts: Callable[[str], bool]
) -> tuple[Any, ResidualRoles]:
    """Run a part of a model and see who reads and writes the stream.

    Args:
        root: A block with its experts split, or a model.
        width: Of the stream.
        run: Runs it.
        counts: Whether a module is looked at, by name.

    Returns:
        What ``run`` gave, and the roles.
    """
    given: list[tuple[str, Tensor]] = []  # outputs stay, so that no address is used twice
    taken: list[tuple[str, Tensor]] = []
    modules = {n: m for n, m in root.named_modules() if counts(n)}
    experts = {n: m for n, m in modules.items() if isinstance(m, UnfusedExperts)}
    inside = tuple(f"{name}." for name in experts)
    matrices = {
        n: m for n, m in modules.items() if _is_matrix(m, width) and not n.startswith(inside)
    }
    with ExitStack() as stack:
        for name, module in modules.items():
            own = dict(module.named_parameters(recurse=False))
            if [*own] == ["weight"] and own["weight"].shape == (width,):
                after = module.register_forward_hook(
                    lambda _m, _x, out, n=name: given.append((n, out))
                )
                stack.callback(after.remove)
        for name, module in (matrices | experts).items():
            before = module.register_forward_pre_hook(lambda _m, x, n=name: taken.append((n, x[0])))
            stack.callback(before.remove)
        output = run()
    norms = {_address(out): name for name, out in given}
    return output, _assign(norms, taken, matrices, experts, width)


def _assign(
    norms: Mapping[int, str],
    taken: list[tuple[str, Tensor]],
    matrices: Mapping[str, nn.Module],
    experts: Mapping[str, UnfusedExperts],
    width: int,
) -> ResidualRoles:
    roles = ResidualRoles(routed=bool(experts))
    for name, tensor in taken:
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
    """Where a tensor's numbers lie; a view or a slice of it lies there, too."""
    return tensor.untyped_storage().data_ptr()


def _is_matrix(module: nn.Module, width: int) -> bool:
    """Whether a module multiplies with a matrix of its own: a linear, or a router."""
    if isinstance(module, nn.Linear | Conv1D):
        return True
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.shape[1] == width
