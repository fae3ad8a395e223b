"""A block of columns, one after the other: each takes the errors of those before it.

The innermost loops of the sweep and of polishing. Everything is turned round, [columns, rows], so
that one column of the weight is contiguous. On the CPU a column is five operations of torch; on a
GPU, where a launch costs more than the arithmetic, one Triton program walks through the block.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import first_line
from halfbyte.kernels.gpu_device import on_device
from halfbyte.kernels.triton_linear import find_triton_obstacle

PROGRAM_ROWS = 8
"""Output rows of one program: few, so that there are programs for every multiprocessor."""
WIDEST_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """Where codes may lie, counted from the zero: code - zero."""

    scales: Tensor
    """fp32 [groups, rows]."""
    lowest: Tensor
    """fp32 [groups, rows]."""
    highest: Tensor
    """fp32 [groups, rows]."""


def round_columns(
    target: Tensor, plain: Tensor, feedback: Tensor, steps: Steps, groups: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Round each column to its grid, after it took over the errors of those before it.

    Args:
        target: What each column is to come near to, fp32 [columns, rows]; on return with the
            feedback that it took.
        plain: The same before any feedback.
        feedback: fp32 [columns, columns]: what an error of column j adds to column k, at [k, j].
        steps: The grid.
        groups: The group of each column.

    Returns:
        Codes less zeros, and ``plain`` less what they stand for: fp32 [columns, rows] each.
    """
    rounded, errors = torch.empty_like(target), torch.empty_like(target)
    if _by_program(target):
        _run_program(target, plain, rounded, errors, feedback, plain, steps, groups, polish=False)
        return rounded, errors
    scales, lowest, highest = (t.unbind(0) for t in (steps.scales, steps.lowest, steps.highest))
    earlier = errors.t()
    columns = zip(target, plain, errors, rounded, groups, strict=True)
    for k, (column, exact, error, q, group) in enumerate(columns):
        if k:
            torch.addmv(column, earlier[:, :k], feedback[k, :k], out=column)
        torch.div(column, scales[group], out=q).round_()
        q.clamp_(lowest[group], highest[group])
        torch.addcmul(exact, q, scales[group], value=-1, out=error)
    return rounded, errors


def move_columns(
    gradient: Tensor,
    codes: Tensor,
    curvature: Tensor,
    hessian: Tensor,
    steps: Steps,
    groups: Sequence[int],
) -> Tensor:
    """Move each column's codes to their best values, after those before it moved.

    Args:
        gradient: Of half the loss by how far weights fall short, fp32 [columns, rows].
        codes: Codes less zeros, fp32 [columns, rows]; moved in place.
        curvature: fp32 [columns], above 0.
        hessian: fp32 [columns, columns].
        steps: The grid.
        groups: The group of each column.

    Returns:
        How far the weights moved, fp32 [columns, rows].
    """
    moved = torch.zeros_like(gradient)
    if _by_program(gradient):
        values = gradient.clone()
        _run_program(values, values, codes, moved, -hessian, curvature, steps, groups, polish=True)
        return moved
    scales, lowest, highest = (t.unbind(0) for t in (steps.scales, steps.lowest, steps.highest))
    earlier = moved.t()
    for k, group in enumerate(groups):
        slope = gradient[k]
        if k:
            slope = torch.addmv(slope, earlier[:, :k], hessian[k, :k], alpha=-1)
        code = codes[k]
        wanted = (slope / curvature[k]).div_(scales[group]).add_(code).round_()
        wanted.clamp_(lowest[group], highest[group])
        torch.mul(wanted - code, scales[group], out=moved[k])
        code.copy_(wanted)
    return moved


def _by_program(block: Tensor) -> bool:
    return (
        block.device.type != "cpu"
        and block.shape[0] <= WIDEST_BLOCK
        and find_program_obstacle(block.device) is None
    )


@functools.cache
def find_program_obstacle(device: torch.device) -> str | None:
    """Try the program on a device once, against the plain loops, before weights depend on it.

    Args:
        device: Where it is to run.

    Returns:
        Why it is not used there; None: it runs and gives the same codes, but for ties.
    """
    obstacle = find_triton_obstacle()
    if obstacle is not None:
        return obstacle
    dice = torch.Generator().manual_seed(0)
    # Multiples of 16, as in a model: Triton compiles other numbers apart.
    columns, rows = 32, 16
    target = torch.randn(columns, rows, generator=dice)
    feedback = torch.randn(columns, columns, generator=dice).tril(-1) / columns
    scales = torch.rand(columns // 8, rows, generator=dice) / 4 + 0.05
    steps = Steps(scales=scales, lowest=-8 - 0 * scales, highest=7 + 0 * scales)
    groups = [column // 8 for column in range(columns)]
    expected, _ = round_columns(target.clone(), target, feedback, steps, groups)
    there = Steps(
        scales=scales.to(device), lowest=steps.lowest.to(device), highest=steps.highest.to(device)
    )
    found, errors = torch.empty_like(target).to(device), torch.empty_like(target).to(device)
    start = target.to(device)
    try:
        _run_program(
            start.clone(), start, found, errors, feedback.to(device), start, there, groups, False
        )
    except Exception as error:  # noqa: BLE001 - what stops Triton must not stop a run without it
        return f"{type(error).__name__}: {first_line(error)}"
    differing = float((found.cpu() != expected).float().mean())
    return None if differing < 0.01 else f"{differing:.0%} of its codes are others than the loop's"


def _run_program(
    values: Tensor,
    plain: Tensor,
    codes: Tensor,
    errors: Tensor,
    feedback: Tensor,
    divisors: Tensor,
    steps: Steps,
    groups: Sequence[int] | Tensor,
    polish: bool,
) -> None:
    from halfbyte.quantize.column_kernel import column_program

    columns, rows = values.shape
    for tensor in (values, plain, codes, errors):
        assert tensor.is_contiguous()
    with on_device(values.device):
        column_program[(-(-rows // PROGRAM_ROWS),)](
            values,
            plain,
            codes,
            errors,
            feedback.t().contiguous(),
            divisors,
            steps.scales.contiguous(),
            steps.lowest.contiguous(),
            steps.highest.contiguous(),
            torch.as_tensor(groups, dtype=torch.int32, device=values.device),
            columns,
            rows,
            POLISH=polish,
            COLUMNS=WIDEST_BLOCK,
            ROWS=PROGRAM_ROWS,
            num_warps=1,
        )
