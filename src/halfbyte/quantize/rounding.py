"""One group of linears that share an input: their Hessian -> codes, tensors to write, reports."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from halfbyte.checkpoint.write import pack_linear
from halfbyte.quant_config import QuantConfig, Scheme
from halfbyte.quantize.gptq import Solution, output_loss, solve
from halfbyte.quantize.grid import SMALLEST_SCALE, Grid, assign_groups, round_to_stored, search_grid
from halfbyte.quantize.hessian import Factor, factorize, shrink_to_diagonal
from halfbyte.quantize.polish import polish
from halfbyte.quantize.report import ModuleReport
from halfbyte.quantize.target import Moments, aim

ROWS_AT_A_TIME = 4096
"""Output rows solved together: rows do not depend on each other, and a head has very many."""
DEVICE_NUMBERS = 1 << 26
"""Weights solved together on a GPU, which wants more rows at once where they are short."""
ROWS_MULTIPLE = 1024
CHECKSUM_NUMBERS, DEVICE_CHECKSUM_NUMBERS = 1 << 17, 1 << 24
"""Weights turned to int64 at a time: what a CPU's cache holds; on a GPU, enough to fill it."""
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTask:
    """One linear to be rounded."""

    module: str
    """Name within its block."""
    name: str
    """Full name on disk."""
    weight: Tensor
    """[out, in], in the stored type."""
    bias: Tensor | None
    scheme: Scheme
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundedLinear:
    """A rounded linear."""

    module: str
    """Name within its block."""
    name: str
    """Full name on disk."""
    checksum: int
    """Of the weight, by which a reload is checked: :func:`weight_checksum`."""
    tensors: Mapping[str, Tensor]
    """As they go to disk, by suffix."""
    report: ModuleReport
    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""

    @property
    def weight(self) -> Tensor:
        """What the codes stand for: fp32 [out, in]."""
        return self.grid.dequantize(self.codes)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """What calibration says of one input."""

    hessian: Tensor
    """Mean of x xᵀ: fp32 [in, in]."""
    num_tokens: int
    halves: tuple[Moments, Moments] | None = None
    """The text that proposes and the text that confirms; None where only the whole is known."""
    notes: tuple[str, ...] = ()


def round_group(
    tasks: Sequence[LinearTask], statistics: InputStatistics, config: QuantConfig
) -> list[RoundedLinear]:
    """Round linears that share an input; those of one scheme are solved as one matrix.

    Args:
        tasks: The linears.
        statistics: Of their input.
        config: Damping and order.

    Returns:
        One result per task, in their order.
    """
    start = time.monotonic()
    factor = factorize(
        statistics.hessian,
        damping=config.damping,
        act_order=config.act_order or config.desc_act,
    )
    by_scheme: dict[Scheme, list[LinearTask]] = {}
    for task in tasks:
        by_scheme.setdefault(task.scheme, []).append(task)
    rounded: dict[str, RoundedLinear] = {}
    for scheme, same in by_scheme.items():
        weight = torch.cat([task.weight for task in same]).to(factor.upper.device)
        target, notes = _aim(weight, statistics, config)
        solution = _solve_rows(target, statistics, factor, scheme, config)
        seconds = (time.monotonic() - start) / len(tasks)
        first = 0
        for task in same:
            rows = slice(first, first + task.weight.shape[0])
            first = rows.stop
            part = _take_rows(solution, rows)
            rounded[task.name] = _finish(
                task, part, statistics, factor, seconds, notes, config.polish
            )
    return [rounded[task.name] for task in tasks]


def _aim(
    weight: Tensor, statistics: InputStatistics, config: QuantConfig
) -> tuple[Tensor, tuple[str, ...]]:
    """Shift the weight towards the base model's outputs, where that was asked for and helps."""
    if not config.match_base:
        return weight, ()
    halves = statistics.halves
    if halves is None:
        return weight, ("aimed at its own outputs: too little text to confirm anything else",)
    if any(half.drift is None for half in halves):
        return weight, ("aimed at its own outputs: experts see other tokens in the base model",)
    if not any(bool(half.drift.any()) for half in halves if half.drift is not None):
        return weight, ()  # nothing before it was rounded
    target = aim(weight.float(), *halves, damping=config.damping, shrinkage=config.shrinkage)
    if target.share == 0:
        return weight, ("aimed at its own outputs: the base model's did not help on other text",)
    return target.weight, (f"aimed at the base model's outputs, {target.share:.0%} of the way",)


def rows_at_a_time(device: torch.device, in_features: int) -> int:
    """Give how many output rows are solved together.

    Args:
        device: Where.
        in_features: Width of the rows.

    Returns:
        Rows.
    """
    if device.type == "cpu":
        return ROWS_AT_A_TIME
    return max(DEVICE_NUMBERS // in_features // ROWS_MULTIPLE, 1) * ROWS_MULTIPLE


def _solve_rows(
    weight: Tensor,
    statistics: InputStatistics,
    factor: Factor,
    scheme: Scheme,
    config: QuantConfig,
) -> Solution:
    order = factor.order if config.desc_act else None
    g_idx = assign_groups(weight.shape[1], scheme.group_size, order).to(weight.device)
    parts = []
    for rows in torch.split(weight, rows_at_a_time(weight.device, weight.shape[1])):
        exact = rows.float()
        grid = search_grid(
            exact, factor.curvature, g_idx, bits=scheme.bits, symmetric=scheme.symmetric
        )
        found = solve(exact, statistics.hessian, factor, grid, scheme.symmetric)
        parts.append(_polish(exact, found, statistics, config))
    if len(parts) == 1:
        return parts[0]
    return Solution(
        grid=Grid(
            bits=scheme.bits,
            scales=torch.cat([p.grid.scales for p in parts]),
            zeros=torch.cat([p.grid.zeros for p in parts]),
            g_idx=g_idx,
        ),
        codes=torch.cat([p.codes for p in parts]),
        loss=torch.cat([p.loss for p in parts]),
        size=torch.cat([p.size for p in parts]),
        round_to_nearest_loss=torch.cat([p.round_to_nearest_loss for p in parts]),
        kept_nearest=torch.cat([p.kept_nearest for p in parts]),
        polished=torch.cat([p.polished for p in parts]),
    )


def _polish(
    target: Tensor, found: Solution, statistics: InputStatistics, config: QuantConfig
) -> Solution:
    if not config.polish or statistics.halves is None:
        return found
    fit, check = (half.hessian for half in statistics.halves)
    if config.shrinkage:
        fit = fit.clone()
        shrink_to_diagonal(fit, config.shrinkage)
    better = polish(target, found.codes, found.grid, fit, check, rounds=config.polish)
    error = target - better.grid.dequantize(better.codes)
    return replace(
        found,
        grid=better.grid,
        codes=better.codes,
        loss=torch.where(better.changed, output_loss(error, statistics.hessian), found.loss),
        polished=better.changed,
    )


def _take_rows(solution: Solution, rows: slice) -> Solution:
    return Solution(
        grid=solution.grid.rows(rows),
        codes=solution.codes[rows],
        loss=solution.loss[rows],
        size=solution.size[rows],
        round_to_nearest_loss=solution.round_to_nearest_loss[rows],
        kept_nearest=solution.kept_nearest[rows],
        polished=solution.polished[rows],
    )


def _finish(
    task: LinearTask,
    solution: Solution,
    statistics: InputStatistics,
    factor: Factor,
    seconds: float,
    target_notes: tuple[str, ...],
    rounds: int,
) -> RoundedLinear:
    grid = solution.grid
    size = float(solution.size.sum())
    kept = int(solution.kept_nearest.sum())
    notes = [*task.notes, *statistics.notes, *factor.notes, *target_notes]
    limited = int((grid.scales.abs() >= LARGEST_SCALE).sum())
    if limited:
        notes.append(
            f"{limited} groups need a scale above {LARGEST_SCALE:g}, fp16's largest: their largest "
            "weights are cut"
        )
    smallest = grid.scales.abs() <= round_to_stored(grid.scales.new_tensor(SMALLEST_SCALE))
    if bool(smallest.any()):
        coarse = smallest[:, grid.g_idx] & (task.weight != 0).to(smallest.device)
        notes.append(
            f"{int(coarse.sum())} weights lie in groups of scale {SMALLEST_SCALE:g}, the smallest "
            "there is: those below half of it become zero"
        )
    if rounds:
        polished = int(solution.polished.sum())
        notes.append(f"{polished} of {len(solution.polished)} rows polished")
    if kept:
        notes.append(f"{kept} of {len(solution.kept_nearest)} rows kept at round to nearest")
    return pack_rounded(
        task.module,
        grid,
        solution.codes,
        bias=task.bias,
        report=ModuleReport(
            name=task.name,
            bits=task.scheme.bits,
            group_size=task.scheme.group_size,
            symmetric=task.scheme.symmetric,
            num_tokens=statistics.num_tokens,
            relative_error=float(solution.loss.sum()) / size if size > 0 else None,
            round_to_nearest_error=(
                float(solution.round_to_nearest_loss.sum()) / size if size > 0 else None
            ),
            damping_used=factor.damping,
            notes=tuple(notes),
            seconds=seconds,
        ),
    )


def pack_rounded(
    module: str, grid: Grid, codes: Tensor, *, bias: Tensor | None, report: ModuleReport
) -> RoundedLinear:
    """Make a result out of final codes.

    Args:
        module: Name within its block.
        grid: Scales and zeros.
        codes: uint8 [out, in].
        bias: The linear's.
        report: Has its full name.

    Returns:
        Codes, checksum and tensors for the disk.
    """
    tensors = pack_linear(
        codes, grid.zeros, grid.scales, bits=grid.bits, g_idx=grid.g_idx, bias=bias
    )
    return RoundedLinear(
        module=module,
        name=report.name,
        checksum=weight_checksum(grid.dequantize(codes)),
        tensors=tensors,
        report=report,
        grid=grid,
        codes=codes,
    )


def weight_checksum(weight: Tensor) -> int:
    """Compute a checksum over a weight's fp32 numbers [out, in], on whichever device it lies.

    The bits of every number, times an odd factor of its row and one of its column, summed modulo
    2**64: one number that differs always shows, and several cancel by accident once in 2**60 or so.
    Whole numbers, so the order of summing does not matter.
    """
    rows, columns = weight.shape
    by_row, by_column = (_odd_factors(n, seed) for seed, n in enumerate((rows, columns)))
    by_row, by_column = by_row.to(weight.device), by_column.to(weight.device)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    numbers = CHECKSUM_NUMBERS if weight.device.type == "cpu" else DEVICE_CHECKSUM_NUMBERS
    step = max(numbers // max(columns, 1), 1)
    for start in range(0, rows, step):
        # -0.0 and 0.0 are the same weight.
        bits = (weight[start : start + step].detach().float() + 0.0).view(torch.int32)
        sums = bits.to(torch.int64).mul_(by_column).sum(1)
        total += (sums * by_row[start : start + step]).sum()
    return int(total)


def _odd_factors(count: int, seed: int) -> Tensor:
    """Odd int64 [count], scattered by SplitMix64, the same on every machine."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64))
