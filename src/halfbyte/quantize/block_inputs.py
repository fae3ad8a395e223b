"""What reaches the linears of a stage, over all batches -> the statistics that round them.

::

    passages, and the base model's beside -> Hessian or moments of each group's input
        -> where few tokens reached an expert, also a pool of all experts' -> means, with notes
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import CalibrationError
from halfbyte.model.stream import ForwardPasses
from halfbyte.quant_config import QuantConfig
from halfbyte.quantize.hessian import HessianAccumulator, shrink_to_diagonal, shrink_to_pool
from halfbyte.quantize.rounding import InputStatistics, LinearTask
from halfbyte.quantize.target import MomentAccumulator
from halfbyte.quantize.token_weights import TokenWeights

FEW_TOKENS_PER_INPUT = 4
"""An expert that saw fewer than this times its width is helped by its siblings' statistics."""

Accumulator = HessianAccumulator | MomentAccumulator


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTasks:
    """What is to be rounded of the linears that share one of a stage's inputs."""

    index: int
    """Of the group in its stage."""
    tasks: tuple[LinearTask, ...]

    @property
    def width(self) -> int:
        """Width of the input."""
        return int(self.tasks[0].weight.shape[1])


class InputCollector:
    """Takes all batches to a stage of a block and sums what reaches its groups there."""

    def __init__(
        self,
        config: QuantConfig,
        device: torch.device,
        passages: ForwardPasses,
        base_passages: ForwardPasses | None,
        base_weights: Callable[[], AbstractContextManager[None]],
        token_weights: TokenWeights | None,
    ) -> None:
        """Take what all stages of a block share.

        Args:
            config: What the rounding will ask for.
            device: Where to sum.
            passages: The batches, on their way through the block.
            base_passages: The same batches as the base model sees them; None: it runs not beside.
            base_weights: Puts the base model's weights into the block for a while.
            token_weights: What the tokens count; None: all alike.
        """
        self.config = config
        self.device = device
        self.passages = passages
        self.base_passages = base_passages
        self.base_weights = base_weights
        self.token_weights = token_weights

    def collect(
        self, stage: int, groups: Sequence[GroupTasks], *, routed: bool
    ) -> Sequence[Accumulator]:
        """Sum over all batches; on a GPU unchecked at first, for nearly always all is finite.

        Args:
            stage: Which stage.
            groups: Which of its groups.
            routed: Whether tokens are routed to the groups: then nobody knows which they are, in
                the base model or among the weights.

        Returns:
            One accumulator per group.
        """
        base_passages = None if routed else self.base_passages
        roots = [None if routed else self._roots(group) for group in groups]
        found: Sequence[Accumulator] = ()
        for checked in (False, True) if self._sums_first else (True,):
            del found
            found = self._sum_batches(stage, groups, base_passages, roots, checked=checked)
            if all(isinstance(a, MomentAccumulator) or a.is_finite for a in found):
                break
        return found

    def pool(self, stage: int, num_groups: int, width: int) -> HessianAccumulator:
        """Sum the inputs of all experts of a stage in one Hessian.

        Args:
            stage: Which stage.
            num_groups: How many experts it has.
            width: Of their inputs.

        Returns:
            The sum.
        """
        pool = HessianAccumulator(width, self.device)
        for batch in range(self.passages.num_batches):
            inputs = self.passages.reach(batch, stage)
            for index in range(num_groups if inputs is not None else 0):
                pool.update(inputs[index]())  # type: ignore[index]
            del inputs
            self.passages.release(batch)
        return pool

    def _roots(self, group: GroupTasks) -> list[Tensor] | None:
        if self.token_weights is None:
            return None
        return self.token_weights.roots([task.name for task in group.tasks], self.device)

    @property
    def _sums_first(self) -> bool:
        return self.device.type != "cpu"

    def _sum_batches(
        self,
        stage: int,
        groups: Sequence[GroupTasks],
        base_passages: ForwardPasses | None,
        roots: Sequence[list[Tensor] | None],
        *,
        checked: bool,
    ) -> Sequence[Accumulator]:
        found: list[Accumulator] = []
        for group in groups:
            if self.config.needs_check:
                drift = base_passages is not None
                found.append(MomentAccumulator(group.width, self.device, drift=drift))
            else:
                found.append(HessianAccumulator(group.width, self.device, checked=checked))
        for batch in range(self.passages.num_batches):
            base_inputs = None
            if base_passages is not None:
                with self.base_weights():
                    base_inputs = base_passages.reach(batch, stage)
            inputs = self.passages.reach(batch, stage)
            if inputs is not None:
                for group, accumulator, of_group in zip(groups, found, roots, strict=True):
                    index = group.index
                    here = None if of_group is None else of_group[batch]
                    if isinstance(accumulator, MomentAccumulator):
                        base = None if base_inputs is None else base_inputs[index]()
                        accumulator.update(batch, inputs[index](), base, here)
                    else:
                        accumulator.update(inputs[index](), here)
            del inputs, base_inputs
            self.passages.release(batch)
            if base_passages is not None:
                base_passages.release(batch)
        return found


def cut_portions(
    groups: Sequence[GroupTasks], config: QuantConfig, limit_bytes: int
) -> Iterator[list[GroupTasks]]:
    """Split a stage's groups so that what is summed for each portion fits the memory for it.

    Args:
        groups: The groups.
        config: Says how many matrices are summed for each.
        limit_bytes: For the matrices of a portion; one group may exceed it.

    Yields:
        The portions, in order.
    """
    # Hessians and drifts, in two parts.
    matrices = (4 if config.match_base else 2) if config.needs_check else 1
    portion: list[GroupTasks] = []
    used = 0
    for group in groups:
        size = 4 * group.width**2 * matrices
        if portion and used + size > limit_bytes:
            yield portion
            portion, used = [], 0
        portion.append(group)
        used += size
    if portion:
        yield portion


def is_starved(accumulator: Accumulator) -> bool:
    """Whether too few tokens came for a Hessian of its own."""
    return accumulator.num_tokens < FEW_TOKENS_PER_INPUT * accumulator.in_features


def finish_statistics(
    name: str, own: Accumulator, pool: HessianAccumulator | None, *, shrinkage: float = 0.0
) -> InputStatistics:
    """Turn sums into means, mixed with the pool's where few tokens came.

    Args:
        name: Of a linear with this input, for messages.
        own: The sums; not to be used any more.
        pool: Those of all experts of the stage, where one is starved.
        shrinkage: Share taken off the products of different inputs; the halves stay as they are.

    Returns:
        What the rounding asks for.

    Raises:
        CalibrationError: No token's inputs were finite; names the linear.
    """
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
    if pool is not None and is_starved(own) and pool.num_tokens:
        halves = None
        hessian, share = shrink_to_pool(total, num_tokens, pool.total(), pool.num_tokens)
        notes.append(f"{num_tokens} tokens only: {share:.0%} of its Hessian is all experts'")
    else:
        # In place: nobody asks the accumulator again, and a matrix this large counts.
        hessian = total.div_(max(num_tokens, 1))
    shrink_to_diagonal(hessian, shrinkage)
    return InputStatistics(
        hessian=hessian, num_tokens=num_tokens, halves=halves, notes=tuple(notes)
    )
