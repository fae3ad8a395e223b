"""Paired statistics: what the answers of two models to the same questions allow to be said.

Numbers in, numbers out; nothing here knows a model. Items that belong to one document are not
independent, so every method takes documents as its units.

Signs: a *difference* is candidate minus base, so a loss is negative. A *harmful flip* is an item
that only the base gets right, a *beneficial flip* one that only the candidate gets right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FEWEST_DOCUMENTS = 16
"""With fewer nothing is shown to be kept: their spread says too little about that of all texts."""
LEAST_CORRELATION = 0.1
"""Of items of one document, where the data show less. The few documents that hold most of a loss
may be missing from a sample, and then its documents look more alike than they are."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A two-sided interval; each of its ends is a one-sided bound at (1 + confidence) / 2."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """How the answers of two models to the same items pair up."""

    num_items: int
    harmful: int
    """Right by the base, wrong by the candidate."""
    beneficial: int
    """Wrong by the base, right by the candidate."""
    design_effect: float = 1.0
    """By how much items of one document repeat each other, as a factor on the variance."""
    num_documents: float | None = None
    """Effective: documents of one size that weigh as much. None: every item stands alone."""

    @property
    def units(self) -> float:
        """What is independent of each other: documents, or items that stand alone."""
        return self.num_items if self.num_documents is None else self.num_documents

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the base."""
        return (self.beneficial - self.harmful) / self.num_items

    @property
    def rate(self) -> float:
        """Share of items on which exactly one of both is right."""
        return (self.beneficial + self.harmful) / self.num_items


def count_flips(
    base: Sequence[bool], candidate: Sequence[bool], documents: Sequence[Hashable] | None = None
) -> Flips:
    """Count how two models' answers to the same items pair up.

    Args:
        base: Whether the base is right, one value per item.
        candidate: The same for the candidate, in the same order.
        documents: What each item belongs to; None: every item stands alone.

    Returns:
        The flips, with the design effect of the documents.
    """
    pairs = list(zip(base, candidate, strict=True))
    differences = np.array([int(c) - int(b) for b, c in pairs], dtype=np.float64)
    flips = Flips(
        num_items=len(pairs),
        harmful=int((differences < 0).sum()),
        beneficial=int((differences > 0).sum()),
    )
    if documents is None or len(set(documents)) == len(pairs):
        return flips
    names = {name: number for number, name in enumerate(dict.fromkeys(documents))}
    index = np.array([names[name] for name in documents])
    return replace(
        flips,
        design_effect=design_effect(differences, index),
        num_documents=len(pairs) ** 2 / float((np.bincount(index) ** 2).sum()),
    )


def design_effect(values: Floats, documents: NDArray[np.int64]) -> float:
    """Give the variance of a mean over documents in relation to that over independent items.

    Args:
        values: One per item.
        documents: Number of the document that each item belongs to, from 0.

    Returns:
        The ratio, at least that of items of ``LEAST_CORRELATION``.

    Source:
        Rao and Scott 1992, "A simple method for the analysis of clustered binary data",
        Biometrics 48; the least one is Kish 1965, "Survey Sampling", section 8.2.
    """
    sizes = np.bincount(documents)
    least = 1 + LEAST_CORRELATION * (float((sizes**2).sum()) / len(values) - 1)
    deviations = values - values.mean()
    alone = float((deviations**2).sum())
    n = len(sizes)
    if n < 2 or alone == 0:
        return least
    totals = np.bincount(documents, weights=deviations)
    return max(least, float((totals**2).sum()) * n / (n - 1) / alone)


def mcnemar_p_value(harmful: int, beneficial: int) -> float:
    """Give the exact two-sided p-value of McNemar's test.

    Args:
        harmful: Flips against the candidate.
        beneficial: Flips for it.

    Returns:
        The chance of flips at least as lopsided if both models were equally good.

    Source:
        McNemar 1947; the binomial form, Liddell 1983.
    """
    flips = harmful + beneficial
    tail = sum(math.comb(flips, k) for k in range(min(harmful, beneficial) + 1))
    # Whole numbers to the last step: 2 to the power of thousands is no float.
    return min(1.0, float(Fraction(2 * tail, 1 << flips)))


def score_statistic(flips: Flips, difference: float) -> float:
    """Measure how far the flips are from what a true difference would bring.

    Args:
        flips: What was observed.
        difference: The true difference that is tested, -1..1.

    Returns:
        A standard normal value under that difference; negative where the candidate did worse. A
        score statistic, because the usual one has no width where nothing flipped. Where documents
        are fewer than items, their own spread is estimated too, as in Student's t.

    Source:
        Tango 1998, "Equivalence test and confidence interval for the difference in proportions
        for the paired-sample design", Statistics in Medicine 17, equations 4 to 8.
    """
    # By the design effect fewer items count.
    n = flips.num_items / flips.design_effect
    gain = flips.beneficial / flips.num_items
    harm = flips.harmful / flips.num_items
    variance = _variance_under(gain, harm, difference)
    distance = gain - harm - difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    found = distance * math.sqrt(n / variance)
    return found if flips.num_documents is None else _as_normal(found, flips.num_documents - 1)


def _as_normal(t: float, degrees: float) -> float:
    """Give the standard normal value that is as unlikely as Student's t.

    Args:
        t: A value of Student's t.
        degrees: Its degrees of freedom; with none, one document alone, it says nothing.

    Returns:
        The normal value; from two degrees on right to some hundredths.

    Source:
        Wallace 1959, "Bounds on normal approximations to Student's and the chi-square
        distributions", Annals of Mathematical Statistics 30, section 2.
    """
    if degrees < 1e-9:
        return 0.0
    size = math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.copysign(size * (8 * degrees + 1) / (8 * degrees + 3), t)


def _variance_under(gain: float, harm: float, difference: float) -> float:
    """Give the variance of one item's difference by the likeliest flip rates under a hypothesis.

    Args:
        gain: Observed share of beneficial flips.
        harm: Observed share of harmful flips.
        difference: The true difference that is supposed.

    Returns:
        The variance of a value that is -1, 0 or 1.
    """
    b = -gain - harm + (2 - gain + harm) * difference
    c = -harm * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    return 2 * q + difference * (1 - difference)


def difference_interval(flips: Flips, confidence: float) -> Interval:
    """Give the interval of the true difference in accuracy.

    Args:
        flips: What was observed.
        confidence: Of the two-sided interval, for example .9.

    Returns:
        Tango's score interval: the differences that the flips do not contradict.
    """
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    return Interval(
        low=_crossing(flips, z, -1.0, flips.difference),
        high=_crossing(flips, -z, flips.difference, 1.0),
    )


def _crossing(flips: Flips, target: float, low: float, high: float) -> float:
    """Find where the statistic, which falls with the difference, reaches a value."""
    for _ in range(60):
        middle = (low + high) / 2
        if score_statistic(flips, middle) > target:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def harm_p_value(flips: Flips, margin: float) -> float:
    """Test that the candidate loses more than the margin.

    Args:
        flips: What was observed.
        margin: The loss that is allowed, 0..1.

    Returns:
        The chance of flips at least as bad if the true loss were the margin.
    """
    return _NORMAL.cdf(score_statistic(flips, -margin))


def noninferiority_p_value(flips: Flips, margin: float) -> float:
    """Test that the candidate loses less than the margin.

    Args:
        flips: What was observed.
        margin: The loss that is allowed, 0..1.

    Returns:
        The chance of flips at least as good if the true loss were the margin; 1 for fewer
        documents than ``FEWEST_DOCUMENTS``.
    """
    if flips.units < FEWEST_DOCUMENTS:
        return 1.0
    return 1 - _NORMAL.cdf(score_statistic(flips, -margin))


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of several tests, so that any false alarm among them has the stated chance.

    Args:
        p_values: One per test.

    Returns:
        The adjusted ones in the same order; compare them with alpha.

    Source:
        Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
        of Statistics 6.
    """
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted = [0.0] * len(p_values)
    highest = 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = highest
    return adjusted


def passing_power(
    num_items: float, flip_rate: float, margin: float, *, alpha: float, difference: float = 0.0
) -> float:
    """Give the chance that a candidate passes.

    Args:
        num_items: Independent items.
        flip_rate: Share of items that flip either way.
        margin: The loss that is allowed.
        alpha: Of the one-sided test.
        difference: The candidate's true difference; 0: as good as the base.

    Returns:
        The power, 0..1, by the normal approximation of the score test.
    """
    spread, bound_spread = _spreads(flip_rate, margin, difference)
    shift = (margin + difference) * math.sqrt(num_items)
    return _NORMAL.cdf((shift - _NORMAL.inv_cdf(1 - alpha) * bound_spread) / spread)


def items_needed(
    flip_rate: float, margin: float, *, alpha: float, power: float = 0.8, difference: float = 0.0
) -> int | None:
    """Give how many items a verdict takes.

    Args:
        flip_rate: Share of items that flip either way.
        margin: The loss that is allowed.
        alpha: Of the one-sided test.
        power: The chance of a verdict that is asked for.
        difference: The true difference that is assumed. Above ``-margin`` the answer is for a
            pass, below it for a fail.

    Returns:
        Independent items; None where the difference is the margin itself, which no number decides.
    """
    distance = abs(difference + margin)
    if distance < 1e-9:
        return None
    z_alpha, z_power = _NORMAL.inv_cdf(1 - alpha), _NORMAL.inv_cdf(power)
    spread, bound_spread = _spreads(flip_rate, margin, difference)
    return math.ceil(((z_alpha * bound_spread + z_power * spread) / distance) ** 2)


def _spreads(flip_rate: float, margin: float, difference: float) -> tuple[float, float]:
    """Give one item's standard deviation in truth, and as the test at the margin takes it."""
    flip_rate = max(flip_rate, abs(difference))
    gain, harm = (flip_rate + difference) / 2, (flip_rate - difference) / 2
    truth = flip_rate - difference * difference
    supposed = _variance_under(gain, harm, -margin)
    return math.sqrt(max(truth, 1e-12)), math.sqrt(max(supposed, 1e-12))
