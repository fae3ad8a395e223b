"""Polishing: improves the codes and scales of a GPTQ sweep by coordinate descent.

A sweep decides each code once, before the later ones are known. Polishing revisits them: scales are
refitted group by group, then every code moves to its best value given all others. Both steps lower
the loss on one Hessian; a row keeps the result only if its loss on a second Hessian, from other
text, does not rise.

Source:
    Coordinate descent on codes: Behdin et al. 2023, "QuantEase", https://arxiv.org/abs/2309.01885.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quantize.columns import Steps, move_columns
from halfbyte.quantize.grid import Grid, round_to_stored

BLOCK_COLUMNS = 128
MAX_SCALE_CHANGE = 2.0
"""A scale that would grow or shrink by more than this factor is not changed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """The result of polishing."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""
    changed: Tensor
    """bool [out]: rows that were improved."""


def polish(
    target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, check: Tensor, *, rounds: int
) -> Polished:
    """Refit scales and move codes repeatedly; keep the rows that other text confirms.

    Args:
        target: The weight to approximate, fp32 [out, in].
        codes: uint8 [out, in].
        grid: Scales and zeros.
        hessian: Mean of x xᵀ over the fitting text, [in, in].
        check: The same over the checking text.
        rounds: Number of rounds.

    Returns:
        Codes and grid, polished in the rows that changed.
    """
    state = _State(target, codes, grid, hessian)
    before, before_check = state.loss(), state.loss_on(check)
    for _ in range(rounds):
        state.refit_scales()
        state.move_codes()
    state.refit_scales()
    changed = (state.loss() < before) & (state.loss_on(check) <= before_check)
    scales = state.scales.t()
    new_codes = (state.steps + state.zeros).t().to(torch.uint8)
    return Polished(
        grid=Grid(
            bits=grid.bits,
            scales=torch.where(changed[:, None], scales, grid.scales),
            zeros=grid.zeros,
            g_idx=grid.g_idx,
        ),
        codes=torch.where(changed[:, None], new_codes, codes),
        changed=changed,
    )


class _State:
    """All tensors transposed, [in, out], so that a column of the weight is contiguous."""

    def __init__(self, target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> None:
        self.hessian = hessian
        self.g_idx = grid.g_idx
        self.members = [
            torch.nonzero(grid.g_idx == group).flatten() for group in range(grid.scales.shape[1])
        ]
        self.scales = grid.scales.t().clone(memory_format=torch.contiguous_format)
        self.group_zeros = grid.zeros.t().contiguous()
        self.zeros = self.group_zeros[grid.g_idx]
        self.max_code = float(2**grid.bits - 1)
        self.steps = codes.t().contiguous().float() - self.zeros
        """Codes minus zeros."""
        self.error = target.t().contiguous() - self.scales[grid.g_idx] * self.steps
        self.gradient = hessian @ self.error

    def loss(self) -> Tensor:
        return (self.error * self.gradient).sum(0)

    def loss_on(self, hessian: Tensor) -> Tensor:
        return (self.error * (hessian @ self.error)).sum(0)

    def refit_scales(self) -> None:
        """Set each group's scale to the best one, given its codes and all other groups."""
        for group, members in enumerate(self.members):
            steps = self.steps[members]
            group_hessian = self.hessian[members][:, members]
            slope = (steps * self.gradient[members]).sum(0)
            curvature = (steps * (group_hessian @ steps)).sum(0)
            old = self.scales[group]
            new = round_to_stored(old + torch.where(curvature > 0, slope / curvature, 0.0))
            ratio = new / old
            accepted = (ratio > 1 / MAX_SCALE_CHANGE) & (ratio < MAX_SCALE_CHANGE)
            new = torch.where(accepted, new, old)
            change = (new - old) * steps
            self.scales[group] = new
            self.error[members] -= change
            self.gradient.addmm_(self.hessian[:, members], change, alpha=-1)

    def move_codes(self) -> None:
        """Move each code, column by column, to its best value given all others."""
        diagonal = self.hessian.diagonal()
        safe = torch.where(diagonal > 0, diagonal, torch.inf)
        groups = self.g_idx.tolist()
        steps = Steps(
            scales=self.scales,
            lowest=-self.group_zeros,
            highest=self.max_code - self.group_zeros,
        )
        for start in range(0, len(groups), BLOCK_COLUMNS):
            block = slice(start, start + BLOCK_COLUMNS)
            moved = move_columns(
                self.gradient[block],
                self.steps[block],
                safe[block],
                self.hessian[block, block].contiguous(),
                steps,
                groups[block],
            )
            self.error[block] -= moved
            self.gradient.addmm_(self.hessian[:, block], moved, alpha=-1)
