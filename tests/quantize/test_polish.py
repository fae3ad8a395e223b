"""Polishing: no worse on the fitting text, kept only if other text confirms, equal to a loop."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quantize.gptq import sweep
from halfbyte.quantize.grid import Grid, assign_groups, search_grid
from halfbyte.quantize.hessian import factorize
from halfbyte.quantize.polish import polish

ROWS, WIDTH = 20, 48


def correlated(seed: int, tokens: int = 300) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(7))
    x = torch.randn(tokens, WIDTH, generator=generator) @ mixing
    return x.t() @ x / tokens


def start(
    *, bits: int, symmetric: bool, group_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor, Grid]:
    weight = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(1))
    factor = factorize(correlated(0), damping=0.01, act_order=True)
    g_idx = assign_groups(WIDTH, group_size)
    grid = search_grid(weight, factor.curvature, g_idx, bits=bits, symmetric=symmetric)
    return weight, sweep(weight, factor, grid).codes, grid


def losses(weight: torch.Tensor, codes: torch.Tensor, grid: Grid, hessian: torch.Tensor):
    error = (weight - grid.dequantize(codes)).double()
    return ((error @ hessian.double()) * error).sum(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_row_gets_worse_on_either_text_and_some_get_better(bits: int, symmetric: bool) -> None:
    weight, codes, grid = start(bits=bits, symmetric=symmetric)
    fit, check = correlated(0), correlated(1, 4000)
    better = polish(weight, codes, grid, fit, check, rounds=2)
    assert int(better.codes.max()) <= 2**bits - 1
    assert torch.equal(better.grid.scales, better.grid.scales.half().float())
    assert torch.equal(better.grid.zeros, grid.zeros)
    for hessian in (fit, check):
        before = losses(weight, codes, grid, hessian)
        after = losses(weight, better.codes, better.grid, hessian)
        assert bool((after <= before * (1 + 1e-4)).all())
    assert int(better.changed.sum()) > 0
    unchanged = ~better.changed
    assert torch.equal(better.codes[unchanged], codes[unchanged])
    assert torch.equal(better.grid.scales[unchanged], grid.scales[unchanged])


def test_rows_that_other_text_does_not_confirm_are_unchanged() -> None:
    weight, codes, grid = start(bits=4, symmetric=True)
    best_there = correlated(0)
    # On white inputs the sweep's answer is worse than plain rounding; moving it further from the
    # weight itself can only hurt.
    better = polish(weight, codes, grid, best_there, torch.eye(WIDTH) * 1e3, rounds=1)
    after = losses(weight, better.codes, better.grid, torch.eye(WIDTH))
    assert bool((after <= losses(weight, codes, grid, torch.eye(WIDTH)) * (1 + 1e-6)).all())
    assert not bool(better.changed.all())


def test_many_rounds_reach_a_local_optimum() -> None:
    weight, codes, grid = start(bits=3, symmetric=False)
    hessian = correlated(0)
    end = polish(weight, codes, grid, hessian, hessian, rounds=15)
    rows = end.changed.nonzero().flatten().tolist()
    assert rows
    left = losses(weight, end.codes, end.grid, hessian)
    for row in rows[:6]:
        for column in range(WIDTH):
            for move in (-1, 1):
                tried = end.codes.clone()
                code = int(tried[row, column]) + move
                if 0 <= code <= 7:
                    tried[row, column] = code
                    moved = losses(weight, tried, end.grid, hessian)[row]
                    # One more refit of the scales came after the last move.
                    assert float(moved) > float(left[row]) * (1 - 2e-3)


def test_scale_refit_is_the_least_squares_scale() -> None:
    """One group per row has a closed form: s = c H w / c H c."""
    weight, codes, grid = start(bits=4, symmetric=True, group_size=-1)
    hessian = correlated(0)
    better = polish(weight, codes, grid, hessian, hessian, rounds=0)
    steps = (codes.float() - grid.column_zeros()).double()
    wide = hessian.double()
    expected = ((steps @ wide) * weight.double()).sum(1) / ((steps @ wide) * steps).sum(1)
    rows = better.changed
    assert bool(rows.any())
    torch.testing.assert_close(
        better.grid.scales[rows, 0].double(), expected[rows], rtol=2**-10, atol=1e-7
    )
