"""Weight, Hessian factor, grid -> codes. Tensors in, tensors out.

Columns are rounded one after the other, each after the errors of all columns before it were moved
onto it. Left-looking and blocked: a block of columns first takes over all earlier errors in one
matrix product, then settles its own. On a GPU, where a block is too narrow a product to fill it, a
stretch of blocks takes over what lies before the stretch.

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
DEVICE_STRETCH = 1024
CLOSE = 1.1
"""Rows whose two losses are nearer than this are compared exactly; bf16 products are within 1%."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """A rounded weight and what it cost on the calibration Hessian."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in], columns in stored order."""
    loss: Tensor
    """Squared output error per output row, mean over tokens: tr(E H Eᵀ) by rows. [out]"""
    round_to_nearest_loss: Tensor
    """The same for plain round to nearest on the min-max grid. [out]"""
    size: Tensor
    """Mean squared output per row, to which a loss is relative. [out]"""
    kept_nearest: Tensor
    """bool [out]: rows where rounding to nearest was better and was kept."""
    polished: Tensor
    """bool [out]: rows that were improved after the sweep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What a sweep over the columns gives."""

    codes: Tensor
    """uint8 [out, in], columns in stored order."""
    damped_loss: Tensor
    """e (H + damping) eᵀ of every row's error e; it falls out of the sweep. [out]"""
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
        factor: Of the layer's Hessian.
        grid: Scale and zero per group, fixed before rounding.
        block_columns: Columns settled together. Changes speed, not the result.
        stretch_columns: Columns that take over the errors before them together, a multiple of
            ``block_columns``; None: what suits the device.

    Returns:
        The codes, and what they cost.
    """
    if stretch_columns is None:
        stretch_columns = block_columns if weight.device.type == "cpu" else DEVICE_STRETCH
    order, upper = factor.order, factor.upper
    in_features = upper.shape[0]
    # Columns become rows, so that every step below works on contiguous memory.
    wanted = weight.t()[order].contiguous()
    groups = grid.g_idx[order].int()
    if weight.device.type == "cpu":
        groups = groups.tolist()  # type: ignore[assignment]
    # Codes count from the zero while they are rounded: q = code - zero, in [-zero, top - zero].
    steps = Steps(
        scales=grid.scales.t().contiguous(),
        lowest=(-grid.zeros.t()).contiguous(),
        highest=(2**grid.bits - 1 - grid.zeros.t()).contiguous(),
    )
    roots = upper.diagonal()
    feedback = upper / roots
    errors = torch.empty_like(wanted)
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=weight.device)
    loss = torch.zeros_like(wanted[0])
    for start in range(0, in_features, block_columns):
        end = min(start + block_columns, in_features)
        first = start // stretch_columns * stretch_columns
        if start == first:
            last = min(first + stretch_columns, in_features)
            stretch = wanted[first:last].clone()
            if first:
                stretch.addmm_(feedback[:first, first:last].t(), errors[:first])
        target = stretch[start - first : end - first]
        if start > first:
            target.addmm_(feedback[first:start, start:end].t(), errors[first:start])
        inner = feedback[start:end, start:end].t().contiguous()
        rounded, own = round_columns(target, wanted[start:end], inner, steps, groups[start:end])
        errors[start:end] = own
        zeros = grid.zeros.t()[grid.g_idx[order[start:end]]]
        codes[start:end] = rounded.add_(zeros)
        # What is left of each column's target: its error, less what earlier columns made it take.
        left = target.sub_(wanted[start:end]).add_(own)
        loss += left.mul_(roots[start:end, None]).square_().sum(0)
    result = torch.empty_like(codes)
    result[order] = codes
    return Sweep(
        codes=result.t().contiguous(), damped_loss=loss, squared_error=errors.square_().sum(0)
    )


def solve(weight: Tensor, hessian: Tensor, factor: Factor, grid: Grid, symmetric: bool) -> Solution:
    """Sweep, then keep plain round to nearest for the rows where it is better after all.

    Args:
        weight: fp32 [out, in].
        hessian: Mean of x xᵀ, undamped, [in, in]; losses are measured on it.
        factor: Its damped factor.
        grid: The searched grid.
        symmetric: The kind of grid, for the plain one that is compared with.

    Returns:
        The better of both, row by row: never above round to nearest's loss.
    """
    swept = sweep(weight, factor, grid)
    loss = (swept.damped_loss - factor.added * swept.squared_error).clamp_(min=0)
    plain = min_max_grid(weight, grid.g_idx, bits=grid.bits, symmetric=symmetric)
    plain_codes = plain.round_to_nearest(weight)
    rough = fast_copy(hessian)
    plain_loss = output_loss(weight - plain.dequantize(plain_codes), rough)
    close = torch.nonzero(plain_loss < CLOSE * loss).flatten()
    better = torch.zeros_like(loss, dtype=torch.bool)
    if close.numel():
        # The rough product, and the damping taken off again, cannot decide these rows.
        wanted = weight[close]
        for codes, found, into in (
            (plain_codes, plain, plain_loss),
            (swept.codes, grid, loss),
        ):
            into[close] = output_loss(wanted - found.rows(close).dequantize(codes[close]), hessian)
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
        size=output_loss(weight, rough),
        round_to_nearest_loss=plain_loss,
        kept_nearest=better,
        polished=torch.zeros_like(better),
    )


def output_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """Compute e H eᵀ for every row e: the mean squared output error per output [out].

    Args:
        error: fp32 [out, in].
        hessian: [in, in]; the product is taken in its type.

    Returns:
        fp32 [out].
    """
    product = error.to(hessian.dtype) @ hessian
    return product.float().mul_(error).sum(1).clamp_(min=0)
