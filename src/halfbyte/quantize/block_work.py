"""One block: its weights -> statistics stage by stage -> rounded linears, with the model running.

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
from halfbyte.model.experts import UnfusedExperts, unfuse_experts, why_not_unfused
from halfbyte.model.stream import BlockStream, ForwardPasses
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.block_inputs import (
    Accumulator,
    GroupTasks,
    InputCollector,
    cut_portions,
    finish_statistics,
    is_starved,
)
from halfbyte.quantize.hessian import HessianAccumulator
from halfbyte.quantize.meter import Meter
from halfbyte.quantize.rounding import LinearTask, RoundedLinear, round_group
from halfbyte.quantize.token_weights import TokenWeights

DISCOVERY_TOKENS = 64

LoadBatch = Callable[[int], tuple[Tensor, Tensor | None]]


class BlockWork:
    """Rounds the linears of one block after the other."""

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
        """Take what all blocks share.

        Args:
            weights: The model's files.
            stream: Runs blocks.
            config: How to round.
            hessian_bytes: For Hessians that are collected at the same time.
            on_linear: Told of every rounded linear.
            meter: Collects times and operations.
        """
        self.weights = weights
        self.stream = stream
        self.config = config
        self.hessian_bytes = hessian_bytes
        self.on_linear = on_linear
        self.meter = meter
        self.stages: list[Stage] = []
        self.split_experts: list[str] = []
        """Names of the current block's experts modules that were split."""
        self.token_weights: TokenWeights | None = None
        """What the calibration tokens count; None: all alike."""
        self._base_weights: dict[str, nn.Parameter] = {}
        """Of the linears that are rounded already, where the base model runs beside."""

    def load(self, index: int) -> tuple[nn.Module, dict[str, LinearTensors]]:
        """Load a block, split its experts, and bring it into the computing type.

        Args:
            index: Which block.

        Returns:
            The block, and what its linears hold by name, in the stored type.
        """
        block = self.weights.load_block(index)
        self.split_experts = split_experts(self.weights, index)
        exact = {n: linear_tensors(m) for n, m in quantizable_linears(block).items()}
        cast_block(block, self.weights.dtype, self.stream.dtype)
        return block, exact

    def find_stages(self, index: int, block: nn.Module, batch: LoadBatch) -> None:
        """Find the stages of a block by running it on a few tokens.

        Args:
            index: Which block.
            block: The loaded block.
            batch: Gives input ids and hidden states of a batch.
        """
        ids, hidden = batch(0)
        ids = ids[:1, :DISCOVERY_TOKENS]
        hidden = None if hidden is None else hidden[:1, :DISCOVERY_TOKENS]

        def run() -> int:
            self.stream.run(ids, hidden)
            return ids.numel()

        with self.stream.at(index):
            self.stages = find_stages(block, run)

    def round_block(
        self,
        root: nn.Module,
        tasks: Iterable[LinearTask],
        passages: ForwardPasses,
        base_passages: ForwardPasses | None = None,
    ) -> list[RoundedLinear]:
        """Round all linears of a block, stage by stage, and put the results in place.

        Args:
            root: The block.
            tasks: What to round.
            passages: The batches, on their way through the block.
            base_passages: The same batches as the base model sees them.

        Returns:
            The results, in the order of their rounding.
        """
        self._base_weights = {}
        collector = InputCollector(
            self.config,
            self.weights.device,
            passages,
            base_passages,
            lambda: self.base_weights(root),
            self.token_weights,
        )
        waiting = {task.module: task for task in tasks}
        rounded: list[RoundedLinear] = []
        for number, stage in enumerate(self.stages):
            rounded += self._round_stage(number, stage, root, waiting, collector)
        return rounded

    def _round_stage(
        self,
        number: int,
        stage: Stage,
        root: nn.Module,
        waiting: dict[str, LinearTask],
        collector: InputCollector,
    ) -> list[RoundedLinear]:
        rounded: list[RoundedLinear] = []
        groups = [
            GroupTasks(index=index, tasks=tuple(waiting.pop(name) for name in here))
            for index, group in enumerate(stage.groups)
            if (here := [name for name in group.linears if name in waiting])
        ]
        pool: HessianAccumulator | None = None
        for portion in cut_portions(groups, self.config, self.hessian_bytes):
            with self.meter.timed("forward and Hessians"):
                found = collector.collect(number, portion, routed=stage.experts is not None)
                if pool is None and len(stage.groups) > 1 and any(map(is_starved, found)):
                    pool = collector.pool(number, len(stage.groups), portion[0].width)
            self.meter.flops["Hessians"] += sum(a.num_tokens * a.in_features**2.0 for a in found)
            # The solver's large matrices come on top of whatever the forward left in pieces.
            release_memory()
            for group, accumulator in zip(portion, found, strict=True):
                rounded += self._round(root, group, accumulator, pool)
            # The next portion's matrices are to have the memory of these.
            del found, accumulator
        return rounded

    @contextmanager
    def base_weights(self, root: nn.Module) -> Iterator[None]:
        """Put the base model's weights in the place of the rounded ones for a while."""
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
    """Split the fused experts of a block into linears, where they can be.

    Args:
        weights: The model; the block may be empty.
        index: Which block.

    Returns:
        Names of the split experts modules, within the block; also of those split before.
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


def cast_block(block: nn.Module, stored: torch.dtype, computing: torch.dtype) -> None:
    """Bring a block's parameters of the stored type into the computing type."""
    if stored == computing:
        return
    for module in block.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dtype == stored:
                cast = parameter.data.to(computing)
                setattr(module, name, nn.Parameter(cast, requires_grad=False))
