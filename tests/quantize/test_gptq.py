"""The solver equals a plain loop, moves each error once, and is never worse than rounding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from halfbyte.quantize.gptq import output_loss, solve, sweep
from halfbyte.quantize.grid import Grid, assign_groups, min_max_grid, search_grid
from halfbyte.quantize.hessian import Factor, factorize, shrink_to_diagonal


def layer(rows: int, columns: int, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(tokens, columns, generator=generator) @ (mixing + torch.eye(columns))
    w = torch.randn(rows, columns, generator=generator) * 0.1
    return w, x.t() @ x / tokens


def naive_gptq(w: Tensor, damped: Tensor, order: Tensor, grid: Grid) -> Tensor:
    """The paper's own form in float64: one column at a time, with the inverse, every later column
    updated at once."""
    w = w.double().clone()[:, order]
    inverse = torch.linalg.inv(damped.double()[order][:, order])
    upper = torch.linalg.cholesky(inverse, upper=True)
    scales = grid.column_scales().double()[:, order]
    zeros = grid.column_zeros().double()[:, order]
    codes = torch.empty_like(w)
    for k in range(w.shape[1]):
        code = torch.clamp(torch.round(w[:, k] / scales[:, k]) + zeros[:, k], 0, 2**grid.bits - 1)
        codes[:, k] = code
        error = (w[:, k] - scales[:, k] * (code - zeros[:, k])) / upper[k, k]
        w[:, k:] -= error[:, None] * upper[k, k:][None]
    result = torch.empty_like(codes)
    result[:, order] = codes
    return result.to(torch.uint8)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group_size", "block"),
    [(96, 32, 128), (160, 64, 32), (160, 32, 64), (90, 32, 40), (96, -1, 7)],
)
@pytest.mark.parametrize("desc_act", [False, True])
def test_sweep_equals_the_naive_loop(
    bits: int, symmetric: bool, columns: int, group_size: int, block: int, desc_act: bool
) -> None:
    w, hessian = layer(20, columns)
    factor = factorize(hessian, damping=0.01, act_order=True)
    g_idx = assign_groups(columns, group_size, factor.order if desc_act else None)
    grid = search_grid(w, factor.curvature, g_idx, bits=bits, symmetric=symmetric)
    found = sweep(w, factor, grid, block_columns=block).codes
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    expected = naive_gptq(w, damped, factor.order, grid)
    differing = int((found != expected).sum())
    # A tie within fp32 rounding may fall the other way, and moves what follows in its row.
    assert differing <= found.numel() * (0.03 if bits == 8 else 0.005)
    assert int((found.int() - expected.int()).abs().max()) <= 1


@pytest.mark.parametrize("stretch", [32, 64, 96, 1024])
def test_stretches_of_blocks_give_the_same_codes(stretch: int) -> None:
    w, hessian = layer(40, 208)
    factor = factorize(hessian, damping=0.01, act_order=True)
    grid = search_grid(w, factor.curvature, assign_groups(208, 16), bits=4, symmetric=True)
    plain = sweep(w, factor, grid, block_columns=32)
    found = sweep(w, factor, grid, block_columns=32, stretch_columns=stretch)
    same = (found.codes == plain.codes).all(1)
    # A tie within fp32 rounding may fall the other way, and moves what follows in its row.
    assert float(same.float().mean()) > 0.9
    torch.testing.assert_close(found.damped_loss[same], plain.damped_loss[same])


def test_identity_hessian_gives_round_to_nearest() -> None:
    w, _ = layer(16, 64)
    factor = factorize(torch.eye(64), damping=0.01, act_order=True)
    grid = search_grid(w, factor.curvature, assign_groups(64, 32), bits=4, symmetric=True)
    assert torch.equal(sweep(w, factor, grid).codes, grid.round_to_nearest(w))


def test_error_of_each_column_reaches_each_later_column_once() -> None:
    """A grid so coarse that only column k is off: what the later columns are rounded from must be
    the weight plus that one error times the feedback coefficient."""
    columns, k = 12, 4
    upper = torch.eye(columns)
    upper[k, k + 1 :] = 0.5
    factor = Factor(order=torch.arange(columns), upper=upper, damping=0.0, added=0.0, notes=())
    w = torch.zeros(1, columns)
    w[0, k] = 0.4
    ones = torch.ones(1, 1)
    # Column k rounds to 0 and leaves 0.4; its coefficient for each later column is 0.5.
    fine = Grid(
        bits=8,
        scales=torch.cat([ones, ones * 0.1], 1),
        zeros=torch.full((1, 2), 128.0),
        g_idx=(torch.arange(columns) > k).long(),
    )
    for block in (1, 3, 5, 128):
        codes = sweep(w, factor, fine, block_columns=block).codes
        assert codes[0, : k + 1].tolist() == [128] * (k + 1)
        assert codes[0, k + 1 :].tolist() == [130] * (columns - k - 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_loss_is_never_above_round_to_nearest(bits: int, symmetric: bool, seed: int) -> None:
    # With few tokens, the damped Hessian of the sweep is far from the undamped one of the loss.
    w, hessian = layer(32, 64, seed=seed, tokens=8)
    factor = factorize(hessian, damping=0.3, act_order=True)
    g_idx = assign_groups(64, 32)
    grid = search_grid(w, factor.curvature, g_idx, bits=bits, symmetric=symmetric)
    solution = solve(w, hessian, factor, grid, symmetric)
    error = (w - solution.grid.dequantize(solution.codes)).double()
    loss = ((error @ hessian.double()) * error).sum(1)
    torch.testing.assert_close(solution.loss.double(), loss, rtol=2e-3, atol=2e-6)
    plain = min_max_grid(w, g_idx, bits=bits, symmetric=symmetric)
    nearest = output_loss(w - plain.dequantize(plain.round_to_nearest(w)), hessian)
    assert bool((solution.loss <= nearest * 1.0001 + 1e-9).all())
    torch.testing.assert_close(solution.round_to_nearest_loss, nearest, rtol=0.02, atol=1e-7)
    size = ((w.double() @ hessian.double()) * w).sum(1)
    torch.testing.assert_close(solution.size.double(), size, rtol=0.02, atol=1e-7)


@pytest.mark.parametrize("case", ["dead columns", "raised eigenvalues"])
def test_loss_is_that_of_the_hessian_where_another_matrix_was_factored(case: str) -> None:
    w, hessian = layer(16, 64)
    if case == "dead columns":
        hessian[:24] = 0
        hessian[:, :24] = 0
    else:
        hessian[0, 1] = hessian[1, 0] = 30 * hessian.diagonal().mean()
    factor = factorize(hessian.clone(), damping=0.01, act_order=True)
    assert factor.notes
    grid = search_grid(w, factor.curvature, assign_groups(64, 32), bits=4, symmetric=True)
    solution = solve(w, hessian, factor, grid, True)
    error = (w - solution.grid.dequantize(solution.codes)).double()
    loss = ((error @ hessian.double()) * error).sum(1).clamp(min=0)
    torch.testing.assert_close(solution.loss.double(), loss, rtol=2e-3, atol=2e-6)


def test_losses_of_the_sweep_are_those_of_its_codes() -> None:
    w, hessian = layer(24, 96)
    factor = factorize(hessian, damping=0.05, act_order=True)
    grid = search_grid(w, factor.curvature, assign_groups(96, 32), bits=4, symmetric=True)
    swept = sweep(w, factor, grid, block_columns=40)
    error = (w - grid.dequantize(swept.codes)).double()
    assert factor.added is not None
    damped = hessian.double() + factor.added * torch.eye(96)
    torch.testing.assert_close(
        swept.damped_loss.double(), ((error @ damped) * error).sum(1), rtol=1e-4, atol=1e-9
    )
    torch.testing.assert_close(
        swept.squared_error.double(), error.square().sum(1), rtol=1e-4, atol=1e-9
    )


def test_sweep_beats_round_to_nearest_clearly_on_correlated_inputs() -> None:
    w, hessian = layer(64, 128)
    factor = factorize(hessian, damping=0.01, act_order=True)
    grid = search_grid(w, factor.curvature, assign_groups(128, 64), bits=3, symmetric=True)
    solution = solve(w, hessian, factor, grid, True)
    assert float(solution.loss.sum()) < 0.7 * float(solution.round_to_nearest_loss.sum())


def test_shrinkage_helps_on_inputs_with_other_correlations() -> None:
    """Calibration and other inputs have the same diagonal and different correlations."""
    w, hessian = layer(64, 128)
    size = hessian.diagonal().sqrt()
    other = layer(1, 128, seed=7)[1]
    other *= torch.outer(size, size) / torch.outer(*2 * [other.diagonal().sqrt()])
    losses = {}
    for share in (0.0, 0.2, 1.0):
        shrunk = hessian.clone()
        shrink_to_diagonal(shrunk, share)
        factor = factorize(shrunk, damping=0.01, act_order=True)
        grid = search_grid(w, factor.curvature, assign_groups(128, 64), bits=3, symmetric=True)
        codes = sweep(w, factor, grid).codes
        error = w - grid.dequantize(codes)
        losses[share] = [float(output_loss(error, h).sum()) for h in (hessian, other)]
        if share == 1:
            assert torch.equal(codes, grid.round_to_nearest(w))
    assert losses[0.2][1] < 0.9 * losses[0.0][1]
    # Most of the improvement on the calibration inputs is kept.
    assert losses[0.2][0] - losses[0.0][0] < 0.4 * (losses[1.0][0] - losses[0.0][0])
