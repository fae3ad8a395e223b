"""The target compared with the float64 least-squares problem that it solves."""

from __future__ import annotations

import pytest
import torch

from halfbyte.quantize.target import CHECK_EVERY, MomentAccumulator, Moments, compute_target

WIDTH, ROWS, TOKENS = 24, 10, 4000


def inputs(seed: int, tokens: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    """Give base inputs and what reaches the quantized model: shrunk, mixed and noisy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)) * 0.1
    base = torch.randn(tokens, WIDTH, generator=generator)
    noise = torch.randn(tokens, WIDTH, generator=generator) * 0.05
    return base, base * 0.9 + base @ mixing + noise


def moments(base: torch.Tensor, seen: torch.Tensor) -> Moments:
    count = len(seen)
    return Moments(
        hessian=seen.t() @ seen / count, drift=(base - seen).t() @ seen / count, num_tokens=count
    )


def weight() -> torch.Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(5))


def test_target_is_the_damped_least_squares_solution_over_all_text() -> None:
    (fit_base, fit_seen), (check_base, check_seen) = inputs(0), inputs(1, TOKENS // 3)
    found = compute_target(
        weight(), moments(fit_base, fit_seen), moments(check_base, check_seen), damping=0.01
    )
    base, seen = torch.cat([fit_base, check_base]).double(), torch.cat([fit_seen, check_seen])
    seen = seen.double()
    w = weight().double()
    hessian = seen.t() @ seen / len(seen)
    damping = 0.01 * hessian.diagonal().mean()
    # minimise |W* x~ - W x|² + damping |W* - W|²
    left = hessian + damping * torch.eye(WIDTH)
    right = (w @ base.t() @ seen / len(seen)) + damping * w
    best = torch.linalg.solve(left, right.t()).t()
    expected = w + found.share * (best - w)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-4, atol=1e-5)
    assert 0.95 < found.share <= 1.0


def test_target_gets_closer_to_the_base_outputs_on_unseen_text() -> None:
    found = compute_target(weight(), moments(*inputs(0)), moments(*inputs(1)), damping=0.01)
    base, seen = inputs(2)
    wanted = base @ weight().t()
    before = (seen @ weight().t() - wanted).square().mean()
    after = (seen @ found.weight.t() - wanted).square().mean()
    assert float(after) < 0.2 * float(before)


def test_share_minimizes_the_error_on_the_check_text() -> None:
    """Where the two texts disagree in part, against a search by hand."""
    fit, (base, seen) = inputs(0), inputs(1)
    base = seen + 0.4 * (base - seen)
    found = compute_target(weight(), moments(*fit), moments(base, seen), damping=1e-4)
    step = compute_target(weight(), moments(*fit), moments(*fit), damping=1e-4).weight - weight()
    shares = torch.linspace(0, 1, 101)
    losses = [
        float((seen @ (weight() + a * step).t() - base @ weight().t()).square().mean())
        for a in shares
    ]
    assert found.share == pytest.approx(float(shares[losses.index(min(losses))]), abs=0.011)


def test_step_that_other_text_does_not_confirm_is_not_taken() -> None:
    base, seen = inputs(1)
    against = moments(seen - (base - seen), seen)
    found = compute_target(weight(), moments(*inputs(0)), against, damping=0.01)
    assert found.share == 0
    assert torch.equal(found.weight, weight())


def test_singular_hessian_keeps_the_weight() -> None:
    broken = Moments(hessian=-torch.eye(WIDTH), drift=torch.randn(WIDTH, WIDTH), num_tokens=TOKENS)
    found = compute_target(weight(), broken, moments(*inputs(1)), damping=0.01)
    assert found.share == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_accumulated_moments_match_float64(dtype: torch.dtype) -> None:
    accumulator = MomentAccumulator(WIDTH, torch.device("cpu"), drift=True)
    batches = [[t.to(dtype) for t in inputs(seed, 200)] for seed in range(9)]
    for number, (base, seen) in enumerate(batches):
        accumulator.update(number, seen[None], base[None])
    halves = accumulator.moments()
    assert halves is not None
    assert accumulator.num_tokens == 1800
    for half, mine in zip(halves, (False, True), strict=True):
        chosen = [
            pair for i, pair in enumerate(batches) if (i % CHECK_EVERY == CHECK_EVERY - 1) == mine
        ]
        base, seen = (torch.cat([pair[k] for pair in chosen]).double() for k in (0, 1))
        assert half.num_tokens == len(seen)
        hessian, drift = seen.t() @ seen / len(seen), (base - seen).t() @ seen / len(seen)
        torch.testing.assert_close(half.hessian.double(), hessian, rtol=1e-3, atol=1e-3)
        assert half.drift is not None
        # In bf16 the difference itself, and its product, have 8 bits.
        exact = dtype == torch.float32
        error = (half.drift.double() - drift).norm() / drift.norm()
        assert float(error) < (1e-5 if exact else 1e-2)


def test_too_few_batches_have_no_check_half() -> None:
    accumulator = MomentAccumulator(WIDTH, torch.device("cpu"), drift=False)
    for number in range(CHECK_EVERY - 1):
        accumulator.update(number, torch.randn(5, WIDTH), None)
    assert accumulator.moments() is None


def test_non_finite_batch_enters_neither_sum() -> None:
    accumulator = MomentAccumulator(2, torch.device("cpu"), drift=True)
    accumulator.update(0, torch.tensor([[1.0, float("nan")]]), torch.ones(1, 2))
    accumulator.update(1, torch.ones(1, 2), torch.full((1, 2), 3.0))
    accumulator.update(3, torch.ones(1, 2), torch.ones(1, 2))
    halves = accumulator.moments()
    assert halves is not None
    assert halves[0].drift is not None
    assert torch.equal(halves[0].drift, torch.full((2, 2), 2.0))
    assert accumulator.dropped_tokens == 1
