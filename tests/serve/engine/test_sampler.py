"""Sampling, compared with naive implementations and counts."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from tests.serve.helpers_engine import ask

from halfbyte.serve.engine.sampler import Sampler
from halfbyte.serve.engine.token_logprobs import LogitScorer

LOGITS = torch.tensor([1.0, 3.0, 2.0, 0.5, -1.0, 2.9])


def draws(count=4000, logits=LOGITS, tokens=(), **settings):
    """Relative frequency of each drawn token."""
    sampler = Sampler(ask([1], **{"temperature": 1.0, "seed": 1, **settings}))
    found = Counter(sampler.draw(logits, tokens) for _ in range(count))
    return {token: number / count for token, number in found.items()}


def naive(logits, *, temperature=1.0, keep=None):
    shares = [math.exp(x / temperature) for x in logits.tolist()]
    shares = [x if keep is None or i in keep else 0.0 for i, x in enumerate(shares)]
    return {i: x / sum(shares) for i, x in enumerate(shares) if x}


def assert_near(found, expected, count=4000):
    assert set(found) <= set(expected)
    for token, share in expected.items():
        # Four standard errors.
        width = 4 * math.sqrt(share * (1 - share) / count)
        assert abs(found.get(token, 0) - share) <= width + 1e-9


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_token_frequencies_match_the_distribution(temperature):
    assert_near(draws(temperature=temperature), naive(LOGITS, temperature=temperature))


def test_top_k_min_p_and_top_p_keep_the_most_likely():
    assert_near(draws(top_k=3), naive(LOGITS, keep={1, 5, 2}))
    assert_near(draws(min_p=0.3), naive(LOGITS, keep={1, 5, 2}))
    # The likeliest two have .759 together.
    assert_near(draws(top_p=0.75), naive(LOGITS, keep={1, 5}))
    assert_near(draws(top_p=0.77), naive(LOGITS, keep={1, 5, 2}))
    assert_near(draws(top_p=0.0), {1: 1.0})


def test_top_p_falls_back_to_sorting_all_tokens():
    flat = torch.zeros(3000)
    flat[7] = 0.001
    found = draws(200, flat, top_p=0.9)
    assert len(found) > 150


def test_seed_is_reproducible_and_no_seed_is_random():
    def run(seed):
        sampler = Sampler(ask([1], temperature=2.0, seed=seed))
        return [sampler.draw(LOGITS, ()) for _ in range(40)]

    assert run(7) == run(7)
    assert run(-1) == run(-1)
    assert run(7) != run(8)
    assert run(None) != run(None)


def test_a_tiny_temperature_does_not_overflow():
    assert draws(5, temperature=1e-9) == {1: 1.0}


def test_penalties_match_their_definitions():
    request = ask([0], frequency_penalty=0.5, presence_penalty=0.25, repetition_penalty=2.0)
    sampler = Sampler(request)
    for token in (1, 1, 4):
        sampler.add(token)
    found = sampler._adjust(LOGITS, [0, 1, 1, 4])
    expected = [1.0 / 2, 3.0 / 2 - 0.25 - 1.0, 2.0, 0.5, -1.0 * 2 - 0.25 - 0.5, 2.9]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert float(LOGITS[1]) == 3.0


def test_logit_bias_changes_the_token():
    assert Sampler(ask([0], logit_bias={3: 2.6})).draw(LOGITS, [0]) == 3
    assert not Sampler(ask([0], logit_bias={3: 2.6})).is_greedy
    assert Sampler(ask([0])).is_greedy


def test_scores_are_the_models_own_distribution():
    even = torch.full((6,), 2.0)
    even[0] = float("-inf")
    broken = torch.full((6,), 2.0)
    broken[3] = float("nan")
    scored = LogitScorer().score([LOGITS, even, broken, torch.full((6,), float("inf"))])
    assert scored.is_finite == [True, True, False, False]
    assert scored.argmax[:2] == [1, 1]
    assert scored.entropies[1] == pytest.approx(math.log(5))
    exact = naive(LOGITS)
    assert scored.entropies[0] == pytest.approx(-sum(p * math.log(p) for p in exact.values()))
    token = scored.score_token(0, 2, 2)
    assert token.logprob == pytest.approx(math.log(exact[2]))
    assert [token for token, _ in token.top] == [1, 5]
    assert [p for _, p in token.top] == pytest.approx([math.log(exact[1]), math.log(exact[5])])
    assert scored.score_token(0, 2, 0).top == ()
    assert math.isnan(scored.score_token(0, 2, None).logprob)


def test_scorer_forgets_what_it_scored_before():
    scorer = LogitScorer()
    scorer.score([LOGITS] * 3)
    again = scorer.score([LOGITS * 2])
    assert again.logits.shape == (1, 6)
    assert again.entropies == LogitScorer().score([LOGITS * 2]).entropies
