"""One block: its weights -> statistics stage by stage -> rounded linears, with the model running.

::

    load -> split fused experts -> find stages -> per stage: Hessians of all batches -> round
         -> put the rounded weights in place -> next stage -> hidden states for the next block
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from halfbyte.errors import CalibrationError, CheckpointError
from halfbyte.model.blocks import (
    InputGroup,
    Stage,
    find_stages,
    linear_weight,
    quantizable_linears,
    set_linear_weight,
)
from halfbyte.model.experts import (
    UnfusedExperts,
    find_fused_experts,
    unfuse_experts,
    why_not_unfused,
)
from halfbyte.model.stream import BlockStream, Passages
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.hardware import release_memory
from halfbyte.quantize.hessian import HessianAccumulator, shrink_to_pool
from halfbyte.quantize.report import SkippedModule
from halfbyte.quantize.rounding import (
    InputStatistics,
    LinearTask,
    RoundedLinear,
    fit_scheme,
    round_group,
)
from halfbyte.quantize.target import MomentAccumulator

DISCOVERY_TOKENS = 64
FEW_TOKENS_PER_INPUT = 4
"""An expert that saw fewer than this times its width is helped by its siblings' statistics."""

LoadBatch = Callable[[int], tuple[Tensor, Tensor | None]]
Accumulator = HessianAccumulator | MomentAccumulator


@dataclass(slots=True)
class Meter:
    """Seconds and floating-point operations by kind of work."""

    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    flops: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the time of a stretch of work to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - start


class BlockWork:
    """Rounds the linears of one block after the other."""

    def __init__(
        self,
        weights: ModelWeights,
        stream: BlockStream,
        config: QuantConfig,
        *,
        keep_paused: bool,
        hessian_bytes: int,
        on_linear: Callable[[RoundedLinear], None],
        meter: Meter,
    ) -> None:
        """Take what all blocks share.

        Args:
            weights: The model's files.
            stream: Runs blocks.
            config: How to round.
            keep_paused: See :class:`halfbyte.model.stream.Passages`.
            hessian_bytes: For Hessians that are collected at the same time.
            on_linear: Told of every rounded linear.
            meter: Collects times and operations.
        """
        self.weights = weights
        self.stream = stream
        self.config = config
        self.keep_paused = keep_paused
        self.hessian_bytes = hessian_bytes
        self.on_linear = on_linear
        self.meter = meter
        self.stages: list[Stage] = []
        self.split_experts: list[str] = []
        """Names of the current block's experts modules that were split."""
        self._base_weights: dict[str, nn.Parameter] = {}
        """Of the linears that are rounded already, where the base model runs beside."""

    def load(self, index: int) -> tuple[nn.Module, dict[str, Tensor]]:
        """Load a block, split its experts, and bring it into the computing type.

        Args:
            index: Which block.

        Returns:
            The block, and the exact weights of its linears by name, [out, in].
        """
        block = self.weights.load_block(index)
        self.split_experts = split_experts(self.weights, index)
        exact = {n: linear_weight(m) for n, m in quantizable_linears(block).items()}
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

    def plan_tasks(
        self, prefix: str, root: nn.Module, exact: dict[str, Tensor]
    ) -> tuple[list[LinearTask], list[SkippedModule]]:
        """Decide for every linear how it is rounded, or why it is not.

        Args:
            prefix: Name of the block in the model, with its dot.
            root: The block.
            exact: Its linears' weights.

        Returns:
            The tasks, and what is skipped.

        Raises:
            CheckpointError: A weight to be rounded is not finite; names the module.
        """
        tasks = []
        skipped = []
        routers = _routers(root)
        for name, weight in exact.items():
            disk_name = self.weights.disk_name(prefix + name)
            scheme = self.config.scheme_for(disk_name)
            reason = "a skip pattern matches its name" if scheme is None else routers.get(name, "")
            note = ""
            if scheme is not None and not reason:
                out_features, in_features = weight.shape
                scheme, note = fit_scheme(
                    scheme, in_features, out_features, ragged_groups=self.config.ragged_groups
                )
                reason = note if scheme is None else ""
            if scheme is None or reason:
                skipped.append(SkippedModule(name=disk_name, reason=reason))
                continue
            _check_finite(disk_name, weight)
            bias = getattr(root.get_submodule(name), "bias", None)
            tasks.append(
                LinearTask(
                    module=name,
                    name=disk_name,
                    weight=weight,
                    bias=None if bias is None else bias.data,
                    scheme=scheme,
                    notes=(note,) if note else (),
                )
            )
        for name in _fused_matrices(root):
            reason = "its experts cannot be split into linears"
            skipped.append(SkippedModule(name=prefix + name, reason=reason))
        return tasks, skipped

    def round_block(
        self,
        root: nn.Module,
        tasks: Sequence[LinearTask],
        passages: Passages,
        base_passages: Passages | None = None,
    ) -> None:
        """Round all linears of a block, stage by stage, and put the results in place.

        Args:
            root: The block.
            tasks: What to round.
            passages: The batches, on their way through the block.
            base_passages: The same batches as the base model sees them.
        """
        self._base_weights = {}
        waiting = {task.module: task for task in tasks}
        for number, stage in enumerate(self.stages):
            groups = [(i, g) for i, g in enumerate(stage.groups) if waiting.keys() & {*g.linears}]
            pool: HessianAccumulator | None = None
            for portion in self._portions(groups, waiting):
                indices = [i for i, _ in portion]
                widths = [_width(g, waiting) for _, g in portion]
                with self.meter.timed("forward and Hessians"):
                    base = None if stage.experts is not None else base_passages
                    found = self._collect(root, passages, base, number, indices, widths)
                    if pool is None and len(stage.groups) > 1 and any(map(_is_starved, found)):
                        pool = self._pool(passages, number, len(stage.groups), widths[0])
                # The solver's large matrices come on top of whatever the forward left in pieces.
                release_memory()
                for (_, group), accumulator in zip(portion, found, strict=True):
                    here = [waiting.pop(name) for name in group.linears if name in waiting]
                    self._round(root, here, accumulator, pool)

    def _portions(
        self, groups: list[tuple[int, InputGroup]], tasks: dict[str, LinearTask]
    ) -> Iterator[list[tuple[int, InputGroup]]]:
        """Split a stage's groups so that their Hessians fit the memory for them."""
        portion: list[tuple[int, InputGroup]] = []
        used = 0
        for index, group in groups:
            size = 4 * _width(group, tasks) ** 2 * self._matrices
            if portion and used + size > self.hessian_bytes:
                yield portion
                portion, used = [], 0
            portion.append((index, group))
            used += size
        if portion:
            yield portion

    @property
    def _matrices(self) -> int:
        """Square matrices that are summed per input: Hessians and drifts, in two parts."""
        return (4 if self.config.match_base else 2) if self.config.needs_check else 1

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

    def _collect(
        self,
        root: nn.Module,
        passages: Passages,
        base_passages: Passages | None,
        stage: int,
        groups: Sequence[int],
        widths: Sequence[int],
    ) -> Sequence[Accumulator]:
        """Sum over all batches; on a GPU unchecked at first, for nearly always all is finite."""
        found: Sequence[Accumulator] = ()
        for checked in (False, True) if self._sums_first else (True,):
            del found
            found = self._sum_batches(
                root, passages, base_passages, stage, groups, widths, checked=checked
            )
            if all(isinstance(a, MomentAccumulator) or a.is_finite for a in found):
                break
        self.meter.flops["Hessians"] += sum(
            accumulator.num_tokens * width**2.0
            for accumulator, width in zip(found, widths, strict=True)
        )
        return found

    @property
    def _sums_first(self) -> bool:
        return self.weights.device.type != "cpu"

    def _sum_batches(
        self,
        root: nn.Module,
        passages: Passages,
        base_passages: Passages | None,
        stage: int,
        groups: Sequence[int],
        widths: Sequence[int],
        *,
        checked: bool,
    ) -> Sequence[Accumulator]:
        found: list[Accumulator] = []
        for width in widths:
            if self.config.needs_check:
                drift = base_passages is not None
                found.append(MomentAccumulator(width, self.weights.device, drift=drift))
            else:
                found.append(HessianAccumulator(width, self.weights.device, checked=checked))
        for batch in range(passages.num_batches):
            base_inputs = None
            if base_passages is not None:
                with self.base_weights(root):
                    base_inputs = base_passages.reach(batch, stage)
            inputs = passages.reach(batch, stage)
            if inputs is not None:
                for index, accumulator in zip(groups, found, strict=True):
                    if isinstance(accumulator, MomentAccumulator):
                        base = None if base_inputs is None else base_inputs[index]()
                        accumulator.update(batch, inputs[index](), base)
                    else:
                        accumulator.update(inputs[index]())
            del inputs, base_inputs
            passages.release(batch)
            if base_passages is not None:
                base_passages.release(batch)
        return found

    def _pool(
        self, passages: Passages, stage: int, num_groups: int, width: int
    ) -> HessianAccumulator:
        """Collect the inputs of all experts of a stage in one Hessian."""
        pool = HessianAccumulator(width, self.weights.device)
        for batch in range(passages.num_batches):
            inputs = passages.reach(batch, stage)
            for index in range(num_groups if inputs is not None else 0):
                pool.update(inputs[index]())  # type: ignore[index]
            del inputs
            passages.release(batch)
        return pool

    def _round(
        self,
        root: nn.Module,
        tasks: list[LinearTask],
        accumulator: Accumulator,
        pool: HessianAccumulator | None,
    ) -> None:
        statistics = _statistics(tasks[0].name, accumulator, pool)
        numbers = sum(task.weight.numel() for task in tasks)
        width = tasks[0].weight.shape[1]
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


def _statistics(name: str, own: Accumulator, pool: HessianAccumulator | None) -> InputStatistics:
    notes = []
    if own.dropped_tokens:
        seen = own.num_tokens + own.dropped_tokens
        if own.num_tokens == 0:
            raise CalibrationError(
                f"Cannot quantize {name}: its inputs are not finite in any of {seen} calibration "
                "tokens. Compute in float32 (--dtype float32), or look for damaged weights in the "
                "blocks before it."
            )
        notes.append(f"{own.dropped_tokens} of {seen} tokens dropped: their inputs are not finite")
    total, num_tokens = own.total(), own.num_tokens
    halves = own.moments() if isinstance(own, MomentAccumulator) else None
    if pool is not None and _is_starved(own) and pool.num_tokens:
        halves = None
        hessian, share = shrink_to_pool(total, num_tokens, pool.total(), pool.num_tokens)
        notes.append(f"{num_tokens} tokens only: {share:.0%} of its Hessian is all experts'")
    else:
        # In place: nobody asks the accumulator again, and a matrix this large counts.
        hessian = total.div_(max(num_tokens, 1))
    return InputStatistics(
        hessian=hessian, num_tokens=num_tokens, halves=halves, notes=tuple(notes)
    )


def _check_finite(name: str, weight: Tensor) -> None:
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise CheckpointError(
            f"Cannot quantize {name}: {int((~finite).sum())} of its {weight.numel()} weights are "
            "not finite. The model's files are damaged; download them again, or leave the module "
            "as it is with --skip."
        )


def _is_starved(accumulator: Accumulator) -> bool:
    return accumulator.num_tokens < FEW_TOKENS_PER_INPUT * accumulator.in_features


def _width(group: InputGroup, tasks: dict[str, LinearTask]) -> int:
    return next(int(tasks[n].weight.shape[1]) for n in group.linears if n in tasks)


def _fused_matrices(root: nn.Module) -> list[str]:
    """Name the modules that still hold matrices in 3-D parameters, declared as experts or not."""
    found = set(find_fused_experts(root))
    for name, module in root.named_modules():
        parameters = module.parameters(recurse=False)
        if not isinstance(module, _ConvNd) and any(p.dim() == 3 for p in parameters):
            found.add(name)
    return sorted(found)


def _routers(block: nn.Module) -> dict[str, str]:
    """Find linears that score the experts beside them: small, and every error misroutes."""
    routers = {}
    for name, experts in block.named_modules():
        if not isinstance(experts, UnfusedExperts):
            continue
        parent = name.rpartition(".")[0]
        for sibling, linear in block.get_submodule(parent).named_children():
            if isinstance(linear, nn.Linear) and linear.out_features == experts.num_experts:
                routers[f"{parent}.{sibling}".lstrip(".")] = "it routes tokens to experts"
    return routers
