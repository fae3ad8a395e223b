"""Weight, Hessian factor, grid -> codes. Tensors in, tensors out.

Columns are rounded one after the other, each after the errors of all columns before it were moved
onto it. Left-looking and blocked: a block of columns first takes over all earlier errors in one
matrix product, then settles its own.

Source:
    Frantar et al. 2023, "GPTQ", Algorithm 1, https://arxiv.org/abs/2210.17323, in the form that
    uses the factor of H itself; it gives the same codes as the form that inverts H.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quantize.grid import Grid, min_max_grid
from halfbyte.quantize.hessian import Factor

BLOCK_COLUMNS = 128


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
    kept_nearest: Tensor
    """bool [out]: rows where rounding to nearest was better and was kept."""


def sweep(
    weight: Tensor, factor: Factor, grid: Grid, *, block_columns: int = BLOCK_COLUMNS
) -> Tensor:
    """Round a weight matrix to its grid, moving each column's error onto the columns after it.

    Args:
        weight: fp32 [out, in]; left unchanged.
        factor: Of the layer's Hessian.
        grid: Scale and zero per group, fixed before rounding.
        block_columns: Columns settled together. Changes speed, not the result.

    Returns:
        Codes, uint8 [out, in], in the same column order as `weight`.
    """
    order, upper = factor.order, factor.upper
    in_features = upper.shape[0]
    # Columns become rows, so that every step below works on contiguous memory.
    wanted = weight.t()[order].contiguous()
    scales = grid.scales.t().contiguous()
    zeros = grid.zeros.t().contiguous()
    groups = grid.g_idx[order].tolist()
    feedback = upper / upper.diagonal()
    errors = torch.empty_like(wanted)
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=weight.device)
    top = float(2**grid.bits - 1)
    for start in range(0, in_features, block_columns):
        end = min(start + block_columns, in_features)
        block = wanted[start:end].clone()
        if start:
            block.addmm_(feedback[:start, start:end].t(), errors[:start])
        own = errors[start:end]
        inner = feedback[start:end, start:end].contiguous()
        for k in range(end - start):
            column, group = block[k], groups[start + k]
            if k:
                column = torch.addmv(column, own[:k].t(), inner[:k, k])
            scale, zero = scales[group], zeros[group]
            code = torch.div(column, scale).round_().add_(zero).clamp_(0.0, top)
            codes[start + k] = code
            torch.addcmul(wanted[start + k], code.sub_(zero), scale, value=-1, out=own[k])
    result = torch.empty_like(codes)
    result[order] = codes
    return result.t().contiguous()


def solve(weight: Tensor, hessian: Tensor, factor: Factor, grid: Grid, symmetric: bool) -> Solution:
    """Sweep, then keep round to nearest for the rows where it is better after all.

    Args:
        weight: fp32 [out, in].
        hessian: Mean of x xᵀ, undamped, [in, in]; losses are measured on it.
        factor: Its damped factor.
        grid: The searched grid.
        symmetric: The kind of grid, for the plain one that is compared with.

    Returns:
        The better of both, row by row: never above round to nearest's loss.
    """
    plain = min_max_grid(weight, grid.g_idx, bits=grid.bits, symmetric=symmetric)
    plain_codes = plain.round_to_nearest(weight)
    plain_loss = output_loss(weight - plain.dequantize(plain_codes), hessian)
    codes = sweep(weight, factor, grid)
    loss = output_loss(weight - grid.dequantize(codes), hessian)
    nearest = grid.round_to_nearest(weight)
    nearest_loss = output_loss(weight - grid.dequantize(nearest), hessian)
    better = nearest_loss < loss
    codes = torch.where(better[:, None], nearest, codes)
    loss = torch.minimum(loss, nearest_loss)
    plainer = plain_loss < loss
    grid = Grid(
        bits=grid.bits,
        scales=torch.where(plainer[:, None], plain.scales, grid.scales),
        zeros=torch.where(plainer[:, None], plain.zeros, grid.zeros),
        g_idx=grid.g_idx,
    )
    return Solution(
        grid=grid,
        codes=torch.where(plainer[:, None], plain_codes, codes),
        loss=torch.minimum(loss, plain_loss),
        round_to_nearest_loss=plain_loss,
        kept_nearest=better | plainer,
    )


def output_loss(error: Tensor, hessian: Tensor) -> Tensor:
    """Compute e H eᵀ for every row e: the mean squared output error per output [out]."""
    return (error @ hessian).mul_(error).sum(1)
