"""Search of scales and zeros, and what can be stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.quantize.grid import Grid, assign_groups, min_max_grid, search_grid


def weight(rows: int = 24, columns: int = 96, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * 0.05


def weighted_loss(w: Tensor, grid: Grid, curvature: Tensor) -> Tensor:
    error = w - grid.dequantize(grid.round_to_nearest(w))
    return (error.square() * curvature).sum(1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, -1, 40])
def test_searched_grid_is_never_worse_than_min_max(
    bits: int, symmetric: bool, group_size: int
) -> None:
    w = weight()
    curvature = torch.rand(96, generator=torch.Generator().manual_seed(3)) + 0.1
    g_idx = assign_groups(96, group_size)
    found = search_grid(w, curvature, g_idx, bits=bits, symmetric=symmetric)
    plain = min_max_grid(w, g_idx, bits=bits, symmetric=symmetric)
    ours, theirs = (weighted_loss(w, grid, curvature).sum() for grid in (found, plain))
    assert float(ours) <= float(theirs) * (1.02 if bits == 8 else 1.0)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_grid_can_be_stored(bits: int, symmetric: bool) -> None:
    w = weight()
    w[3, :32] = 0.0
    w[4, :32] = 1e-9
    w[5, :32] = w[5, :32].abs() + 1.0
    w[6, :32] = -w[6, :32].abs() - 1.0
    w[7, 5] = 1e25  # no loss of its group is finite
    g_idx = assign_groups(96, 32)
    for grid in (
        search_grid(w, torch.ones(96), g_idx, bits=bits, symmetric=symmetric),
        min_max_grid(w, g_idx, bits=bits, symmetric=symmetric),
    ):
        assert torch.equal(grid.scales, grid.scales.half().float())
        assert bool((grid.scales.abs() >= 1e-5 * 0.9).all())
        assert torch.equal(grid.zeros, grid.zeros.round())
        if symmetric:
            assert bool((grid.zeros == 2 ** (bits - 1)).all())
        else:
            assert bool((grid.zeros >= 1).all())
            assert bool((grid.zeros <= 2**bits - 1).all())
        zeros = grid.dequantize(grid.round_to_nearest(w))[3, :32]
        assert torch.equal(zeros, torch.zeros(32))


def test_search_matches_trying_every_share_by_hand() -> None:
    """One group, symmetric: no scale among a fine grid of positive and negative ones is better
    than the found one by more than the search's own step allows."""
    w = weight(rows=6, columns=32, seed=4)
    curvature = torch.ones(32)
    grid = search_grid(w, curvature, assign_groups(32, 32), bits=4, symmetric=True)
    found = weighted_loss(w, grid, curvature)
    best = torch.full((6,), float("inf"))
    for share in torch.linspace(0.25, 1.15, 400):
        for sign in (1, -1):
            scale = (w.abs().amax(1) / 8 * share * sign).half().float()[:, None]
            codes = torch.clamp(torch.round(w / scale), -8, 7)
            best = torch.minimum(best, (w - codes * scale).square().sum(1))
    assert bool((found <= best * 1.05).all())


def test_negative_scale_extends_the_positive_range() -> None:
    w = torch.zeros(1, 32)
    w[0, 0], w[0, 1] = 8.0, -7.0
    grid = search_grid(w, torch.ones(32), assign_groups(32, 32), bits=4, symmetric=True)
    assert float(grid.scales) == pytest.approx(-1.0, rel=1e-3)
    assert torch.allclose(grid.dequantize(grid.round_to_nearest(w)), w, atol=1e-2)


def test_groups_follow_an_order_and_the_last_may_be_short() -> None:
    assert assign_groups(5, 2).tolist() == [0, 0, 1, 1, 2]
    assert assign_groups(4, -1).tolist() == [0, 0, 0, 0]
    assert assign_groups(4, 2, torch.tensor([3, 1, 0, 2])).tolist() == [1, 0, 1, 0]


def test_high_curvature_column_gets_the_smaller_error() -> None:
    w = weight(rows=64, columns=32, seed=9)
    curvature = torch.ones(32)
    curvature[7] = 1000.0
    plain = search_grid(w, torch.ones(32), assign_groups(32, 32), bits=3, symmetric=True)
    weighted = search_grid(w, curvature, assign_groups(32, 32), bits=3, symmetric=True)

    def error(grid: Grid) -> float:
        return float((w - grid.dequantize(grid.round_to_nearest(w)))[:, 7].square().sum())

    assert error(weighted) < 0.5 * error(plain)
