"""Collect the input statistics of a stage's linears over all calibration batches.

::

    passes, and those of the base model -> Hessian or moments of each group's input
        -> mixed with a pool over all experts, where few tokens reached one -> means and notes
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
"""An expert with fewer tokens than this times its input width also uses its siblings' inputs."""

Accumulator = HessianAccumulator | MomentAccumulator


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupTasks:
    """The linears to be rounded that share one of a stage's inputs."""

    index: int
    """Position of the group in its stage."""
    tasks: tuple[LinearTask, ...]

    @property
    def width(self) -> int:
        """Width of the input."""
        return int(self.tasks[0].weight.shape[1])


class InputCollector:
    """Runs all batches up to a stage of a block and sums the statistics of its groups' inputs."""

    def __init__(
        self,
        config: QuantConfig,
        device: torch.device,
        passes: ForwardPasses,
        base_passes: ForwardPasses | None,
        base_weights: Callable[[], AbstractContextManager[None]],
        token_weights: TokenWeights | None,
    ) -> None:
        """Set up collection for all stages of a block.

        Args:
            config: Decides which statistics are needed.
            device: Where to sum.
            passes: The batches, on their way through the block.
            base_passes: The same batches in the base model; None if it does not run alongside.
            base_weights: Context manager that puts the base model's weights into the block.
            token_weights: Weights of the tokens; None: all equal.
        """
        self.config = config
        self.device = device
        self.passes = passes
        self.base_passes = base_passes
        self.base_weights = base_weights
        self.token_weights = token_weights

    def collect(
        self, stage: int, groups: Sequence[GroupTasks], *, routed: bool
    ) -> Sequence[Accumulator]:
        """Sum the statistics of some groups over all batches.

        On a GPU the batches are first summed without a check for NaN and infinity, which would
        wait for each of them; only if the sum is not finite are they summed again with it.

        Args:
            stage: Index of the stage.
            groups: Groups of that stage.
            routed: Whether tokens are routed to the groups (experts). Then the tokens cannot be
                matched with those of the base model or with the token weights.

        Returns:
            One accumulator per group.
        """
        base_passes = None if routed else self.base_passes
        sqrt_weights = [None if routed else self._sqrt_weights(group) for group in groups]
        sums: Sequence[Accumulator] = ()
        for checked in (False, True) if self._checks_afterwards else (True,):
            del sums
            sums = self._sum_batches(stage, groups, base_passes, sqrt_weights, checked=checked)
            if all(isinstance(a, MomentAccumulator) or a.is_finite for a in sums):
                break
        return sums

    def pool(self, stage: int, num_groups: int, width: int) -> HessianAccumulator:
        """Sum one Hessian over the inputs of all experts of a stage.

        Args:
            stage: Index of the stage.
            num_groups: Number of experts.
            width: Width of their inputs.

        Returns:
            The sum.
        """
        pool = HessianAccumulator(width, self.device)
        for batch in range(self.passes.num_batches):
            inputs = self.passes.reach(batch, stage)
            for index in range(num_groups if inputs is not None else 0):
                pool.update(inputs[index]())  # type: ignore[index]
            del inputs
            self.passes.release(batch)
        return pool

    @property
    def _checks_afterwards(self) -> bool:
        return self.device.type != "cpu"

    def _sqrt_weights(self, group: GroupTasks) -> list[Tensor] | None:
        """Return the square roots of the token weights of a group, by batch."""
        if self.token_weights is None:
            return None
        return self.token_weights.roots([task.name for task in group.tasks], self.device)

    def _sum_batches(
        self,
        stage: int,
        groups: Sequence[GroupTasks],
        base_passes: ForwardPasses | None,
        sqrt_weights: Sequence[list[Tensor] | None],
        *,
        checked: bool,
    ) -> Sequence[Accumulator]:
        sums: list[Accumulator] = []
        for group in groups:
            if self.config.needs_check:
                drift = base_passes is not None
                sums.append(MomentAccumulator(group.width, self.device, drift=drift))
            else:
                sums.append(HessianAccumulator(group.width, self.device, checked=checked))
        for batch in range(self.passes.num_batches):
            base_inputs = None
            if base_passes is not None:
                with self.base_weights():
                    base_inputs = base_passes.reach(batch, stage)
            inputs = self.passes.reach(batch, stage)
            if inputs is not None:
                for group, accumulator, by_batch in zip(groups, sums, sqrt_weights, strict=True):
                    index = group.index
                    weights = None if by_batch is None else by_batch[batch]
                    if isinstance(accumulator, MomentAccumulator):
                        base = None if base_inputs is None else base_inputs[index]()
                        accumulator.update(batch, inputs[index](), base, weights)
                    else:
                        accumulator.update(inputs[index](), weights)
            del inputs, base_inputs
            self.passes.release(batch)
            if base_passes is not None:
                base_passes.release(batch)
        return sums


def split_by_memory(
    groups: Sequence[GroupTasks], config: QuantConfig, limit_bytes: int
) -> Iterator[list[GroupTasks]]:
    """Split a stage's groups into chunks whose statistics fit in memory.

    Args:
        groups: The groups.
        config: Decides how many matrices are summed per group.
        limit_bytes: Memory for the matrices of a chunk; a single group may exceed it.

    Yields:
        The chunks, in order.
    """
    # Hessians, and drifts with match_base, each for two halves of the text.
    matrices = (4 if config.match_base else 2) if config.needs_check else 1
    chunk: list[GroupTasks] = []
    used_bytes = 0
    for group in groups:
        size_bytes = 4 * group.width**2 * matrices
        if chunk and used_bytes + size_bytes > limit_bytes:
            yield chunk
            chunk, used_bytes = [], 0
        chunk.append(group)
        used_bytes += size_bytes
    if chunk:
        yield chunk


def is_starved(accumulator: Accumulator) -> bool:
    """Return whether an input has too few tokens for a Hessian of its own."""
    return accumulator.num_tokens < FEW_TOKENS_PER_INPUT * accumulator.in_features


def finish_statistics(
    name: str, sums: Accumulator, pool: HessianAccumulator | None, *, shrinkage: float = 0.0
) -> InputStatistics:
    """Turn sums into means, mixed with the pool where an expert got few tokens.

    Args:
        name: A linear with this input, for messages.
        sums: The sums over all batches; consumed, not usable afterwards.
        pool: The Hessian over all experts of the stage, where one has too few tokens.
        shrinkage: Fraction by which the Hessian's off-diagonal entries are reduced; the halves stay
            unchanged.

    Returns:
        The statistics that rounding needs.

    Raises:
        CalibrationError: No token had finite inputs; names the linear.
    """
    notes = []
    if sums.dropped_tokens:
        seen = sums.num_tokens + sums.dropped_tokens
        if sums.num_tokens == 0:
            raise CalibrationError(
                f"Cannot quantize {name}: its inputs are not finite in any of {seen} calibration "
                "tokens. Compute in float32 (--dtype float32), or check the blocks before it for "
                "damaged weights."
            )
        notes.append(f"{sums.dropped_tokens} of {seen} tokens dropped: their inputs are not finite")
    total, num_tokens = sums.total(), sums.num_tokens
    halves = sums.moments() if isinstance(sums, MomentAccumulator) else None
    if pool is not None and is_starved(sums) and pool.num_tokens:
        halves = None
        hessian, share = shrink_to_pool(total, num_tokens, pool.total(), pool.num_tokens)
        notes.append(f"only {num_tokens} tokens: {share:.0%} of its Hessian is that of all experts")
    else:
        # In place: the sum is not needed again, and a second matrix of this size is expensive.
        hessian = total.div_(max(num_tokens, 1))
    shrink_to_diagonal(hessian, shrinkage)
    return InputStatistics(
        hessian=hessian, num_tokens=num_tokens, halves=halves, notes=tuple(notes)
    )
