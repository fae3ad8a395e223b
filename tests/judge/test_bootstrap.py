from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from halfbyte.judge import bootstrap
from halfbyte.judge.bootstrap import bootstrap_ratio


@pytest.mark.parametrize("documents", [16, 40])
def test_bootstrap_covers_the_mean_of_skewed_documents(documents):
    rng = np.random.default_rng(5)
    covered = 0
    for study in range(400):
        counts = rng.integers(50, 500, documents)
        per_token = rng.lognormal(-3, 0.6, documents)
        boot = bootstrap_ratio(per_token * counts, counts, seed=study, resamples=800)
        interval = boot.interval(0.9)
        covered += interval.low <= math.exp(-3 + 0.18) <= interval.high
    assert 0.85 <= covered / 400 <= 0.95


def test_bootstrap_p_values_agree_with_its_interval():
    rng = np.random.default_rng(6)
    boot = bootstrap_ratio(rng.normal(3, 1, 30) * 100, [100] * 30)
    interval = boot.interval(0.9)
    assert boot.p_value_above(interval.low) == pytest.approx(0.05, abs=0.002)
    assert boot.p_value_below(interval.high) == pytest.approx(0.05, abs=0.002)
    assert boot.p_value_above(1.0) < 0.001 < 0.999 < boot.p_value_below(1.0)


def test_bootstrap_of_one_constant_is_certain_and_of_few_documents_is_none():
    boot = bootstrap_ratio([0.0] * 20, [100] * 20)
    assert (boot.interval(0.9).low, boot.interval(0.9).high) == (0, 0)
    assert (boot.p_value_above(0.05), boot.p_value_below(0.05)) == (1.0, 0.0)
    assert bootstrap_ratio([1.0] * 15, [1] * 15) is None


def test_memory_does_not_grow_with_the_resamples(monkeypatch):
    totals = np.random.default_rng(7).normal(3, 1, 20_000)
    counts = [100] * len(totals)
    tracemalloc.start()
    found = bootstrap_ratio(totals, counts, resamples=300)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # A number for each draw: 48 MB.
    assert peak < 70e6
    monkeypatch.setattr(bootstrap, "DRAWN_AT_ONCE", 10**9)
    at_once = bootstrap_ratio(totals, counts, resamples=300)
    np.testing.assert_array_equal(found.studentized, at_once.studentized)
