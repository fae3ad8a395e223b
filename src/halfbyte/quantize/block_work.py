"""Round the linears of one block, stage by stage.

::

    load -> split fused experts -> find stages -> per stage: Hessians of all batches -> round
         -> put the rounded weights in place -> next stage -> hidden states for the next block
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from halfbyte.machine.memory import release_memory
from halfbyte.model.blocks import (
    LinearTensors,
    Stage,
    find_stages,
    linear_tensors,
    quantizable_linears,
    set_linear_weight,
)
from halfbyte.model.experts import (
    UnfusedExperts,
    join_experts,
    unfuse_experts,
    why_not_unfused,
)
from halfbyte.model.stream import BlockStream, ForwardPasses
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.block_inputs import (
    Accumulator,
    GroupTasks,
    InputCollector,
    finish_statistics,
    is_starved,
    split_by_memory,
)
from halfbyte.quantize.hessian import HessianAccumulator
from halfbyte.quantize.meter import Meter
from halfbyte.quantize.rounding import LinearTask, RoundedLinear, round_group
from halfbyte.quantize.token_weights import TokenWeights

DISCOVERY_TOKENS = 64

LoadBatch = Callable[[int], tuple[Tensor, Tensor | None]]


class BlockWork:
    """Loads and rounds blocks, one at a time."""

    def __init__(
        self,
        weights: ModelWeights,
        stream: BlockStream,
        config: QuantConfig,
        *,
        hessian_bytes: int,
        on_linear: Callable[[RoundedLinear], None],
        meter: Meter,
    ) -> None:
        """Set up rounding for all blocks.

        Args:
            weights: The model's files.
            stream: Runs blocks.
            config: How to round.
            hessian_bytes: Memory for Hessians that are collected at the same time.
            on_linear: Called with every rounded linear.
            meter: Collects times and operation counts.
        """
        self.weights = weights
        self.stream = stream
        self.config = config
        self.hessian_bytes = hessian_bytes
        self.on_linear = on_linear
        self.meter = meter
        self.stages: list[Stage] = []
        self.split_experts: list[str] = []
        """Names of the current block's fused experts modules that were split into linears."""
        self.token_weights: TokenWeights | None = None
        """Weights of the calibration tokens; None: all equal."""
        self._base_weights: dict[str, nn.Parameter] = {}
        """Original weights of the linears rounded so far; empty without ``match_base``."""

    def load(self, index: int) -> tuple[nn.Module, dict[str, LinearTensors]]:
        """Load a block, split its fused experts, and cast it to the compute dtype.

        Args:
            index: Index of the block.

        Returns:
            The block, and weight and bias of its linears by name, in the stored dtype.
        """
        join_experts(self.weights.blocks.modules[index])
        block = self.weights.load_block(index)
        self.split_experts = split_experts(self.weights, index)
        exact = {n: linear_tensors(m) for n, m in quantizable_linears(block).items()}
        cast_block(block, self.weights.dtype, self.stream.dtype)
        return block, exact

    def find_stages(self, index: int, block: nn.Module, load_batch: LoadBatch) -> None:
        """Find the stages of a block by running it on a few tokens.

        Args:
            index: Index of the block.
            block: The loaded block.
            load_batch: Returns input ids and hidden states of a batch.
        """
        ids, hidden = load_batch(0)
        ids = ids[:1, :DISCOVERY_TOKENS]
        hidden = None if hidden is None else hidden[:1, :DISCOVERY_TOKENS]
        with self.stream.at(index):
            self.stages = find_stages(block, lambda: self.stream.run(ids, hidden))

    def round_block(
        self,
        root: nn.Module,
        tasks: Iterable[LinearTask],
        passes: ForwardPasses,
        base_passes: ForwardPasses | None = None,
    ) -> list[RoundedLinear]:
        """Round all linears of a block, stage by stage, and put the results in place.

        Args:
            root: The block.
            tasks: The linears to round.
            passes: The batches, on their way through the block.
            base_passes: The same batches in the base model.

        Returns:
            The rounded linears, in the order of rounding.
        """
        self._base_weights = {}
        collector = InputCollector(
            self.config,
            self.weights.device,
            passes,
            base_passes,
            lambda: self.base_weights(root),
            self.token_weights,
        )
        pending = {task.module: task for task in tasks}
        rounded: list[RoundedLinear] = []
        for number, stage in enumerate(self.stages):
            rounded += self._round_stage(number, stage, root, pending, collector)
        return rounded

    def _round_stage(
        self,
        number: int,
        stage: Stage,
        root: nn.Module,
        pending: dict[str, LinearTask],
        collector: InputCollector,
    ) -> list[RoundedLinear]:
        rounded: list[RoundedLinear] = []
        groups = [
            GroupTasks(index=index, tasks=tuple(pending.pop(name) for name in names))
            for index, group in enumerate(stage.groups)
            if (names := [name for name in group.linears if name in pending])
        ]
        pool: HessianAccumulator | None = None
        for chunk in split_by_memory(groups, self.config, self.hessian_bytes):
            with self.meter.timed("forward and Hessians"):
                sums = collector.collect(number, chunk, routed=stage.experts is not None)
                if pool is None and len(stage.groups) > 1 and any(map(is_starved, sums)):
                    pool = collector.pool(number, len(stage.groups), chunk[0].width)
            self.meter.flops["Hessians"] += sum(a.num_tokens * a.in_features**2.0 for a in sums)
            # The solver needs large matrices, and the forward pass left memory fragmented.
            release_memory()
            for group, accumulator in zip(chunk, sums, strict=True):
                rounded += self._round(root, group, accumulator, pool)
            # Freed before the next chunk's matrices are allocated.
            del sums, accumulator
        return rounded

    @contextmanager
    def base_weights(self, root: nn.Module) -> Iterator[None]:
        """Put the base model's weights in place of the rounded ones inside a ``with`` block."""
        self._swap(root)
        try:
            yield
        finally:
            self._swap(root)

    def _swap(self, root: nn.Module) -> None:
        for name, weight in self._base_weights.items():
            linear = root.get_submodule(name)
            self._base_weights[name] = linear.weight  # type: ignore[assignment]
            linear.weight = weight

    def _round(
        self,
        root: nn.Module,
        group: GroupTasks,
        accumulator: Accumulator,
        pool: HessianAccumulator | None,
    ) -> list[RoundedLinear]:
        tasks, width = group.tasks, group.width
        statistics = finish_statistics(
            tasks[0].name, accumulator, pool, shrinkage=self.config.shrinkage
        )
        numbers = sum(task.weight.numel() for task in tasks)
        with self.meter.timed("solve"):
            results = round_group(tasks, statistics, self.config)
        self.meter.flops["solve"] += float(width) * numbers + width**3 / 3
        self.meter.flops["forward"] += 2.0 * numbers * accumulator.num_tokens
        for task, result in zip(tasks, results, strict=True):
            linear = root.get_submodule(task.module)
            if self.config.match_base:
                self._base_weights[task.module] = linear.weight  # type: ignore[assignment]
            set_linear_weight(linear, result.weight)
            self.on_linear(result)
        return results


def split_experts(weights: ModelWeights, index: int) -> list[str]:
    """Split the fused experts of a block into linears, where possible.

    Args:
        weights: The model; the block need not be loaded.
        index: Index of the block.

    Returns:
        Names of all split experts modules within the block, including those split before.
    """
    prefix = weights.blocks.name(index)
    unfuse_experts(
        weights.model,
        lambda name: (
            name.startswith(f"{prefix}.")
            and why_not_unfused(weights.model.get_submodule(name)) is None
        ),
    )
    block = weights.blocks.modules[index]
    return [name for name, module in block.named_modules() if isinstance(module, UnfusedExperts)]


def cast_block(block: nn.Module, stored: torch.dtype, compute: torch.dtype) -> None:
    """Cast a block's parameters of the stored dtype to the compute dtype, in place."""
    if stored == compute:
        return
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype == stored:
                cast = parameter.data.to(compute)
                setattr(module, name, nn.Parameter(cast, requires_grad=False))
