"""The innermost loops of the sweep and of polishing, over the columns of one block.

All matrices are transposed, [columns, rows], so that one column of the weight is contiguous. On the
CPU each column takes five torch operations; on a GPU, where a launch costs more than the
arithmetic, one Triton kernel processes the whole block.
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
"""Output rows per Triton program: few, so that every multiprocessor has programs to run."""
MAX_BLOCK_COLUMNS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """The allowed range of ``code - zero`` and its scale, per group."""

    scales: Tensor
    """fp32 [groups, rows]."""
    lowest: Tensor
    """fp32 [groups, rows]."""
    highest: Tensor
    """fp32 [groups, rows]."""


def round_columns(
    target: Tensor, plain: Tensor, feedback: Tensor, steps: Steps, groups: Sequence[int] | Tensor
) -> tuple[Tensor, Tensor]:
    """Round each column to its grid, after adding the feedback of the columns before it.

    Args:
        target: Values to round, fp32 [columns, rows]; the feedback is added in place.
        plain: The values before any feedback.
        feedback: fp32 [columns, columns]: the effect of an error in column j on column k at [k, j].
        steps: The grid.
        groups: The group of each column.

    Returns:
        ``code - zero``, and the errors ``plain - scale * (code - zero)``: fp32 [columns, rows].
    """
    rounded, errors = torch.empty_like(target), torch.empty_like(target)
    if _uses_kernel(target):
        _run_kernel(target, plain, rounded, errors, feedback, plain, steps, groups, polish=False)
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
    """Move each column's codes to their best values, given the moves of the columns before it.

    Args:
        gradient: Half the gradient of the loss by ``exact - rounded`` weight, fp32 [columns, rows].
        codes: ``code - zero``, fp32 [columns, rows]; updated in place.
        curvature: fp32 [columns], positive.
        hessian: fp32 [columns, columns].
        steps: The grid.
        groups: The group of each column.

    Returns:
        How far the weights moved, fp32 [columns, rows].
    """
    moved = torch.zeros_like(gradient)
    if _uses_kernel(gradient):
        values = gradient.clone()
        _run_kernel(values, values, codes, moved, -hessian, curvature, steps, groups, polish=True)
        return moved
    scales, lowest, highest = (t.unbind(0) for t in (steps.scales, steps.lowest, steps.highest))
    earlier = moved.t()
    for k, group in enumerate(groups):
        slope = gradient[k]
        if k:
            slope = torch.addmv(slope, earlier[:, :k], hessian[k, :k], alpha=-1)
        code = codes[k]
        best = (slope / curvature[k]).div_(scales[group]).add_(code).round_()
        best.clamp_(lowest[group], highest[group])
        torch.mul(best - code, scales[group], out=moved[k])
        code.copy_(best)
    return moved


def _uses_kernel(block: Tensor) -> bool:
    return (
        block.device.type != "cpu"
        and block.shape[0] <= MAX_BLOCK_COLUMNS
        and find_kernel_obstacle(block.device) is None
    )


@functools.cache
def find_kernel_obstacle(device: torch.device) -> str | None:
    """Compare the Triton kernel on a device with the plain loop, once per process.

    Args:
        device: The device.

    Returns:
        Why the kernel is not used there; None: it runs and gives the same codes, except at ties.
    """
    obstacle = find_triton_obstacle()
    if obstacle is not None:
        return obstacle
    generator = torch.Generator().manual_seed(0)
    # Multiples of 16, as in a model: Triton compiles a separate kernel for other sizes.
    columns, rows = 32, 16
    target = torch.randn(columns, rows, generator=generator)
    feedback = torch.randn(columns, columns, generator=generator).tril(-1) / columns
    scales = torch.rand(columns // 8, rows, generator=generator) / 4 + 0.05
    steps = Steps(scales=scales, lowest=-8 - 0 * scales, highest=7 + 0 * scales)
    groups = [column // 8 for column in range(columns)]
    expected, _ = round_columns(target.clone(), target, feedback, steps, groups)
    device_steps = Steps(
        scales=scales.to(device), lowest=steps.lowest.to(device), highest=steps.highest.to(device)
    )
    found, errors = torch.empty_like(target).to(device), torch.empty_like(target).to(device)
    start = target.to(device)
    feedback = feedback.to(device)
    try:
        _run_kernel(
            start.clone(),
            start,
            found,
            errors,
            feedback,
            start,
            device_steps,
            groups,
            polish=False,
        )
    except Exception as error:  # noqa: BLE001 - a run must not fail because Triton does
        return f"{type(error).__name__}: {first_line(error)}"
    differing = float((found.cpu() != expected).float().mean())
    return None if differing < 0.01 else f"{differing:.0%} of its codes differ from the loop's"


def _run_kernel(
    values: Tensor,
    plain: Tensor,
    codes: Tensor,
    errors: Tensor,
    feedback: Tensor,
    divisors: Tensor,
    steps: Steps,
    groups: Sequence[int] | Tensor,
    *,
    polish: bool,
) -> None:
    from halfbyte.quantize.column_kernel import column_kernel

    columns, rows = values.shape
    for tensor in (values, plain, codes, errors):
        assert tensor.is_contiguous()
    with on_device(values.device):
        column_kernel[(-(-rows // PROGRAM_ROWS),)](
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
            COLUMNS=MAX_BLOCK_COLUMNS,
            ROWS=PROGRAM_ROWS,
            num_warps=1,
        )
