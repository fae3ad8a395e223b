"""Splits fused 3-D experts into one linear per expert and projection, so that each is quantizable.

Transformers 5 keeps all experts of a layer in two 3-D parameters and describes their layout by
flags (``has_gate``, ``has_bias``, ``is_transposed``, ``is_concatenated``) on the class. One module
here handles all layouts; the per-expert linears are named as in the checkpoint files.

Source:
    Transformers 5, ``integrations/moe.py`` (``use_experts_implementation``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from halfbyte.errors import ModelError
from halfbyte.model.naming import Renaming

_FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")


class StageObserver(Protocol):
    """Callback that receives the inputs of a stage of linears before any of them runs."""

    def __call__(self, stage: str, inputs: Sequence[Callable[[], Tensor]]) -> None:
        """Receive one lazily gathered input [tokens, in] per expert."""


class ExpertsFunction(Protocol):
    """A faster implementation of the forward of all experts of a layer."""

    def __call__(
        self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor | None:
        """Compute :meth:`UnfusedExperts.forward`; None if it does not support this input."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionNames:
    """Names of an expert's three projections in the checkpoint files."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


class UnfusedExperts(nn.Module):
    """The experts of one layer as separate linears: ``<experts>.<n>.<projection>``.

    All experts run their first stage (gate and up) before any runs its second (down). With an
    observer or with gradients enabled, every expert is called, even without tokens routed to it, so
    that a quantizer sees the inputs of a whole stage at once. Otherwise idle experts are skipped,
    and ``grouped`` is used if set.
    """

    def __init__(self, fused: nn.Module, names: ProjectionNames) -> None:
        """Split a fused experts module; the new parameters are views of the fused ones.

        Args:
            fused: A module with Transformers' experts flags.
            names: Names of the projections.
        """
        super().__init__()
        self.num_experts = int(fused.num_experts)  # type: ignore[arg-type]
        self.names = names
        self.has_gate = bool(fused.has_gate)
        self.observer: StageObserver | None = None
        self.grouped: ExpertsFunction | None = None
        for expert in range(self.num_experts):
            self.add_module(str(expert), _split_expert(fused, expert, names))
        # The fused module is kept without its parameters, for the model's own gate formula.
        self._empty = {
            name: nn.Parameter(parameter.data.to("meta"), requires_grad=False)
            for name, parameter in fused.named_parameters(recurse=False)
        }
        for name in self._empty:
            delattr(fused, name)
        self._gate = [fused]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Route tokens [tokens, hidden] through their experts and sum, weighted."""
        if self.grouped is not None and not self._calls_every_expert():
            result = self.grouped(hidden_states, top_k_index, top_k_weights)
            if result is not None:
                return result
        routes = {
            expert: torch.where(top_k_index == expert)
            for expert in self._experts_to_call(top_k_index)
        }
        first = [partial(hidden_states.__getitem__, tokens) for tokens, _ in routes.values()]
        self._observe("first", first)
        middle = [
            self._run_first_stage(expert, get()) for expert, get in zip(routes, first, strict=True)
        ]
        self._observe("second", [lambda m=m: m for m in middle])  # type: ignore[misc]
        output = torch.zeros(
            hidden_states.shape, dtype=top_k_weights.dtype, device=hidden_states.device
        )
        for (expert, (tokens, slot)), states in zip(routes.items(), middle, strict=True):
            result = self.projection(expert, self.names.down)(states)
            output.index_add_(0, tokens, result * top_k_weights[tokens, slot, None])
        return output.to(hidden_states.dtype)

    def fused(self) -> nn.Module:
        """Return the original module, with parameters on the meta device again."""
        module = self._gate[0]
        for name, parameter in self._empty.items():
            module.register_parameter(name, parameter)
        return module

    def projection(self, expert: int, name: str) -> nn.Module:
        """Return one expert's linear by its name on disk."""
        return self.get_submodule(f"{expert}.{name}")

    def stages(self) -> dict[str, list[list[str]]]:
        """Return the linears of each stage by name, one list per expert that shares an input."""
        first = [self.names.gate, self.names.up] if self.has_gate else [self.names.up]
        experts = range(self.num_experts)
        return {
            "first": [[f"{e}.{name}" for name in first] for e in experts],
            "second": [[f"{e}.{self.names.down}"] for e in experts],
        }

    def activate(self, first: Tensor) -> Tensor:
        """Apply the model's activation to the results of the first stage.

        Args:
            first: [rows, 2 width], gate then up; [rows, width] of up if there is no gate.

        Returns:
            [rows, width], the inputs of the second stage.
        """
        fused: Any = self._gate[0]
        if not self.has_gate:
            activated: Tensor = fused.act_fn(first)
            return activated
        if not fused.is_concatenated:
            first = torch.stack(first.chunk(2, dim=-1), dim=-1).flatten(-2)
        gated: Tensor = fused._apply_gate(first)
        return gated

    def _calls_every_expert(self) -> bool:
        return self.observer is not None or torch.is_grad_enabled()

    def _experts_to_call(self, top_k_index: Tensor) -> list[int]:
        experts = range(self.num_experts)
        if self._calls_every_expert():
            return list(experts)
        # In a decode step only a few of many experts, such as 8 of 128, get a token.
        routed = set(top_k_index.flatten().tolist())
        return [expert for expert in experts if expert in routed]

    def _run_first_stage(self, expert: int, states: Tensor) -> Tensor:
        names = (self.names.gate, self.names.up) if self.has_gate else (self.names.up,)
        products = [self.projection(expert, name)(states) for name in names]
        return self.activate(torch.cat(products, dim=-1) if self.has_gate else products[0])

    def _observe(self, stage: str, inputs: Sequence[Callable[[], Tensor]]) -> None:
        if self.observer is not None:
            self.observer(stage, inputs)


def find_fused_experts(module: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that hold all experts of a layer in fused 3-D parameters.

    Args:
        module: A model or a part of one.

    Returns:
        Modules by name, for those whose layout Transformers declares by flags.
    """
    return {
        name: child
        for name, child in module.named_modules()
        if all(hasattr(child, flag) for flag in _FLAGS) and hasattr(child, "down_proj")
    }


def why_not_unfused(fused: nn.Module) -> str | None:
    """Return why an experts module cannot be split, or None if it can."""
    if getattr(fused, "has_post_expert_norm", False):
        return "its experts are followed by a norm, which the split form does not support"
    return None


def unfuse_experts(model: nn.Module, wanted: Callable[[str], bool] | None = None) -> list[str]:
    """Replace fused experts by per-expert linears, in place.

    Args:
        model: A Transformers model, on any device (meta too).
        wanted: Filter by the experts module's name; None: all that can be split.

    Returns:
        The names of the modules that were replaced.

    Raises:
        ModelError: A module selected by ``wanted`` cannot be split.
    """
    replaced: list[str] = []
    found = find_fused_experts(model)
    if not found:
        return replaced
    rules = Renaming(model)
    for name, fused in found.items():
        if wanted is not None and not wanted(name):
            continue
        reason = why_not_unfused(fused)
        if reason is not None:
            if wanted is None:
                continue
            raise ModelError(f"Cannot split {name} into one linear per expert: {reason}.")
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, UnfusedExperts(fused, projection_names(rules)))
        replaced.append(name)
    return replaced


def join_experts(block: nn.Module) -> None:
    """Undo :func:`unfuse_experts` for a block without weights, so that they can be loaded again.

    Files may hold experts fused, and Transformers loads those into the original module only.
    """
    for name, module in list(block.named_modules()):
        if isinstance(module, UnfusedExperts):
            parent, _, child = name.rpartition(".")
            setattr(block.get_submodule(parent), child, module.fused())


def projection_names(rules: Renaming) -> ProjectionNames:
    """Derive the per-expert names from Transformers' rules for fusing them."""
    names: dict[str, str] = {}
    for converter in rules.converters:
        target = converter.target_patterns[0]
        sources = [_leaf(source) for source in converter.source_patterns]
        if len(converter.target_patterns) != 1 or "experts" not in target:
            continue
        if target.endswith("gate_up_proj") and len(sources) == 2:
            names.setdefault("gate", sources[0])
            names.setdefault("up", sources[1])
        elif target.endswith("up_proj") and len(sources) == 1:
            names.setdefault("up", sources[0])
        elif target.endswith("down_proj") and len(sources) == 1:
            names.setdefault("down", sources[0])
    return ProjectionNames(**names)


def _leaf(source_pattern: str) -> str:
    return source_pattern.removesuffix("$").removesuffix(".weight").rpartition(".")[2]


def _split_expert(fused: nn.Module, expert: int, names: ProjectionNames) -> nn.Module:
    holder = nn.Module()
    first = _matrix(fused, "gate_up_proj" if fused.has_gate else "up_proj", expert)
    bias = _bias(fused, "gate_up_proj" if fused.has_gate else "up_proj", expert)
    if fused.has_gate:
        gate, up = _halves(first, fused)
        gate_bias, up_bias = (None, None) if bias is None else _halves(bias, fused)
        holder.add_module(names.gate, _linear(gate, gate_bias))
        holder.add_module(names.up, _linear(up, up_bias))
    else:
        holder.add_module(names.up, _linear(first, bias))
    down = _matrix(fused, "down_proj", expert)
    holder.add_module(names.down, _linear(down, _bias(fused, "down_proj", expert)))
    return holder


def _matrix(fused: nn.Module, name: str, expert: int) -> Tensor:
    """Return one expert's weight as [out, in]."""
    weight: Tensor = getattr(fused, name).data[expert]
    return weight.t() if fused.is_transposed else weight


def _bias(fused: nn.Module, name: str, expert: int) -> Tensor | None:
    if not fused.has_bias:
        return None
    bias: Tensor = getattr(fused, f"{name}_bias").data[expert]
    return bias


def _halves(fused_rows: Tensor, fused: nn.Module) -> tuple[Tensor, Tensor]:
    if fused.is_concatenated:
        gate, up = fused_rows.chunk(2, dim=0)
        return gate, up
    return fused_rows[::2], fused_rows[1::2]


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    out_features, in_features = weight.shape
    linear = nn.Linear(in_features, out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear
