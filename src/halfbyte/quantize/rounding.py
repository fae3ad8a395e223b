"""Rounds a group of linears that share an input: Hessian -> codes, tensors to write, reports."""

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
from halfbyte.quantize.target import Moments, compute_target

ROWS_AT_A_TIME = 4096
"""Output rows solved together on a CPU. Rows are independent; a head would have too many."""
DEVICE_NUMBERS = 1 << 26
"""Weights solved together on a GPU; the shorter the rows, the more of them."""
ROWS_MULTIPLE = 1024
CHECKSUM_NUMBERS, DEVICE_CHECKSUM_NUMBERS = 1 << 17, 1 << 24
"""Weights converted to int64 at a time: what fits a CPU's cache; enough to occupy a GPU."""
LARGEST_SCALE = torch.finfo(torch.float16).max


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearTask:
    """One linear to be rounded."""

    module: str
    """Name within its block."""
    name: str
    """Full name on disk."""
    weight: Tensor
    """[out, in], in the stored dtype."""
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
    """Checksum of the dequantized weight for the reload check: :func:`weight_checksum`."""
    tensors: Mapping[str, Tensor]
    """Tensors to be written to disk, by suffix."""
    report: ModuleReport
    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""

    @property
    def weight(self) -> Tensor:
        """The dequantized weight: fp32 [out, in]."""
        return self.grid.dequantize(self.codes)


@dataclass(frozen=True, slots=True, kw_only=True)
class InputStatistics:
    """Calibration statistics of one input."""

    hessian: Tensor
    """Mean of x xᵀ: fp32 [in, in]."""
    num_tokens: int
    halves: tuple[Moments, Moments] | None = None
    """Moments for fitting and for checking; None if only the total is known."""
    notes: tuple[str, ...] = ()


def round_group(
    tasks: Sequence[LinearTask], statistics: InputStatistics, config: QuantConfig
) -> list[RoundedLinear]:
    """Round linears that share an input; those of the same scheme are solved as one matrix.

    Args:
        tasks: The linears.
        statistics: Statistics of their input.
        config: Damping, column order, target and polishing.

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
        target, notes = _choose_target(weight, statistics, config)
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


def _choose_target(
    weight: Tensor, statistics: InputStatistics, config: QuantConfig
) -> tuple[Tensor, tuple[str, ...]]:
    """Shift the weight toward the base model's outputs, if this is enabled and helps."""
    if not config.match_base:
        return weight, ()
    halves = statistics.halves
    if halves is None:
        return weight, ("targets its own outputs: too little text to confirm another target",)
    if any(half.drift is None for half in halves):
        return weight, ("targets its own outputs: experts see other tokens in the base model",)
    if not any(bool(half.drift.any()) for half in halves if half.drift is not None):
        return weight, ()  # no layer before it is quantized
    target = compute_target(
        weight.float(), *halves, damping=config.damping, shrinkage=config.shrinkage
    )
    if target.share == 0:
        return weight, ("targets its own outputs: the base model's did not help on other text",)
    return target.weight, (f"targets the base model's outputs, {target.share:.0%} of the way",)


def rows_at_a_time(device: torch.device, in_features: int) -> int:
    """Return how many output rows are solved together.

    Args:
        device: The device.
        in_features: Width of the rows.

    Returns:
        Number of rows.
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
        rows = rows.float()
        grid = search_grid(
            rows, factor.curvature, g_idx, bits=scheme.bits, symmetric=scheme.symmetric
        )
        solution = solve(rows, statistics.hessian, factor, grid, scheme.symmetric)
        parts.append(_polish(rows, solution, statistics, config))
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
    target: Tensor, solution: Solution, statistics: InputStatistics, config: QuantConfig
) -> Solution:
    if not config.polish or statistics.halves is None:
        return solution
    fit, check = (half.hessian for half in statistics.halves)
    if config.shrinkage:
        fit = fit.clone()
        shrink_to_diagonal(fit, config.shrinkage)
    polished = polish(target, solution.codes, solution.grid, fit, check, rounds=config.polish)
    error = target - polished.grid.dequantize(polished.codes)
    return replace(
        solution,
        grid=polished.grid,
        codes=polished.codes,
        loss=torch.where(polished.changed, output_loss(error, statistics.hessian), solution.loss),
        polished=polished.changed,
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
    size = float(solution.size.sum())
    notes = [*task.notes, *statistics.notes, *factor.notes, *target_notes]
    notes += _make_notes(task, solution, rounds)
    return pack_rounded(
        task.module,
        solution.grid,
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


def _make_notes(task: LinearTask, solution: Solution, rounds: int) -> list[str]:
    """Describe clipping, underflow, polishing and rows that stayed at round-to-nearest."""
    grid, notes = solution.grid, []
    clipped = int((grid.scales.abs() >= LARGEST_SCALE).sum())
    if clipped:
        notes.append(
            f"{clipped} groups need a scale above {LARGEST_SCALE:g}, fp16's largest: their largest "
            "weights are clipped"
        )
    at_minimum = grid.scales.abs() <= round_to_stored(grid.scales.new_tensor(SMALLEST_SCALE))
    if bool(at_minimum.any()):
        coarse = at_minimum[:, grid.g_idx] & (task.weight != 0).to(at_minimum.device)
        notes.append(
            f"{int(coarse.sum())} weights are in groups with the smallest possible scale, "
            f"{SMALLEST_SCALE:g}: those below half of it become zero"
        )
    if rounds:
        polished = int(solution.polished.sum())
        notes.append(f"{polished} of {len(solution.polished)} rows polished")
    kept = int(solution.kept_nearest.sum())
    if kept:
        notes.append(f"{kept} of {len(solution.kept_nearest)} rows kept at round-to-nearest")
    return notes


def pack_rounded(
    module: str, grid: Grid, codes: Tensor, *, bias: Tensor | None, report: ModuleReport
) -> RoundedLinear:
    """Build the result of a linear from its final codes.

    Args:
        module: Name within its block.
        grid: Scales and zeros.
        codes: uint8 [out, in].
        bias: The linear's bias, or None.
        report: The linear's report, with its full name.

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
    """Compute a checksum of a weight's fp32 elements [out, in], on the weight's device.

    The bit pattern of every element, times an odd factor of its row and one of its column, is
    summed modulo 2**64. A single differing element is always detected; several cancel with a
    probability of about 2**-60. Integer sums do not depend on the order of summation.
    """
    rows, columns = weight.shape
    by_row, by_column = (_odd_factors(n, seed) for seed, n in enumerate((rows, columns)))
    by_row, by_column = by_row.to(weight.device), by_column.to(weight.device)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    elements_at_once = CHECKSUM_NUMBERS if weight.device.type == "cpu" else DEVICE_CHECKSUM_NUMBERS
    step = max(elements_at_once // max(columns, 1), 1)
    for start in range(0, rows, step):
        # Adding 0.0 turns -0.0 into 0.0, which is the same weight.
        bits = (weight[start : start + step].detach().float() + 0.0).view(torch.int32)
        sums = bits.to(torch.int64).mul_(by_column).sum(1)
        total += (sums * by_row[start : start + step]).sum()
    return int(total)


def _odd_factors(count: int, seed: int) -> Tensor:
    """Return odd pseudorandom int64 [count] from SplitMix64, the same on every machine."""
    z = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(seed) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return torch.from_numpy(((z ^ (z >> np.uint64(31))) | np.uint64(1)).view(np.int64))
