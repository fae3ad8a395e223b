"""Codes and scales of a finished sweep -> nearer ones, kept where other text confirms them.

A sweep decides each code once, before the later ones are known. Polishing goes over them again:
scales are refitted group by group, then every code moves to the best value given all others. Both
steps lower the loss on the Hessian that they are given; a row keeps them only where its loss on a
second Hessian does not rise.

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
LARGEST_CHANGE = 2.0
"""A scale that would grow or shrink by more than this is left as it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Polished:
    """What polishing gave."""

    grid: Grid
    codes: Tensor
    """uint8 [out, in]."""
    changed: Tensor
    """bool [out]: rows that were improved."""


def polish(
    target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, check: Tensor, *, rounds: int
) -> Polished:
    """Refit scales, move codes, refit scales; keep rows that other text confirms.

    Args:
        target: What the rounded weight should come near to, fp32 [out, in].
        codes: uint8 [out, in].
        grid: Scales and zeros.
        hessian: Mean of x xᵀ over the text that decides, [in, in].
        check: The same over other text.
        rounds: How often.

    Returns:
        Codes and grid, row by row the better ones.
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
    """Everything turned round, [in, out], so that one column of the weight is contiguous."""

    def __init__(self, target: Tensor, codes: Tensor, grid: Grid, hessian: Tensor) -> None:
        self.hessian = hessian
        self.g_idx = grid.g_idx
        self.members = [
            torch.nonzero(grid.g_idx == group).flatten() for group in range(grid.scales.shape[1])
        ]
        self.scales = grid.scales.t().clone(memory_format=torch.contiguous_format)
        self.group_zeros = grid.zeros.t().contiguous()
        self.zeros = self.group_zeros[grid.g_idx]
        self.top = float(2**grid.bits - 1)
        self.steps = codes.t().contiguous().float() - self.zeros
        """Codes counted from the zero."""
        self.error = target.t().contiguous() - self.scales[grid.g_idx] * self.steps
        self.gradient = hessian @ self.error

    def loss(self) -> Tensor:
        return (self.error * self.gradient).sum(0)

    def loss_on(self, hessian: Tensor) -> Tensor:
        return (self.error * (hessian @ self.error)).sum(0)

    def refit_scales(self) -> None:
        """Give each group the scale that is best with its codes and all other groups."""
        for group, members in enumerate(self.members):
            steps = self.steps[members]
            own = self.hessian[members][:, members]
            slope = (steps * self.gradient[members]).sum(0)
            bend = (steps * (own @ steps)).sum(0)
            old = self.scales[group]
            new = round_to_stored(old + torch.where(bend > 0, slope / bend, 0.0))
            ratio = new / old
            sound = (ratio > 1 / LARGEST_CHANGE) & (ratio < LARGEST_CHANGE)
            new = torch.where(sound, new, old)
            change = (new - old) * steps
            self.scales[group] = new
            self.error[members] -= change
            self.gradient.addmm_(self.hessian[:, members], change, alpha=-1)

    def move_codes(self) -> None:
        """Move each code, one column after the other, to the best value given all others."""
        diagonal = self.hessian.diagonal()
        safe = torch.where(diagonal > 0, diagonal, torch.inf)
        groups = self.g_idx.tolist()
        steps = Steps(
            scales=self.scales,
            lowest=-self.group_zeros,
            highest=self.top - self.group_zeros,
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
