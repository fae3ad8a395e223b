"""The GPTQ solver: weight, Hessian factor and grid to codes. Tensors in, tensors out.

Columns are rounded one by one, each after the errors of all earlier columns were added to it. The
implementation is left-looking and blocked: the errors of all earlier blocks are added to a block of
columns in one matrix product, then its own columns are rounded in a loop. On a GPU, where the
product for one block is too narrow to be efficient, the errors from before a stretch of several
blocks are added to the whole stretch at once.

Source:
    Frantar et al. 2023, "GPTQ", Algorithm 1, https://arxiv.org/abs/2210.17323, in the form that
    uses the factor of H itself; it gives the same codes as the form that inverts H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.machine.arithmetic import fast_copy
from halfbyte.quantize.columns import Steps, round_columns
from halfbyte.quantize.grid import Grid, min_max_grid
from halfbyte.quantize.hessian import Factor

BLOCK_COLUMNS = 128
DEVICE_STRETCH_COLUMNS = 1024
CLOSE_RATIO = 1.1
"""Losses within this ratio are computed exactly before they are compared: the error of products in
bf16 is up to 1%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A rounded weight and its loss on the calibration Hessian."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in], columns in stored order."""
    loss: Tensor
    """Squared output error per output row, mean over tokens: the diagonal of E H Eᵀ. [out]"""
    round_to_nearest_loss: Tensor
    """The loss of round-to-nearest on the min-max grid. [out]"""
    size: Tensor
    """Mean squared output per row, for relative losses. [out]"""
    kept_nearest: Tensor
    """bool [out]: rows that use round-to-nearest because its loss is smaller."""
    polished: Tensor
    """bool [out]: rows that polishing improved after the sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """The result of a sweep over the columns."""

    codes: Tensor
    """uint8 [out, in], columns in stored order."""
    damped_loss: Tensor
    """e (H + damping) eᵀ for every row's error e, a by-product of the sweep. [out]"""
    squared_error: Tensor
    """e eᵀ of every row. [out]"""


def sweep(
    weight: Tensor,
    factor: Factor,
    grid: Grid,
    *,
    block_columns: int = BLOCK_COLUMNS,
    stretch_columns: int | None = None,
) -> Sweep:
    """Round a weight matrix to its grid, moving each column's error onto the columns after it.

    Args:
        weight: fp32 [out, in]; left unchanged.
        factor: Factor of the layer's Hessian.
        grid: Scale and zero per group, fixed before rounding.
        block_columns: Columns per block. Changes speed, not the result.
        stretch_columns: Columns per stretch, a multiple of ``block_columns``; None: chosen by
            device.

    Returns:
        The codes and their loss.
    """
    if stretch_columns is None:
        stretch_columns = block_columns if weight.device.type == "cpu" else DEVICE_STRETCH_COLUMNS
    order, upper = factor.order, factor.upper
    in_features = upper.shape[0]
    # Transposed, so that every step below works on contiguous memory.
    exact = weight.t()[order].contiguous()
    groups = grid.g_idx[order].int()
    if weight.device.type == "cpu":
        groups = groups.tolist()  # type: ignore[assignment]
    # Rounding works on steps from the zero, code - zero, in [-zero, 2**bits - 1 - zero].
    steps = Steps(
        scales=grid.scales.t().contiguous(),
        lowest=(-grid.zeros.t()).contiguous(),
        highest=(2**grid.bits - 1 - grid.zeros.t()).contiguous(),
    )
    roots = upper.diagonal()
    feedback = upper / roots
    errors = torch.empty_like(exact)
    codes = torch.empty(exact.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros_like(exact[0])
    for start in range(0, in_features, block_columns):
        end = min(start + block_columns, in_features)
        first = start // stretch_columns * stretch_columns
        if start == first:
            last = min(first + stretch_columns, in_features)
            stretch = exact[first:last].clone()
            if first:
                stretch.addmm_(feedback[:first, first:last].t(), errors[:first])
        target = stretch[start - first : end - first]
        if start > first:
            target.addmm_(feedback[first:start, start:end].t(), errors[first:start])
        inner = feedback[start:end, start:end].t().contiguous()
        rounded, error = round_columns(target, exact[start:end], inner, steps, groups[start:end])
        errors[start:end] = error
        zeros = grid.zeros.t()[grid.g_idx[order[start:end]]]
        codes[start:end] = rounded.add_(zeros)
        # The distance of each column's rounded value to its target, feedback included.
        residual = target.sub_(exact[start:end]).add_(error)
        loss += residual.mul_(roots[start:end, None]).square_().sum(0)
    result = torch.empty_like(codes)
    result[order] = codes
    return Sweep(
        codes=result.t().contiguous(), damped_loss=loss, squared_error=errors.square_().sum(0)
    )


def solve(weight: Tensor, hessian: Tensor, factor: Factor, grid: Grid, symmetric: bool) -> Solution:
    """Sweep, but use round-to-nearest for the rows where its loss is smaller.

    Args:
        weight: fp32 [out, in].
        hessian: Mean of x xᵀ, undamped, [in, in]; losses are computed with it.
        factor: Its damped factor.
        grid: The searched grid.
        symmetric: Whether grids are symmetric, for the min-max grid of round-to-nearest.

    Returns:
        The better of both for each row, so that no row's loss exceeds that of round-to-nearest.
    """
    swept = sweep(weight, factor, grid)
    if factor.added is None:
        loss = output_loss(weight - grid.dequantize(swept.codes), hessian)
    else:
        loss = (swept.damped_loss - factor.added * swept.squared_error).clamp_(min=0)
    plain = min_max_grid(weight, grid.g_idx, bits=grid.bits, symmetric=symmetric)
    plain_codes = plain.round_to_nearest(weight)
    fast_hessian = fast_copy(hessian)
    plain_loss = output_loss(weight - plain.dequantize(plain_codes), fast_hessian)
    close = torch.nonzero(plain_loss < CLOSE_RATIO * loss).flatten()
    better = torch.zeros_like(loss, dtype=torch.bool)
    if close.numel():
        # For these rows both losses are too inexact to compare: one is a product in low precision,
        # the other had the damping subtracted.
        exact = weight[close]
        for codes, used_grid, losses in (
            (plain_codes, plain, plain_loss),
            (swept.codes, grid, loss),
        ):
            error = exact - used_grid.rows(close).dequantize(codes[close])
            losses[close] = output_loss(error, hessian)
        better[close] = plain_loss[close] < loss[close]
    return Solution(
        grid=Grid(
            bits=grid.bits,
            scales=torch.where(better[:, None], plain.scales, grid.scales),
            zeros=torch.where(better[:, None], plain.zeros, grid.zeros),
            g_idx=grid.g_idx,
        ),
        codes=torch.where(better[:, None], plain_codes, swept.codes),
        loss=torch.where(better, plain_loss, loss),
        size=output_loss(weight, fast_hessian),
        round_to_nearest_loss=plain_loss,
        kept_nearest=better,
        polished=torch.zeros_like(better),
    )


def output_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """Compute e H eᵀ for every row e: the mean squared output error per output [out].

    Args:
        error: fp32 [out, in].
        hessian: [in, in]; its dtype is that of the product.

    Returns:
        fp32 [out].
    """
    product = error.to(hessian.dtype) @ hessian
    return product.float().mul_(error).sum(1).clamp_(min=0)
