"""The Hessian, its damping and its factor, against plain float64."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quantize.hessian import (
    HessianAccumulator,
    add_gram,
    factorize,
    shrink_to_pool,
)


def spd(size: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * size, size, generator=generator)
    x = x * torch.logspace(-1, 1, size)[None]
    return x.t() @ x / len(x)


@pytest.mark.parametrize("width", [1, 33, 512, 700, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_sum_is_the_float64_sum(width: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(2, 20, width, generator=generator).to(dtype) for _ in range(3)]
    accumulator = HessianAccumulator(width, torch.device("cpu"))
    for batch in batches:
        accumulator.update(batch)
    rows = torch.cat([b.reshape(-1, width) for b in batches]).double()
    assert accumulator.num_tokens == 120
    # bf16 products are exact in fp32, so both types meet the bound of an fp32 sum of 120 terms.
    torch.testing.assert_close(accumulator.total().double(), rows.t() @ rows, rtol=1e-5, atol=2e-4)


def test_tiles_leave_the_setting_for_matrix_products_as_it_was() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    add_gram(torch.zeros(8, 8), torch.ones(4, 8, dtype=torch.bfloat16))
    assert torch.backends.mkldnn.matmul.fp32_precision == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_batch_with_a_non_finite_number_is_counted_and_left_out(bad: float) -> None:
    accumulator = HessianAccumulator(4, torch.device("cpu"))
    accumulator.update(torch.ones(3, 4))
    poisoned = torch.ones(5, 4)
    poisoned[2, 1] = bad
    accumulator.update(poisoned)
    assert (accumulator.num_tokens, accumulator.dropped_tokens) == (3, 5)
    assert torch.equal(accumulator.total(), torch.full((4, 4), 3.0))


@pytest.mark.parametrize("act_order", [False, True])
def test_factor_is_upper_and_gives_the_damped_hessian_back(act_order: bool) -> None:
    hessian = spd(40)
    factor = factorize(hessian, damping=0.01, act_order=act_order)
    upper = factor.upper.double()
    assert torch.equal(upper, upper.triu())
    damped = hessian.double() + 0.01 * hessian.double().diagonal().mean() * torch.eye(40)
    expected = damped[factor.order][:, factor.order]
    torch.testing.assert_close(upper @ upper.t(), expected, rtol=1e-4, atol=1e-4)
    assert (factor.damping, factor.notes) == (0.01, ())


def test_act_order_goes_by_falling_diagonal() -> None:
    factor = factorize(torch.diag(torch.tensor([1.0, 3.0, 2.0])), damping=0.01, act_order=True)
    assert factor.order.tolist() == [1, 2, 0]


def test_curvature_is_the_loss_left_when_later_columns_answer() -> None:
    """Against the definition: minimise over the later columns by solving for them."""
    factor = factorize(spd(6), damping=1e-3, act_order=False)
    hessian = spd(6).double()
    hessian += 1e-3 * hessian.diagonal().mean() * torch.eye(6)
    for k in range(6):
        later = hessian[k + 1 :, k + 1 :]
        left = hessian[k, k]
        if k < 5:
            left = left - hessian[k, k + 1 :] @ torch.linalg.solve(later, hessian[k + 1 :, k])
        assert float(factor.curvature[k]) == pytest.approx(float(left), rel=1e-3)


def test_dead_columns_keep_a_mean_diagonal_and_are_noted() -> None:
    hessian = spd(8)
    hessian[3] = 0
    hessian[:, 3] = 0
    factor = factorize(hessian, damping=0.01, act_order=False)
    assert factor.notes == ("1 input columns carried no signal",)
    alive = torch.tensor([i for i in range(8) if i != 3])
    mean = hessian.diagonal()[alive].mean()
    assert float(factor.curvature[3]) == pytest.approx(float(mean) * 1.01, rel=1e-4)


def test_no_signal_at_all_becomes_round_to_nearest() -> None:
    factor = factorize(torch.zeros(5, 5), damping=0.01, act_order=True)
    assert torch.allclose(factor.upper, torch.eye(5) * 1.01**0.5)
    assert "no input signal" in factor.notes[0]


def test_indefinite_hessian_escalates_damping_and_says_so() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = factorize(hessian, damping=0.01, act_order=False)
    assert factor.damping == pytest.approx(0.1)
    assert factor.notes == ("damping raised from 0.01 to 0.1",)


def test_hopeless_hessian_has_its_eigenvalues_lifted() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 30.0
    factor = factorize(hessian, damping=0.01, act_order=False)
    assert factor.notes == ("negative eigenvalues lifted",)
    assert torch.isfinite(factor.upper).all()
    assert bool((factor.upper.diagonal() > 0).all())


def test_pool_weighs_by_tokens() -> None:
    own, pool = torch.eye(2) * 6, torch.eye(2) * 100
    mixed, share = shrink_to_pool(own, 2, pool, 50)
    # 4 * width = 8 prior tokens of mean 100 / 50 = 2, and 2 tokens that sum to 6.
    assert share == pytest.approx(0.8)
    torch.testing.assert_close(mixed, torch.eye(2) * (6 + 8 * 2) / 10)
