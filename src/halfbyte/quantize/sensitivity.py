"""What would rounding cost, module by module and for each number of bits? Asked of the base model.

A rounded linear gives outputs that are off by d. To second order the KL of the model's predictions
is then half the mean of (g·d)², where g is the gradient, by those outputs, of the log-probability
of a token drawn from the model itself. Both factors are measured: g by one backward pass over a
little calibration text, d by rounding the weight with each number of bits on the inputs of the same
pass. Outputs are taken one by one, and modules as if each stood alone: near enough to rank them.

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
from halfbyte.quantize.token_gradients import draw_gradient, watch_gradients

GroupMembers = tuple[InputGroup, list[LinearTask]]
"""Linears that share an input, and those of them that are rounded."""

TENSORS = 4
"""Of a packed linear on disk."""


@dataclass(slots=True)
class _Watched:
    """What one block's linears were seen to do."""

    hessians: dict[InputGroup, HessianAccumulator]
    squares: dict[str, Tensor]
    """Sum over tokens of squared gradients, [out], by linear."""


class Survey:
    """Measures all blocks of a base model."""

    def __init__(
        self,
        weights: ModelWeights,
        stream: BlockStream,
        work: BlockWork,
        config: QuantConfig,
        *,
        seed: int,
    ) -> None:
        """Take what the run has.

        Args:
            weights: The base model; what is outside the blocks is loaded.
            stream: Runs blocks.
            work: Loads blocks, and knows how each linear is to be rounded.
            config: What is fixed: groups, symmetry, overrides.
            seed: Draws tokens from the model's predictions.
        """
        self.weights = weights
        self.stream = stream
        self.work = work
        self.config = config
        self._dice = torch.Generator(weights.device).manual_seed(seed)
        self._batches: list[Tensor] = []
        self._states: list[list[Tensor]] = []
        self._watched: _Watched | None = None
        self._going_back = False

    def measure(self, batches: Sequence[Tensor]) -> list[Unit]:
        """Measure every linear that may be rounded.

        Args:
            batches: Token ids, [sequences, tokens] each.

        Returns:
            Units in the order of the blocks.

        Raises:
            ConfigError: Overrides fix linears of one unit differently, and it has others.
        """
        self._batches = [ids.to(self.weights.device) for ids in batches]
        chain = BlockChain(self.stream, self._enter)
        self._going_back = False
        self._states = chain.forward(self._batches)
        with self.stream.at(chain.num_blocks):
            gradients = [
                draw_gradient(self.stream, ids, hidden, self._dice)
                for ids, hidden in zip(self._batches, self._states[-1], strict=True)
            ]
        self._going_back = True
        tokens = sum(ids.numel() for ids in self._batches)
        by_block: list[list[Unit]] = []
        for index in chain.backward(self._batches, self._states, gradients):
            with torch.no_grad():
                by_block.append(self._judge(index, tokens))
        return [unit for units in reversed(by_block) for unit in units]

    @contextmanager
    def _enter(self, index: int) -> Iterator[None]:
        block, self._exact = self.work.load(index)
        try:
            if not self._going_back:
                yield
                return
            # The block's own states were taken away; what is last came in front of it.
            before = self._states[-1] if self._states else [None] * len(self._batches)
            with torch.no_grad():
                self.work.find_stages(index, block, lambda k: (self._batches[k], before[k]))
            with ExitStack() as stack:
                self._watch(stack, block)
                yield
        finally:
            self._watched = None
            self.weights.drop_block(index)
            release_memory()

    def _watch(self, stack: ExitStack, block: nn.Module) -> None:
        """Collect every linear's inputs and the gradients of its outputs."""
        watched = _Watched(hessians={}, squares={})
        self._watched = watched
        for stage in self.work.stages:
            pool = None
            for group in stage.groups:
                width = self._exact[group.linears[0]].weight.shape[1]
                # Experts share one: few tokens reach each, and their number is large.
                accumulator = pool or HessianAccumulator(width, self.weights.device)
                pool = accumulator if stage.experts is not None else None
                watched.hessians[group] = accumulator
                first = block.get_submodule(group.linears[0])
                stack.callback(
                    first.register_forward_pre_hook(
                        lambda _m, x, a=accumulator: (a.update(x[0].detach()), None)[1]
                    ).remove
                )
                for name in group.linears:
                    rows = self._exact[name].weight.shape[0]
                    watched.squares[name] = torch.zeros(rows, device=self.weights.device)
                    hook = watch_gradients(partial(_add_squares, watched.squares[name]))
                    stack.callback(block.get_submodule(name).register_forward_hook(hook).remove)

    def _judge(self, index: int, tokens: int) -> list[Unit]:
        block = self.weights.blocks.modules[index]
        prefix = f"{self.weights.blocks.name(index)}."
        tasks, _ = plan_tasks(prefix, block, self._exact, self.work.config, self.weights.disk_name)
        by_module = {task.module: task for task in tasks}
        together: dict[str | InputGroup, list[GroupMembers]] = {}
        for stage in self.work.stages:
            for group in stage.groups:
                here = [by_module[name] for name in group.linears if name in by_module]
                if here:
                    together.setdefault(stage.experts or group, []).append((group, here))
        return [unit for groups in together.values() for unit in self._judge_unit(groups, tokens)]

    def _judge_unit(self, groups: Sequence[GroupMembers], tokens: int) -> list[Unit]:
        """Measure linears that readers fuse: those that are to be chosen for, and fixed ones."""
        tasks = [task for _, here in groups for task in here]
        fixed = {t.name: t.scheme.bits for t in tasks if self.config.fixes_bits(t.name)}
        decided = sorted(set(fixed.values()))
        free = [task.name for task in tasks if task.name not in fixed]
        if free and len(decided) > 1:
            told = ", ".join(f"{name} to {bits}" for name, bits in list(fixed.items())[:4])
            raise ConfigError(
                f"Cannot choose bits for {free[0]}: it needs those of the linears that runtimes "
                f"fuse it with, and overrides fix them differently ({told}). Give all of them the "
                "same bits, or fix every one."
            )
        units, parts = [], []
        for group, here in groups:
            for bits in decided:
                same = [task for task in here if fixed.get(task.name) == bits]
                if same:  # takes its part of the budget, but nothing is chosen
                    units.append(
                        replace(self._judge_group(group, same, tokens, [bits]), linears=())
                    )
            rest = [task for task in here if task.name not in fixed]
            if rest:
                parts.append(self._judge_group(group, rest, tokens, decided or SUPPORTED_BITS))
        return [*units, _merge(parts)] if parts else units

    def _judge_group(
        self, group: InputGroup, tasks: Sequence[LinearTask], tokens: int, offered: Sequence[int]
    ) -> Unit:
        assert self._watched is not None
        accumulator = self._watched.hessians[group]
        hessian = accumulator.total() / max(accumulator.num_tokens, 1)
        shrink_to_diagonal(hessian, self.config.shrinkage)
        factor = factorize(hessian, damping=self.config.damping, act_order=True)
        weight = torch.cat([task.weight for task in tasks]).to(factor.upper.device).float()
        squares = torch.cat([self._watched.squares[task.module] for task in tasks])
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


def survey_batches(batches: Sequence[Tensor]) -> list[Tensor]:
    """Take as many batches as the survey needs, spread over all of them."""
    tokens = sum(ids.numel() for ids in batches)
    step = max(1, tokens // BACKWARD_TOKENS)
    return list(batches[::step])


def _add_squares(into: Tensor, gradient: Tensor) -> None:
    """Add up a linear's squared gradients, [out], over tokens."""
    into.add_(gradient.float().square().reshape(-1, into.numel()).sum(0))


def _merge(parts: Sequence[Unit]) -> Unit:
    """Make one unit of several that offer the same bits."""
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
