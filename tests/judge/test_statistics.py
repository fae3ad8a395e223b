"""Formulas compared with brute force, and error rates checked by simulation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from halfbyte.judge import statistics as stats
from halfbyte.judge.statistics import Flips


def flips(n, harmful, beneficial, **more):
    return Flips(num_items=n, harmful=harmful, beneficial=beneficial, **more)


def draw(rng, times, n, harm, gain):
    """Numbers of harmful and beneficial flips in `times` studies of n items."""
    counts = rng.multinomial(n, [harm, gain, 1 - harm - gain], size=times)
    return [flips(n, int(h), int(g)) for h, g, _ in counts]


@pytest.mark.parametrize(("harmful", "beneficial"), [(0, 0), (1, 0), (6, 0), (9, 2), (3, 3)])
def test_mcnemar_is_the_sum_over_all_equally_likely_flips(harmful, beneficial):
    total = harmful + beneficial
    worst = min(harmful, beneficial)
    outcomes = list(itertools.product((0, 1), repeat=total))
    extreme = sum(min(sum(o), total - sum(o)) <= worst for o in outcomes)
    assert stats.mcnemar_p_value(harmful, beneficial) == pytest.approx(extreme / len(outcomes))


def test_mcnemar_takes_thousands_of_flips():
    assert 0 < stats.mcnemar_p_value(2100, 1900) < 0.01


@pytest.mark.parametrize(("n", "harmful", "beneficial"), [(40, 5, 2), (40, 0, 0), (100, 12, 1)])
@pytest.mark.parametrize("difference", [-0.2, -0.05, 0.1])
def test_score_statistic_is_the_one_of_the_constrained_likelihood(
    n, harmful, beneficial, difference
):
    # Search the likelihood under p_gain - p_harm = difference, without Tango's closed form.
    harm = np.linspace(max(0.0, -difference), (1 - difference) / 2, 2_000_001)
    gain = harm + difference
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = (
            np.where(harmful > 0, harmful * np.log(harm), 0)
            + np.where(beneficial > 0, beneficial * np.log(gain), 0)
            + (n - harmful - beneficial) * np.log(1 - harm - gain)
        )
    best = int(np.nanargmax(likelihood))
    variance = n * (harm[best] + gain[best] - difference**2)
    expected = (beneficial - harmful - n * difference) / math.sqrt(variance)
    found = stats.score_statistic(flips(n, harmful, beneficial), difference)
    assert found == pytest.approx(expected, rel=1e-3)


def test_interval_has_positive_width_without_flips():
    few = stats.difference_interval(flips(30, 0, 0), 0.9)
    many = stats.difference_interval(flips(3000, 0, 0), 0.9)
    assert few.low < -0.05 < 0.05 < few.high
    assert -0.002 < many.low < 0 < many.high


@pytest.mark.parametrize(
    ("n", "harm", "gain"), [(60, 0.05, 0.05), (200, 0.08, 0.02), (400, 0, 0.03)]
)
def test_interval_has_its_nominal_coverage(n, harm, gain):
    rng = np.random.default_rng(1)
    studies = draw(rng, 2000, n, harm, gain)
    covered = np.mean(
        [
            i.low <= gain - harm <= i.high
            for i in (stats.difference_interval(s, 0.9) for s in studies)
        ]
    )
    assert 0.88 <= covered <= 0.95


def test_a_loss_equal_to_the_margin_rarely_passes_and_rarely_fails():
    rng = np.random.default_rng(2)
    studies = draw(rng, 4000, 300, 0.06, 0.03)
    passed = np.mean([stats.noninferiority_p_value(s, 0.03) < 0.05 for s in studies])
    failed = np.mean([stats.harm_p_value(s, 0.03) < 0.05 for s in studies])
    assert 0.03 < passed < 0.065
    assert 0.03 < failed < 0.065


def test_identical_items_of_a_document_count_once():
    rng = np.random.default_rng(3)
    base = np.ones(400, dtype=bool)
    alone = rng.random(400) > 0.1
    copied = np.repeat(rng.random(40) > 0.1, 10)
    documents = np.repeat(np.arange(40), 10).tolist()
    assert stats.count_flips(base, alone, documents).design_effect == pytest.approx(1.9)
    assert stats.count_flips(base, copied, documents).design_effect == pytest.approx(10, rel=0.1)


def test_interval_over_documents_covers_where_items_do_not():
    rng = np.random.default_rng(4)
    documents = np.repeat(np.arange(80), 6).tolist()
    covered = {True: 0, False: 0}
    for _ in range(400):
        wrong = np.repeat(rng.random(80) < 0.1, 6)
        for by_document in covered:
            seen = stats.count_flips([True] * 480, ~wrong, documents if by_document else None)
            interval = stats.difference_interval(seen, 0.9)
            covered[by_document] += interval.low <= -0.1 <= interval.high
    assert covered[True] / 400 > 0.85
    assert covered[False] / 400 < 0.7


def test_a_single_document_gives_no_evidence():
    seen = stats.count_flips([True] * 50, [False] * 50, ["a"] * 50)
    assert stats.harm_p_value(seen, 0.02) == 0.5
    interval = stats.difference_interval(seen, 0.9)
    assert (interval.low, interval.high) == pytest.approx((-1, 1))


@pytest.mark.parametrize(("degrees", "t"), [(2, 2.920), (4, 2.132), (15, 1.753), (1e9, 1.645)])
def test_students_t_at_five_percent_is_as_in_its_table(degrees, t):
    assert stats._t_to_normal(t, degrees) == pytest.approx(1.645, abs=0.015)


def test_documents_of_unequal_size_count_by_their_effective_number():
    documents = [0] * 50 + list(range(1, 51))
    seen = stats.count_flips([True] * 100, [True] * 100, documents)
    assert seen.num_documents == pytest.approx(100**2 / (50**2 + 50))
    assert stats.noninferiority_p_value(seen, 0.5) == 1


@pytest.mark.parametrize(
    ("documents", "per", "correlation", "flips"),
    [
        (2, 500, 0.05, 0.01),
        (3, 300, 0.1, 0.01),
        (5, 200, 0.2, 0.01),
        (10, 100, 0.3, 0.005),
        (20, 50, 0.1, 0.01),
        (40, 25, 0.1, 0.01),
        (200, 5, 0.1, 0.01),
    ],
)
def test_a_loss_equal_to_the_margin_rarely_passes_with_few_documents(
    documents, per, correlation, flips
):
    rng = np.random.default_rng(10)
    harm = 0.02 + flips
    shape = 1 / correlation - 1
    names = np.repeat(np.arange(documents), per).tolist()
    passed = 0
    for _ in range(300):
        rates = np.repeat(rng.beta(harm * shape, (1 - harm) * shape, documents), per)
        luck = rng.random(len(rates))
        harmed, gained = luck < rates, (luck >= rates) & (luck < rates + flips)
        seen = stats.count_flips((~gained).tolist(), (~harmed).tolist(), names)
        passed += stats.noninferiority_p_value(seen, 0.02) < 0.05
    assert passed / 300 <= 0.06


def test_holm_adjusts_as_in_the_textbook():
    adjusted = stats.adjust_holm([0.01, 0.04, 0.03, 0.005])
    assert adjusted == pytest.approx([0.03, 0.06, 0.06, 0.02])


def test_holm_controls_false_alarms_over_eight_slices():
    rng = np.random.default_rng(7)
    alarms = 0
    for _ in range(1000):
        slices = draw(rng, 8, 100, 0.08, 0.03)
        adjusted = stats.adjust_holm([stats.harm_p_value(s, 0.05) for s in slices])
        alarms += min(adjusted) < 0.05
    assert 0.02 < alarms / 1000 < 0.075


@pytest.mark.parametrize("flip_rate", [0.03, 0.1])
def test_power_and_items_needed_match_simulated_studies(flip_rate):
    n = stats.items_needed(flip_rate, 0.02, alpha=0.05, power=0.8)
    assert stats.passing_power(n, flip_rate, 0.02, alpha=0.05) == pytest.approx(0.8, abs=0.01)
    rng = np.random.default_rng(8)
    studies = draw(rng, 2000, n, flip_rate / 2, flip_rate / 2)
    passed = np.mean([stats.noninferiority_p_value(s, 0.02) < 0.05 for s in studies])
    assert passed == pytest.approx(0.8, abs=0.04)


def test_items_needed_for_a_fail_and_at_the_margin():
    n = stats.items_needed(0.1, 0.02, alpha=0.05, power=0.8, difference=-0.06)
    rng = np.random.default_rng(9)
    studies = draw(rng, 2000, n, 0.08, 0.02)
    failed = np.mean([stats.harm_p_value(s, 0.02) < 0.05 for s in studies])
    assert failed == pytest.approx(0.8, abs=0.05)
    assert stats.items_needed(0.1, 0.02, alpha=0.05, difference=-0.02) is None
