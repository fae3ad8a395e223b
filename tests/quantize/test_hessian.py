"""The Hessian, its damping and its factor, compared with plain float64."""

from __future__ import annotations

import pytest
import torch

from halfbyte.machine.arithmetic import sums_bf16_in_fp32
from halfbyte.quantize.hessian import (
    HessianAccumulator,
    factorize,
    shrink_to_diagonal,
    shrink_to_pool,
)


def spd(size: int, seed: int = 0, tokens: int | None = None) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 4 * size, size, generator=generator)
    x = x * torch.logspace(-1, 1, size)[None]
    return x.t() @ x / len(x)


def accumulate(batches: list[torch.Tensor]) -> torch.Tensor:
    accumulator = HessianAccumulator(batches[0].shape[-1], torch.device("cpu"))
    for batch in batches:
        accumulator.update(batch)
    assert accumulator.num_tokens == sum(batch.numel() // batch.shape[-1] for batch in batches)
    return accumulator.total().double()


def exact_sum(batches: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.cat([b.reshape(-1, b.shape[-1]) for b in batches]).double()
    return rows.t() @ rows


@pytest.mark.parametrize("width", [1, 33, 256, 700])
def test_accumulated_sum_is_the_float64_sum(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    batches = [torch.randn(2, 20, width, generator=generator) for _ in range(3)]
    expected = exact_sum(batches)
    torch.testing.assert_close(accumulate(batches), expected, rtol=1e-5, atol=2e-4)


@pytest.mark.parametrize("width", [1, 33, 256, 700])
def test_bf16_sum_rounds_only_the_difference_to_the_estimate(width: int) -> None:
    """Entry by entry: the first batch to 2⁻¹⁷, later ones to 2⁻⁸ of the difference."""
    generator = torch.Generator().manual_seed(width)
    tilt = torch.logspace(-2, 2, width)
    batches = [(torch.randn(2, 20, width, generator=generator) * tilt).bfloat16() for _ in range(5)]
    expected = exact_sum(batches)
    sizes = expected.diagonal().sqrt()
    # The last term is the rounding of any fp32 sum.
    allowed = 2**-17 * exact_sum(batches[:1]).abs() + 1e-6 * torch.outer(sizes, sizes)
    for number in range(1, len(batches)):
        before = exact_sum(batches[:number]) / number
        surprise = (exact_sum(batches[number : number + 1]) - before).abs()
        # The estimate is rounded to bf16 before it is subtracted.
        allowed += 2**-8 * (surprise + 2**-8 * before.abs())
    assert bool(((accumulate(batches) - expected).abs() <= allowed).all())


def test_a_batch_larger_than_all_before_it_uses_no_estimate_from_them() -> None:
    generator = torch.Generator().manual_seed(0)
    small, large = torch.randn(1, 48), torch.randn(64, 48, generator=generator)
    batches = [(small * 100).bfloat16(), large.bfloat16()]
    expected = exact_sum(batches)
    torch.testing.assert_close(accumulate(batches), expected, rtol=2**-16, atol=2**-10)


def test_machines_without_such_units_get_the_plain_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = [torch.randn(40, 33).bfloat16() for _ in range(3)]
    monkeypatch.setattr("halfbyte.quantize.hessian.sums_bf16_in_fp32", lambda: False)
    torch.testing.assert_close(accumulate(batches), exact_sum(batches), rtol=1e-5, atol=2e-4)


def test_units_that_round_before_they_add_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def round_first(
        addend: torch.Tensor, left: torch.Tensor, right: torch.Tensor, *, beta: float
    ) -> torch.Tensor:
        return beta * addend + left @ right

    monkeypatch.setattr("halfbyte.machine.arithmetic.has_fast_bf16", lambda: True)
    monkeypatch.setattr("halfbyte.machine.arithmetic.torch.addmm", round_first)
    assert not sums_bf16_in_fp32.__wrapped__()


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


def test_act_order_is_by_decreasing_diagonal() -> None:
    factor = factorize(torch.diag(torch.tensor([1.0, 3.0, 2.0])), damping=0.01, act_order=True)
    assert factor.order.tolist() == [1, 2, 0]


def test_curvature_is_the_loss_after_later_columns_compensate() -> None:
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


def test_no_signal_becomes_round_to_nearest() -> None:
    factor = factorize(torch.zeros(5, 5), damping=0.01, act_order=True)
    assert torch.allclose(factor.upper, torch.eye(5) * 1.01**0.5)
    assert "no input signal" in factor.notes[0]


def test_indefinite_hessian_escalates_damping_and_says_so() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 1.05
    factor = factorize(hessian, damping=0.01, act_order=False)
    assert factor.damping == pytest.approx(0.1)
    assert factor.notes == ("damping raised from 0.01 to 0.1",)


def test_strongly_indefinite_hessian_has_its_eigenvalues_raised() -> None:
    hessian = torch.eye(4)
    hessian[0, 1] = hessian[1, 0] = 30.0
    factor = factorize(hessian, damping=0.01, act_order=False)
    assert factor.notes == ("small and negative eigenvalues raised",)
    assert torch.isfinite(factor.upper).all()
    assert bool((factor.upper.diagonal() > 0).all())


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_shrinkage_scales_all_but_the_diagonal(share: float) -> None:
    hessian = spd(40)
    expected = (1 - share) * hessian.double() + share * torch.diag(hessian.double().diagonal())
    shrink_to_diagonal(hessian, share)
    torch.testing.assert_close(hessian.double(), expected, rtol=1e-6, atol=0)
    # A mean of two positive matrices is one.
    assert float(torch.linalg.eigvalsh(hessian.double())[0]) > 0


def test_pool_weighs_by_tokens() -> None:
    own, pool = torch.eye(2) * 6, torch.eye(2) * 100
    mixed, share = shrink_to_pool(own, 2, pool, 50)
    # 4 * width = 8 prior tokens of mean 100 / 50 = 2, and 2 tokens that sum to 6.
    assert share == pytest.approx(0.8)
    torch.testing.assert_close(mixed, torch.eye(2) * (6 + 8 * 2) / 10)


@pytest.fixture
def device_accumulator(monkeypatch: pytest.MonkeyPatch) -> HessianAccumulator:
    """One that works as on a GPU: products of 16-bit numbers in fp32, no verdict waited for."""
    plain = torch.mm

    def mm(left: torch.Tensor, right: torch.Tensor, *, out_dtype: torch.dtype) -> torch.Tensor:
        return plain(left.to(out_dtype), right.to(out_dtype))

    monkeypatch.setattr("halfbyte.quantize.hessian.find_fp32_sum_obstacle", lambda *_: None)
    monkeypatch.setattr("halfbyte.quantize.hessian.DEVICE_TILE", 48)
    monkeypatch.setattr("halfbyte.quantize.hessian.torch.mm", mm)
    accumulator = HessianAccumulator(100, torch.device("cpu"), checked=False)
    accumulator._tile = 48
    monkeypatch.setattr("halfbyte.quantize.hessian.sums_bf16_in_fp32", lambda: False)
    return accumulator


def test_on_a_gpu_the_sum_is_the_float64_sum(device_accumulator: HessianAccumulator) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(2, 20, 100, generator=generator).bfloat16() for _ in range(3)]
    for batch in batches:
        device_accumulator.update(batch)
    assert device_accumulator.num_tokens == 120
    assert device_accumulator.is_finite
    found = device_accumulator.total().double()
    assert torch.equal(found, found.t())
    torch.testing.assert_close(found, exact_sum(batches), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_non_finite_inputs_show_in_an_unchecked_sum(
    value: float, device_accumulator: HessianAccumulator
) -> None:
    batch = torch.randn(20, 100).bfloat16()
    device_accumulator.update(batch)
    assert device_accumulator.is_finite
    batch[3, 7] = value
    device_accumulator.update(batch)
    assert not device_accumulator.is_finite
