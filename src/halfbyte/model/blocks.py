"""Finds the decoder blocks of a model, and which linears of a block share an input.

No model family is special-cased: the blocks are the largest module list of the decoder, and shared
inputs are found by running a block once and comparing the tensors that reach its linears.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from halfbyte.errors import ModelError, first_line
from halfbyte.model.experts import UnfusedExperts


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocks:
    """The decoder blocks of a model, in the order in which it runs them."""

    prefix: str
    """Dotted name of the list, such as ``model.layers``."""
    modules: tuple[nn.Module, ...]

    def name(self, index: int) -> str:
        """Return the dotted name of one block."""
        return f"{self.prefix}.{index}"

    def first_of_each_kind(self) -> list[int]:
        """Return the first block of every set of parameter names and shapes."""
        kinds: dict[Any, int] = {}
        for index, block in enumerate(self.modules):
            kind = tuple((name, p.shape) for name, p in block.named_parameters())
            kinds.setdefault(kind, index)
        return list(kinds.values())


class LinearTensors(NamedTuple):
    """Weight and bias of a linear."""

    weight: Tensor
    """[out, in], also for modules that store it transposed."""
    bias: Tensor | None
    """[out]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InputGroup:
    """Linears that get the same input tensor, and therefore share one Hessian."""

    linears: tuple[str, ...]
    """Names within the block."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Input groups whose inputs are all available before any of their linears runs.

    A stage of dense linears has one group; a stage of experts has one group per expert.
    """

    groups: tuple[InputGroup, ...]
    experts: str | None = None
    """Name, within the block, of the experts module that reports this stage; None for linears."""
    experts_stage: str = ""

    @classmethod
    def of(cls, *linears: str) -> Self:
        """Create the stage of dense linears that share an input."""
        return cls(groups=(InputGroup(linears=linears),))


def build_skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Build a causal LM with parameters on the meta device and real buffers (rotary tables, …).

    Args:
        config: The model's configuration.
        dtype: Parameter type.

    Returns:
        The model in eval mode, parameters on the meta device.

    Raises:
        ModelError: Transformers cannot build a causal LM from this configuration.
    """
    try:
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except ValueError as error:
        raise ModelError(
            f"Transformers cannot build a causal language model of type '{config.model_type}': "
            f"{first_line(error)}."
        ) from error
    for name, parameter in model.named_parameters():
        # Parameters that Transformers keeps in fp32 regardless of dtype (router biases, …).
        if any(pattern in name for pattern in model._get_dtype_plan(dtype)):
            parameter.data = parameter.data.float()
    model.eval()
    model.requires_grad_(False)
    return model


def find_blocks(model: nn.Module) -> Blocks:
    """Find the decoder blocks: the module list of the text decoder that contains most modules.

    Lists of as many modules as the configuration has layers come first.
    Modules are counted instead of parameters, because a quantized linear has no parameters.

    Args:
        model: A causal LM, possibly on the meta device, before or after linears were replaced.

    Returns:
        The blocks.

    Raises:
        ModelError: There is no module list.
    """
    lists = {n: m for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
    # A vision tower outside the decoder may have more and larger blocks.
    decoder = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    inside = set(decoder.modules())
    # What a model calls its decoder may also be its head.
    lists = {n: m for n, m in lists.items() if m in inside} or lists
    # What it calls its decoder may also be the whole model, towers of images and sounds included.
    layers = _count_layers(model)
    lists = {n: m for n, m in lists.items() if len(m) == layers} or lists
    if not lists:
        raise ModelError(
            f"Cannot find the decoder blocks of {type(model).__name__}: it has no list of "
            "modules. Only models built of repeated blocks can be quantized."
        )
    prefix = max(lists, key=lambda name: sum(1 for _ in lists[name].modules()))
    return Blocks(prefix=prefix, modules=tuple(lists[prefix]))


def _count_layers(model: nn.Module) -> int | None:
    """Return the number of decoder blocks by the model's configuration, if that says so."""
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    return getattr(config, "num_hidden_layers", None)


def quantizable_linears(block: nn.Module) -> dict[str, nn.Module]:
    """List the linears of a block by name, in module order."""
    return {
        n: m
        for n, m in block.named_modules()
        if isinstance(m, nn.Linear | Conv1D) and computes_linear(m)
    }


def computes_linear(module: nn.Module) -> bool:
    """Whether a module computes x Wᵀ + b; a subclass of a linear may do something else.

    Args:
        module: A linear; its weight may be on the meta device.

    Returns:
        False for subclasses whose output is of another shape, such as routers and grouped linears.
    """
    forward = type(module).forward
    # A quantized linear has no such parameter.
    if forward in (nn.Linear.forward, Conv1D.forward) or "weight" not in module._parameters:
        return True
    empty = copy.copy(module)
    empty._parameters = {
        name: p if p is None else nn.Parameter(p.data.to("meta"), requires_grad=False)
        for name, p in module._parameters.items()
    }
    out_features, in_features = linear_weight(module).shape
    x = torch.empty(1, 2, in_features, dtype=linear_weight(module).dtype, device="meta")
    try:
        output = forward(empty, x)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    return isinstance(output, Tensor) and output.shape == (1, 2, out_features)


def linear_weight(linear: nn.Module) -> Tensor:
    """Return a linear's weight as [out, in], also for modules that store it transposed."""
    weight: Tensor = linear.weight.data  # type: ignore[assignment]
    return weight.t() if isinstance(linear, Conv1D) else weight


def linear_tensors(linear: nn.Module) -> LinearTensors:
    """Return a linear's current weight and bias."""
    bias: Tensor | None = getattr(linear, "bias", None)
    return LinearTensors(linear_weight(linear), None if bias is None else bias.data)


def set_linear_weight(linear: nn.Module, weight: Tensor) -> None:
    """Set a linear's weight, given as [out, in], in the module's dtype and layout."""
    stored = weight.t() if isinstance(linear, Conv1D) else weight
    current: Tensor = linear.weight  # type: ignore[assignment]
    linear.weight = nn.Parameter(
        stored.to(dtype=current.dtype, device=current.device).contiguous(), requires_grad=False
    )


def find_stages(block: nn.Module, run_block: Callable[[], Any]) -> list[Stage]:
    """Run a block once and find, in execution order, which linears share an input.

    Args:
        block: A block with real weights, its experts already split.
        run_block: Runs the block's forward on a few tokens.

    Returns:
        One stage for each linear that did not run, then the others in execution order. A block may
        read the weight of a linear without running it; rounded first, all later stages see it.
    """
    experts = {n: m for n, m in block.named_modules() if isinstance(m, UnfusedExperts)}
    inside = {
        f"{n}.{name}"
        for n, m in experts.items()
        for s in m.stages().values()
        for g in s
        for name in g
    }
    linears = {n: m for n, m in quantizable_linears(block).items() if n not in inside}
    found: set[str] = set()
    sharing: dict[tuple[Any, ...], list[str]] = {}
    kept: list[Tensor] = []  # keeps the tensors alive, so that no address is reused
    order: list[Stage | list[str]] = []

    def on_linear(name: str, inputs: tuple[Tensor, ...]) -> None:
        if name in found:  # it runs again, and stays with its first input
            return
        found.add(name)
        tensor = inputs[0]
        kept.append(tensor)
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype, tensor._version)
        if key not in sharing:
            sharing[key] = []
            order.append(sharing[key])
        sharing[key].append(name)

    def on_experts(name: str, module: UnfusedExperts, stage: str, _inputs: Any) -> None:
        members = [tuple(f"{name}.{n}" for n in names) for names in module.stages()[stage]]
        groups = tuple(InputGroup(linears=names) for names in members)
        order.append(Stage(groups=groups, experts=name, experts_stage=stage))

    with ExitStack() as stack:
        for name, module in experts.items():
            module.observer = partial(on_experts, name, module)
            stack.callback(setattr, module, "observer", None)
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(lambda _, x, n=name: on_linear(n, x))
            stack.callback(hook.remove)
        run_block()
    stages = [entry if isinstance(entry, Stage) else Stage.of(*entry) for entry in order]
    return [*(Stage.of(name) for name in linears if name not in found), *stages]
