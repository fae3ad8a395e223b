"""Runs all experts of a layer together on a GPU: three products instead of three per expert.

::

    UnfusedExperts.forward ──> GroupedExperts: route -> gate, up -> activation -> down -> combine
                           └── loop over the experts, if GroupedExperts returns None

The linears of the experts stay as they are (:mod:`halfbyte.kernels.triton_experts` reads them
through a table of their addresses). The table is checked at every call and made anew if a linear
was moved, repacked or replaced, for example by an adapter.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from halfbyte.kernels.triton_experts import (
    ExpertWeights,
    choose_block_rows,
    combine,
    count_row_blocks,
    multiply_experts,
    route,
)
from halfbyte.model.experts import UnfusedExperts
from halfbyte.nn.fusion import FUSED_KERNELS
from halfbyte.nn.linear import QuantLinear

logger = logging.getLogger("halfbyte")

MAX_MEAN_ROWS = 128
"""Mean rows per expert above which each expert is multiplied by its own kernel for many rows."""

MAX_ELEMENTS = 2**31
"""The kernels' offsets are 32-bit integers."""


@dataclass(frozen=True, slots=True)
class _Table:
    """The weights of all experts by projection, and what they were collected from."""

    first: tuple[ExpertWeights, ...]
    """Gate and up fused, or gate, up; or only up."""
    down: ExpertWeights
    linears: tuple[tuple[Mapping[str, Any], str, QuantLinear, object], ...]
    """Children of a module, name in it, linear and its fusion."""
    tensors: tuple[tuple[Mapping[str, Tensor | None], str, Tensor], ...]
    """Buffers of a linear, name in it and tensor."""

    def is_current(self) -> bool:
        """Whether the experts still have these linears and tensors."""
        return all(
            children[name] is linear and linear.fusion is fusion
            for children, name, linear, fusion in self.linears
        ) and all(buffers.get(name) is tensor for buffers, name, tensor in self.tensors)


class GroupedExperts:
    """The forward of a layer's experts, for inference on a GPU."""

    def __init__(self, experts: UnfusedExperts) -> None:
        """Collect nothing yet.

        Args:
            experts: The experts of a layer, with their kernels selected.
        """
        self._experts = experts
        self._table: _Table | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the addresses when a model is copied or pickled."""
        return {**self.__dict__, "_table": None}

    def find_obstacle(self) -> str | None:
        """Return why the experts cannot run together; None if they can."""
        if self._table is not None and self._table.is_current():
            return None
        self._table = None
        made = _make_table(self._experts)
        if isinstance(made, str):
            return made
        self._table = made
        return None

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor | None:
        """Run each token's experts.

        Args:
            hidden_states: [tokens, hidden].
            top_k_index: int64 [tokens, k], ids of each token's experts.
            top_k_weights: [tokens, k], their weights.

        Returns:
            [tokens, hidden]; None if the experts have to run one after the other.
        """
        pairs, num_experts = top_k_index.numel(), self._experts.num_experts
        if torch.compiler.is_compiling() or not 0 < pairs <= MAX_MEAN_ROWS * num_experts:
            return None
        if self.find_obstacle() is not None:
            return None
        table = self._table
        assert table is not None
        down = table.down
        if hidden_states.device != down.addresses.device:
            return None
        block_rows = choose_block_rows(pairs, num_experts)
        widest = max(sum(part.spec.out_features for part in table.first), down.spec.out_features)
        if count_row_blocks(pairs, num_experts, block_rows) * block_rows * widest >= MAX_ELEMENTS:
            return None
        routing = route(top_k_index, num_experts, block_rows)
        x = hidden_states.to(down.spec.dtype).contiguous()
        parts = [multiply_experts(x, part, routing, by_token=True) for part in table.first]
        first = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        middle = self._experts.activate(first).contiguous()
        result = multiply_experts(middle, down, routing, by_token=False)
        return combine(result, routing, top_k_weights).to(hidden_states.dtype)


def group_experts(model: nn.Module) -> int:
    """Let the experts of a model's layers run together where their kernels can.

    Args:
        model: A model with its kernels selected and its linears fused; changed in place.

    Returns:
        The number of layers whose experts run together.
    """
    reasons: Counter[str] = Counter()
    count = 0
    for module in model.modules():
        if not isinstance(module, UnfusedExperts):
            continue
        grouped = GroupedExperts(module)
        reason = grouped.find_obstacle()
        if reason is None:
            module.grouped = grouped
            count += 1
        else:
            reasons[reason] += 1
    for reason, layers in reasons.items():
        logger.info("The experts of %d layers run one after the other: %s", layers, reason)
    return count


def find_grouping_obstacle(experts: UnfusedExperts) -> str | None:
    """Return why the experts of a layer run one after the other; None if they run together."""
    if isinstance(experts.grouped, GroupedExperts):
        return experts.grouped.find_obstacle()
    made = _make_table(experts)
    return made if isinstance(made, str) else "they were not grouped when the model was loaded"


def _make_table(experts: UnfusedExperts) -> _Table | str:
    """Collect the weights of all experts, or return why they cannot run together."""
    names = experts.names
    first = (names.gate, names.up) if experts.has_gate else (names.up,)
    linears: dict[str, list[QuantLinear]] = {}
    places = []
    for name in (*first, names.down):
        linears[name] = []
        for expert in range(experts.num_experts):
            children = experts.get_submodule(str(expert))._modules
            linear = children.get(name)
            if not isinstance(linear, QuantLinear):
                return f"expert {expert} has a {type(linear).__name__} as {name}"
            linears[name].append(linear)
            places.append((children, name, linear, linear.fusion))
    stages: list[list[QuantLinear]] = []
    pairs = list(zip(*(linears[name] for name in first), strict=True))
    if all(pair[0].fusion is not None for pair in pairs):
        if any(pair[0].fusion.members != pair for pair in pairs if pair[0].fusion):
            return "their gate and up projections are fused with others"
        stages.append([pair[0].fusion.whole for pair in pairs if pair[0].fusion])
    else:
        stages += [linears[name] for name in first]
    stages.append(linears[names.down])
    for stage in stages:
        reason = _find_difference(stage)
        if reason is not None:
            return reason
    devices = {linear.scales.device for stage in stages for linear in stage}
    if len(devices) > 1:
        return f"they are on {len(devices)} devices"
    *made, down = (_collect(stage) for stage in stages)
    tensors = [
        (linear._buffers, name, linear._buffers[name])
        for stage in stages
        for linear in stage
        for name in (*linear.weight_names, "scales", "bias")
        if linear._buffers[name] is not None
    ]
    return _Table(tuple(made), down, tuple(places), tuple(tensors))  # type: ignore[arg-type]


def _find_difference(linears: Sequence[QuantLinear]) -> str | None:
    """Return why the same projection of all experts is not one product; None if it is."""
    for linear in linears:
        if linear.selection is None or linear.selection.kernel.name not in FUSED_KERNELS:
            kernel = linear.selection.kernel.name if linear.selection else "no kernel"
            return f"they run on {kernel}, not on {' or '.join(FUSED_KERNELS)}"
        if linear.offsets is not None:
            return "one has offsets"
        if linear.fusion is not None:
            return "one is fused with other linears"
        if any(tensor.is_meta for tensor in linear.buffers()):
            return "not all are in memory"
    first = linears[0]
    for linear in linears:
        if linear.spec != first.spec:
            return "their sizes, bits or groups differ"
        tensors = [
            (one.scales.dtype, one.bias is None or one.bias.dtype) for one in (linear, first)
        ]
        if tensors[0] != tensors[1]:
            return "their scales or biases differ in dtype"
    return None


def _collect(linears: Sequence[QuantLinear]) -> ExpertWeights:
    return ExpertWeights(
        linears[0].spec,
        [linear.operands for linear in linears],
        [linear.bias for linear in linears],
    )
