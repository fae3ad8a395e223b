"""Sensitivity analysis: the predicted KL of rounding each module to each number of bits.

Let d be the error that rounding causes in a linear's outputs. To second order, the KL of the
model's predictions is half the mean of (g·d)², where g is the gradient, with respect to those
outputs, of the log-probability of a token sampled from the model itself. Both factors are measured
on the base model: g by one backward pass over some calibration text, d by rounding the weight to
each number of bits on the inputs of the same pass. Output features and modules are treated as
independent, which is accurate enough to rank modules.

Source:
    The Fisher information as the curvature of the KL: Martens 2014,
    https://arxiv.org/abs/1412.1193, section 9. Bits by marginal gain: Shoham and Gersho 1988.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte.errors import ConfigError
from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import InputGroup
from halfbyte.model.blockwise_backward import BlockChain
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import SUPPORTED_BITS, QuantConfig
from halfbyte.quantize.bit_allocation import HEADER_BYTES, Choice, Unit, stored_bits
from halfbyte.quantize.block_plan import plan_tasks
from halfbyte.quantize.block_work import BlockWork
from halfbyte.quantize.gptq import solve
from halfbyte.quantize.grid import assign_groups, search_grid
from halfbyte.quantize.hessian import HessianAccumulator, factorize, shrink_to_diagonal
from halfbyte.quantize.resources import BACKWARD_TOKENS
from halfbyte.quantize.rounding import LinearTask
from halfbyte.quantize.token_gradients import make_gradient_hook, sample_gradient

GroupMembers = tuple[InputGroup, list[LinearTask]]
"""Linears that share an input, and the tasks of those that are rounded."""

TENSORS = 4
"""Tensors of a packed linear on disk."""


@dataclass(slots=True)
class _BlockStatistics:
    """Statistics collected from the linears of one block."""

    hessians: dict[InputGroup, HessianAccumulator]
    squares: dict[str, Tensor]
    """Squared gradients of the outputs summed over tokens, [out], by linear."""


class SensitivityAnalysis:
    """Measures the sensitivity of all linears of a base model, block by block."""

    def __init__(
        self,
        weights: ModelWeights,
        stream: BlockStream,
        work: BlockWork,
        config: QuantConfig,
        *,
        seed: int,
    ) -> None:
        """Set up the analysis; nothing runs yet.

        Args:
            weights: The base model; the weights outside the blocks must be loaded.
            stream: Runs blocks.
            work: Loads blocks, and knows how each linear will be rounded.
            config: Group size, symmetry and overrides.
            seed: Seed for sampling tokens from the model's predictions.
        """
        self.weights = weights
        self.stream = stream
        self.work = work
        self.config = config
        self._generator = torch.Generator(weights.device).manual_seed(seed)
        self._batches: list[Tensor] = []
        self._states: list[list[Tensor]] = []
        self._statistics: _BlockStatistics | None = None
        self._in_backward = False

    def measure(self, batches: Sequence[Tensor]) -> list[Unit]:
        """Measure every linear that will be rounded.

        Args:
            batches: Token ids, [sequences, tokens] each.

        Returns:
            Units in the order of the blocks.

        Raises:
            ConfigError: Overrides assign different bits to linears of a unit that has others too.
        """
        self._batches = [ids.to(self.weights.device) for ids in batches]
        chain = BlockChain(self.stream, self._enter)
        self._in_backward = False
        self._states = chain.forward(self._batches)
        with self.stream.at(chain.num_blocks):
            gradients = [
                sample_gradient(self.stream, ids, hidden, self._generator)
                for ids, hidden in zip(self._batches, self._states[-1], strict=True)
            ]
        self._in_backward = True
        tokens = sum(ids.numel() for ids in self._batches)
        by_block: list[list[Unit]] = []
        for index in chain.backward(self._batches, self._states, gradients):
            with torch.no_grad():
                by_block.append(self._measure_block(index, tokens))
        return [unit for units in reversed(by_block) for unit in units]

    @contextmanager
    def _enter(self, index: int) -> Iterator[None]:
        block, self._exact = self.work.load(index)
        try:
            if not self._in_backward:
                yield
                return
            # The block's own output was removed from the list, so the last entry is its input.
            before = self._states[-1] if self._states else [None] * len(self._batches)
            with torch.no_grad():
                self.work.find_stages(index, block, lambda k: (self._batches[k], before[k]))
            with ExitStack() as stack:
                self._add_hooks(stack, block)
                yield
        finally:
            self._statistics = None
            self.weights.drop_block(index)
            release_memory()

    def _add_hooks(self, stack: ExitStack, block: nn.Module) -> None:
        """Add hooks that collect every linear's inputs and the gradients of its outputs."""
        statistics = _BlockStatistics(hessians={}, squares={})
        self._statistics = statistics
        for stage in self.work.stages:
            pool = None
            for group in stage.groups:
                width = self._exact[group.linears[0]].weight.shape[1]
                # Experts share one accumulator, because there are many and few tokens reach each.
                accumulator = pool or HessianAccumulator(width, self.weights.device)
                pool = accumulator if stage.experts is not None else None
                statistics.hessians[group] = accumulator
                first = block.get_submodule(group.linears[0])
                stack.callback(
                    first.register_forward_pre_hook(
                        lambda _m, x, a=accumulator: (a.update(x[0].detach()), None)[1]
                    ).remove
                )
                for name in group.linears:
                    rows = self._exact[name].weight.shape[0]
                    statistics.squares[name] = torch.zeros(rows, device=self.weights.device)
                    hook = make_gradient_hook(partial(_add_squares, statistics.squares[name]))
                    stack.callback(block.get_submodule(name).register_forward_hook(hook).remove)

    def _measure_block(self, index: int, tokens: int) -> list[Unit]:
        block = self.weights.blocks.modules[index]
        prefix = f"{self.weights.blocks.name(index)}."
        tasks, _ = plan_tasks(prefix, block, self._exact, self.work.config, self.weights.disk_name)
        by_module = {task.module: task for task in tasks}
        fused: dict[str | InputGroup, list[GroupMembers]] = {}
        for stage in self.work.stages:
            for group in stage.groups:
                here = [by_module[name] for name in group.linears if name in by_module]
                if here:
                    fused.setdefault(stage.experts or group, []).append((group, here))
        return [unit for groups in fused.values() for unit in self._measure_unit(groups, tokens)]

    def _measure_unit(self, groups: Sequence[GroupMembers], tokens: int) -> list[Unit]:
        """Measure linears that runtimes fuse: those with fixed bits, and those to choose for."""
        tasks = [task for _, here in groups for task in here]
        fixed = {t.name: t.scheme.bits for t in tasks if self.config.fixes_bits(t.name)}
        fixed_bits = sorted(set(fixed.values()))
        free = [task.name for task in tasks if task.name not in fixed]
        if free and len(fixed_bits) > 1:
            overrides = ", ".join(f"{name} to {bits}" for name, bits in list(fixed.items())[:4])
            raise ConfigError(
                f"Cannot choose bits for {free[0]}: it must have the same bits as the linears that "
                f"runtimes fuse it with, but overrides set these differently ({overrides}). Set "
                "all of them to the same bits, or add an override for each."
            )
        units, parts = [], []
        for group, here in groups:
            for bits in fixed_bits:
                same = [task for task in here if fixed.get(task.name) == bits]
                if same:  # counts toward the budget, but its bits are fixed
                    units.append(
                        replace(self._measure_group(group, same, tokens, [bits]), linears=())
                    )
            chosen = [task for task in here if task.name not in fixed]
            if chosen:
                parts.append(
                    self._measure_group(group, chosen, tokens, fixed_bits or SUPPORTED_BITS)
                )
        return [*units, _merge(parts)] if parts else units

    def _measure_group(
        self, group: InputGroup, tasks: Sequence[LinearTask], tokens: int, offered: Sequence[int]
    ) -> Unit:
        assert self._statistics is not None
        accumulator = self._statistics.hessians[group]
        hessian = accumulator.total() / max(accumulator.num_tokens, 1)
        shrink_to_diagonal(hessian, self.config.shrinkage)
        factor = factorize(hessian, damping=self.config.damping, act_order=True)
        weight = torch.cat([task.weight for task in tasks]).to(factor.upper.device).float()
        squares = torch.cat([self._statistics.squares[task.module] for task in tasks])
        scheme = tasks[0].scheme
        g_idx = assign_groups(weight.shape[1], scheme.group_size).to(weight.device)
        choices = []
        for bits in offered:
            grid = search_grid(
                weight, factor.curvature, g_idx, bits=bits, symmetric=scheme.symmetric
            )
            found = solve(weight, hessian, factor, grid, scheme.symmetric)
            choices.append(
                Choice(
                    bits=bits,
                    stored_bits=sum(
                        stored_bits(replace(task.scheme, bits=bits), *task.weight.shape)
                        for task in tasks
                    ),
                    loss=float((squares * found.loss).sum()) / (2 * tokens),
                )
            )
        return Unit(
            linears=tuple(task.name for task in tasks),
            num_weights=weight.numel(),
            choices=tuple(choices),
            other_bits=len(tasks) * (32 * weight.shape[1] + 8 * TENSORS * HEADER_BYTES),
        )


def select_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """Select about ``BACKWARD_TOKENS`` tokens of batches, evenly spaced over all of them."""
    tokens = sum(ids.numel() for ids in batches)
    step = max(1, tokens // BACKWARD_TOKENS)
    return list(batches[::step])


def _add_squares(into: Tensor, gradient: Tensor) -> None:
    """Add a linear's squared gradients, summed over tokens, to [out]."""
    into.add_(gradient.float().square().reshape(-1, into.numel()).sum(0))


def _merge(parts: Sequence[Unit]) -> Unit:
    """Merge units with the same choices of bits into one."""
    return Unit(
        linears=tuple(name for part in parts for name in part.linears),
        num_weights=sum(part.num_weights for part in parts),
        other_bits=sum(part.other_bits for part in parts),
        choices=tuple(
            Choice(
                bits=same[0].bits,
                stored_bits=sum(choice.stored_bits for choice in same),
                loss=sum(choice.loss for choice in same),
            )
            for same in zip(*(part.choices for part in parts), strict=True)
        ),
    )
