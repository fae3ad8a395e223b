"""Adapters that are constant over the quantization groups of their linear (QA-LoRA).

The columns of A [rank, in] are equal within a group, so the adapter only sees the sum of its input
over each group. For other programs it is an ordinary LoRA; it can be merged exactly
(exact_merge.py). Columns that start equal and get equal gradients stay equal during training.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.offsets import sum_groups


@dataclass(frozen=True, slots=True)
class Groups:
    """The quantization groups of a linear's input columns."""

    of_column: Tensor
    """The group of each column, int64 [in]."""
    first: Tensor
    """The first column of each group, int64 [groups]."""
    sizes: Tensor
    """Number of columns of each group, int64 [groups]."""


def find_groups(linear: QuantLinear) -> Groups:
    """Return the groups of a packed linear."""
    spec = linear.spec
    if spec.act_order and linear.g_idx is not None:
        of_column = linear.g_idx.long().cpu()
    else:
        of_column = torch.arange(spec.in_features) // spec.group_size
    sizes = torch.bincount(of_column, minlength=spec.num_groups)
    # A stable sort puts the first column of each group first.
    order = torch.argsort(of_column, stable=True)
    first = order[sizes.cumsum(0) - sizes]
    return Groups(of_column, first, sizes)


def is_constant(a: Tensor, groups: Groups) -> bool:
    """Return whether the columns of A [rank, in] are equal within each group."""
    a = a.detach().cpu()
    return torch.equal(a, a[:, groups.first][:, groups.of_column])


def all_constant(model: Any) -> bool:
    """Return whether all adapters of a PEFT model are constant over their linears' groups."""
    return all(
        isinstance(linear := module.get_base_layer(), QuantLinear)
        and all(is_constant(a.weight, find_groups(linear)) for a in module.lora_A.values())
        for _, module in _adapted(model)
    )


@torch.no_grad()
def tie_columns(model: Any) -> None:
    """Make a model's adapters constant over groups, and keep them so during training.

    Args:
        model: PEFT's, with LoRA on packed linears only; call :func:`equalize_columns` last.

    Raises:
        ConfigError: An adapted linear is not packed.
    """
    for name, module in _adapted(model):
        linear = module.get_base_layer()
        if not isinstance(linear, QuantLinear):
            raise ConfigError(
                f"Cannot train {name} with --variant qalora: it is a {type(linear).__name__}, and "
                "only packed linears have groups. Select packed linears with --target, or use "
                "another variant."
            )
        groups = find_groups(linear)
        for a in module.lora_A.values():
            # Not the mean of the group: its scale would depend on the group size.
            a.weight.copy_(_repeat_first(a.weight, groups))
            a.weight.register_hook(_GroupMean(groups, linear.spec.group_size))


@torch.no_grad()
def equalize_columns(model: Any) -> None:
    """Make the columns of each group equal to the last bit, before they are saved.

    A vectorized optimizer may round the last few values differently.

    Args:
        model: After :func:`tie_columns` and training.
    """
    for _, module in _adapted(model):
        groups = find_groups(module.get_base_layer())
        for a in module.lora_A.values():
            a.weight.copy_(_repeat_first(a.weight, groups))


class _GroupMean:
    """A gradient hook that averages a gradient [rank, in] over each group."""

    def __init__(self, groups: Groups, group_size: int) -> None:
        self.groups, self.group_size = groups, group_size

    def __call__(self, gradient: Tensor) -> Tensor:
        of_column = self.groups.of_column.to(gradient.device)
        sums = sum_groups(gradient, self.group_size, of_column)
        return (sums / self.groups.sizes.to(gradient))[:, of_column]


def _repeat_first(a: Tensor, groups: Groups) -> Tensor:
    return a[:, groups.first.to(a.device)][:, groups.of_column.to(a.device)]


def _adapted(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
