"""Adapters that are constant over the groups of the linear that they are on (QA-LoRA).

The columns of A [rank, in] are equal within a group: the adapter sees the sums of its input over
the groups. To any program it is an ordinary LoRA; it can be merged exactly (exact_merge.py).

Columns that begin equal and are given equal gradients take equal steps, so equal they stay.
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
    """Which columns belong together."""

    of_column: Tensor
    """int64 [in]."""
    first: Tensor
    """The first column of each group, int64 [groups]."""
    sizes: Tensor
    """Columns of each group, int64 [groups]."""


def find_groups(linear: QuantLinear) -> Groups:
    """Give the groups of a packed linear."""
    spec = linear.spec
    if spec.act_order and linear.g_idx is not None:
        of_column = linear.g_idx.long().cpu()
    else:
        of_column = torch.arange(spec.in_features) // spec.group_size
    sizes = torch.bincount(of_column, minlength=spec.num_groups)
    # A stable sort keeps each group's first column in front.
    order = torch.argsort(of_column, stable=True)
    first = order[sizes.cumsum(0) - sizes]
    return Groups(of_column, first, sizes)


def is_constant(a: Tensor, groups: Groups) -> bool:
    """Whether the columns of A [rank, in] are equal within each group."""
    a = a.detach().cpu()
    return torch.equal(a, a[:, groups.first][:, groups.of_column])


def all_constant(model: Any) -> bool:
    """Whether all adapters of PEFT's model are constant over their linears' groups."""
    return all(
        isinstance(linear := module.get_base_layer(), QuantLinear)
        and all(is_constant(a.weight, find_groups(linear)) for a in module.lora_A.values())
        for _, module in _adapted(model)
    )


@torch.no_grad()
def hold_constant(model: Any) -> None:
    """Make the adapters of a model constant over groups, and keep them so while they are trained.

    Args:
        model: PEFT's, with LoRA on packed linears only; :func:`settle` it before it is saved.

    Raises:
        ConfigError: An adapted linear is not packed.
    """
    for name, module in _adapted(model):
        linear = module.get_base_layer()
        if not isinstance(linear, QuantLinear):
            raise ConfigError(
                f"Cannot train {name} with --variant qalora: it is a {type(linear).__name__}, and "
                "only packed linears have groups. Choose packed ones with --target, or another "
                "variant."
            )
        groups = find_groups(linear)
        for a in module.lora_A.values():
            # Not the mean, which would start smaller the larger the group.
            a.weight.copy_(_spread(a.weight, groups))
            a.weight.register_hook(_Pool(groups, linear.spec.group_size))


@torch.no_grad()
def settle(model: Any) -> None:
    """Make columns equal to the last bit, before they are saved.

    An optimizer that works on several values at once may round the last few in another way.

    Args:
        model: Given to :func:`hold_constant`.
    """
    for _, module in _adapted(model):
        groups = find_groups(module.get_base_layer())
        for a in module.lora_A.values():
            a.weight.copy_(_spread(a.weight, groups))


class _Pool:
    """Takes the mean of a gradient [rank, in] over each group."""

    def __init__(self, groups: Groups, group_size: int) -> None:
        self.groups, self.group_size = groups, group_size

    def __call__(self, gradient: Tensor) -> Tensor:
        of_column = self.groups.of_column.to(gradient.device)
        sums = sum_groups(gradient, self.group_size, of_column)
        return (sums / self.groups.sizes.to(gradient))[:, of_column]


def _spread(a: Tensor, groups: Groups) -> Tensor:
    return a[:, groups.first.to(a.device)][:, groups.of_column.to(a.device)]


def _adapted(model: Any) -> list[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    return [(n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer)]
