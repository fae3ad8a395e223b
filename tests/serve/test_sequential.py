from __future__ import annotations

import math

import numpy as np
import pytest

from halfbyte.serve.rollout.sequential import (
    BettingTest,
    PairedTest,
    TwoArmTest,
    bet_sizes,
    requests_until_rejected,
)


def test_evidence_is_the_mean_wealth_of_all_bets():
    test = BettingTest(-2.0, 0.5)
    values = [1.0, -2.0, 0.5, 3.0, 0.0]
    wealth = np.ones(24)
    for value in values:
        test.update(value)
        wealth *= 1 + bet_sizes(-2.0, 0.5) * (value - 0.5)
    assert test.log_evidence == pytest.approx(math.log(wealth.mean()))
    again = BettingTest(-2.0, 0.5, log_wealth=test.log_wealth)
    assert again.log_evidence == test.log_evidence


def test_wealth_stays_positive():
    test = BettingTest(-10.0, 0.0)
    for _ in range(5000):
        test.update(-10.0)
    assert math.isfinite(test.log_evidence)


def test_fair_bets_win_nothing_on_average():
    # The expected factor of one step, exactly, for both tests of a pair of equally good models.
    share, rate, margin = 0.1, 0.3, 0.02
    cases = [
        (True, True, share * rate),
        (False, True, (1 - share) * rate),
        (True, False, share * (1 - rate)),
        (False, False, (1 - share) * (1 - rate)),
    ]
    expected = {"worse": np.zeros(24), "as_good": np.zeros(24)}
    for candidate, failed, chance in cases:
        test = TwoArmTest(share, margin)
        test.update(candidate=candidate, failed=failed)
        for name in expected:
            expected[name] += chance * np.exp(getattr(test, name).log_wealth)
    assert expected["worse"] == pytest.approx(np.ones(24))
    # That they differ by less than the margin is true here: this one earns.
    assert (expected["as_good"] > 1).all()


@pytest.mark.parametrize("bad", [False, True])
def test_false_alarm_rate_is_at_most_alpha(bad):
    # Traffic gets worse for both arms half way; the margin itself is the border of "as good".
    rng = np.random.default_rng(3)
    share, margin, alpha, runs = 0.2, 0.05, 0.1, 300
    alarms = 0
    for _ in range(runs):
        test = TwoArmTest(share, margin)
        watched = test.as_good if bad else test.worse
        for step in range(600):
            candidate = bool(rng.random() < share)
            rate = (0.02 if step < 300 else 0.3) + (margin if bad and candidate else 0.0)
            test.update(candidate=candidate, failed=bool(rng.random() < rate))
            if watched.log_evidence >= math.log(1 / alpha):
                alarms += 1
                break
    # 30 are allowed; three standard deviations more would be chance.
    assert alarms <= 30 + 3 * math.sqrt(300 * 0.1 * 0.9)


@pytest.mark.parametrize(("base", "candidate"), [(0.02, 0.3), (0.0, 0.2), (0.1, 0.6)])
def test_worse_candidate_is_rejected_within_the_estimate(base, candidate):
    rng = np.random.default_rng(7)
    share, alpha = 0.1, 0.05
    promised = requests_until_rejected((base, candidate), share, alpha)
    late = 0
    for _ in range(200):
        test = TwoArmTest(share, 0.02)
        for _ in range(promised):
            drawn = bool(rng.random() < share)
            test.update(candidate=drawn, failed=bool(rng.random() < (candidate if drawn else base)))
            if test.worse.log_evidence >= math.log(1 / alpha):
                break
        else:
            late += 1
    assert late <= 0.05 * 200 + 3 * math.sqrt(200 * 0.05 * 0.95)
    assert promised < 1500


def test_no_estimate_for_a_candidate_that_is_not_worse():
    assert requests_until_rejected((0.1, 0.1), 0.1, 0.05) is None
    # Worse, but by less than any bet would notice.
    assert requests_until_rejected((0.1, 0.1 + 1e-9), 0.1, 0.05) is None
    fewer = requests_until_rejected((0.02, 0.5), 0.1, 0.05)
    assert fewer < requests_until_rejected((0.02, 0.1), 0.1, 0.05)


def test_pairs_need_fewer_requests_than_arms():
    rng = np.random.default_rng(1)

    def needed(paired):
        test = PairedTest(0.02) if paired else TwoArmTest(0.1, 0.02)
        for count in range(1, 5000):
            hard = rng.random() < 0.1
            failed = {"base": hard, "candidate": bool(hard or rng.random() < 0.2)}
            if paired:
                test.update(base_failed=failed["base"], candidate_failed=failed["candidate"])
            else:
                drawn = bool(rng.random() < 0.1)
                test.update(candidate=drawn, failed=failed["candidate" if drawn else "base"])
            if test.worse.log_evidence >= math.log(20):
                return count
        return 5000

    assert np.median([needed(True) for _ in range(20)]) * 4 < np.median(
        [needed(False) for _ in range(20)]
    )
