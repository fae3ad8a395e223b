"""Paired statistics of two models' answers to the same questions.

Pure computation, independent of models. Items of one document are not independent, so every method
uses documents as its units.

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

MIN_DOCUMENTS = 16
"""With fewer a candidate cannot pass: they are too few to estimate the variance."""
MIN_CORRELATION = 0.1
"""Minimum correlation assumed between items of one document. A sample may miss the few documents
that hold most of a loss; then it underestimates the correlation."""

_NORMAL = NormalDist()


@dataclass(frozen=True, slots=True, kw_only=True)
class Interval:
    """A two-sided interval; each of its ends is a one-sided bound at (1 + confidence) / 2."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Flips:
    """Counts of the items on which exactly one of two models is right."""

    num_items: int
    harmful: int
    """Items that only the base gets right."""
    beneficial: int
    """Items that only the candidate gets right."""
    design_effect: float = 1.0
    """Factor on the variance, because items of one document are correlated."""
    num_documents: float | None = None
    """Effective number of documents of equal size; None: every item is independent."""

    @property
    def units(self) -> float:
        """Number of independent units: documents, or independent items."""
        return self.num_items if self.num_documents is None else self.num_documents

    @property
    def difference(self) -> float:
        """Accuracy of the candidate minus that of the base."""
        return (self.beneficial - self.harmful) / self.num_items

    @property
    def rate(self) -> float:
        """Share of items on which exactly one model is right."""
        return (self.beneficial + self.harmful) / self.num_items


def count_flips(
    base: Sequence[bool], candidate: Sequence[bool], documents: Sequence[Hashable] | None = None
) -> Flips:
    """Count the flips between two models' answers to the same items.

    Args:
        base: Whether the base is right, per item.
        candidate: The same for the candidate, in the same order.
        documents: Document of each item; None: every item is independent.

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
    """Return the design effect: variance of a mean over documents, relative to independent items.

    Args:
        values: One value per item.
        documents: Index of each item's document.

    Returns:
        The ratio, at least that of a correlation of ``MIN_CORRELATION``.

    Source:
        Rao and Scott 1992, "A simple method for the analysis of clustered binary data",
        Biometrics 48; the minimum is Kish 1965, "Survey Sampling", section 8.2.
    """
    sizes = np.bincount(documents)
    minimum = 1 + MIN_CORRELATION * (float((sizes**2).sum()) / len(values) - 1)
    deviations = values - values.mean()
    independent = float((deviations**2).sum())
    n = len(sizes)
    if n < 2 or independent == 0:
        return minimum
    totals = np.bincount(documents, weights=deviations)
    return max(minimum, float((totals**2).sum()) * n / (n - 1) / independent)


def mcnemar_p_value(harmful: int, beneficial: int) -> float:
    """Return the exact two-sided p-value of McNemar's test.

    Args:
        harmful: Number of harmful flips.
        beneficial: Number of beneficial flips.

    Returns:
        The probability of flips at least as unequal if both models were equally good.

    Source:
        McNemar 1947; the binomial form, Liddell 1983.
    """
    flips = harmful + beneficial
    tail = sum(math.comb(flips, k) for k in range(min(harmful, beneficial) + 1))
    # Integers until the last step: a float overflows at 2**1024.
    return min(1.0, float(Fraction(2 * tail, 1 << flips)))


def score_statistic(flips: Flips, difference: float) -> float:
    """Return Tango's score statistic of the flips under a hypothetical true difference.

    Args:
        flips: The observed flips.
        difference: The true difference under the null hypothesis, -1..1.

    Returns:
        A standard normal value under the null hypothesis; negative if the candidate did worse.
        Unlike Wald's, a score statistic has a positive variance even if nothing flipped. With
        documents, the variance is estimated from few units, so Student's t is used.

    Source:
        Tango 1998, "Equivalence test and confidence interval for the difference in proportions
        for the paired-sample design", Statistics in Medicine 17, equations 4 to 8.
    """
    # The effective number of items.
    n = flips.num_items / flips.design_effect
    gain = flips.beneficial / flips.num_items
    harm = flips.harmful / flips.num_items
    variance = _variance_under(gain, harm, difference)
    distance = gain - harm - difference
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    score = distance * math.sqrt(n / variance)
    return score if flips.num_documents is None else _t_to_normal(score, flips.num_documents - 1)


def _t_to_normal(t: float, degrees: float) -> float:
    """Convert a value of Student's t to the standard normal value of the same tail probability.

    Args:
        t: A value of Student's t.
        degrees: Degrees of freedom; 0 (a single document) gives 0, no evidence.

    Returns:
        The normal value; accurate to a few hundredths from two degrees of freedom on.

    Source:
        Wallace 1959, "Bounds on normal approximations to Student's and the chi-square
        distributions", Annals of Mathematical Statistics 30, section 2.
    """
    if degrees < 1e-9:
        return 0.0
    size = math.sqrt(degrees * math.log1p(t * t / degrees))
    return math.copysign(size * (8 * degrees + 1) / (8 * degrees + 3), t)


def _variance_under(gain: float, harm: float, difference: float) -> float:
    """Return the variance of one item's difference at the constrained maximum-likelihood rates.

    Args:
        gain: Observed share of beneficial flips.
        harm: Observed share of harmful flips.
        difference: The true difference under the null hypothesis.

    Returns:
        The variance of a value that is -1, 0 or 1.
    """
    b = -gain - harm + (2 - gain + harm) * difference
    c = -harm * difference * (1 - difference)
    q = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    return 2 * q + difference * (1 - difference)


def difference_interval(flips: Flips, confidence: float) -> Interval:
    """Return the confidence interval of the true difference in accuracy.

    Args:
        flips: The observed flips.
        confidence: Confidence level of the two-sided interval, for example 0.9.

    Returns:
        Tango's score interval: all differences that the score test does not reject.
    """
    z = _NORMAL.inv_cdf((1 + confidence) / 2)
    return Interval(
        low=_solve_score(flips, z, -1.0, flips.difference),
        high=_solve_score(flips, -z, flips.difference, 1.0),
    )


def _solve_score(flips: Flips, target: float, low: float, high: float) -> float:
    """Find by bisection the difference at which the score, which decreases with it, has a value."""
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
        flips: The observed flips.
        margin: The allowed loss, 0..1.

    Returns:
        The probability of flips at least as bad if the true loss were the margin.
    """
    return _NORMAL.cdf(score_statistic(flips, -margin))


def noninferiority_p_value(flips: Flips, margin: float) -> float:
    """Test that the candidate loses less than the margin.

    Args:
        flips: The observed flips.
        margin: The allowed loss, 0..1.

    Returns:
        The probability of flips at least as good if the true loss were the margin; 1 for fewer
        documents than ``MIN_DOCUMENTS``.
    """
    if flips.units < MIN_DOCUMENTS:
        return 1.0
    return 1 - _NORMAL.cdf(score_statistic(flips, -margin))


def adjust_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values of multiple tests by Holm's method, to control the family-wise error rate.

    Args:
        p_values: One per test.

    Returns:
        The adjusted p-values in the same order; compare them with alpha.

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
    """Return the probability that a candidate passes.

    Args:
        num_items: Number of independent items.
        flip_rate: Share of items that flip in either direction.
        margin: The allowed loss.
        alpha: Level of the one-sided test.
        difference: The candidate's true difference; 0: as good as the base.

    Returns:
        The power, 0..1, by the normal approximation of the score test.
    """
    deviation, null_deviation = _standard_deviations(flip_rate, margin, difference)
    shift = (margin + difference) * math.sqrt(num_items)
    return _NORMAL.cdf((shift - _NORMAL.inv_cdf(1 - alpha) * null_deviation) / deviation)


def items_needed(
    flip_rate: float, margin: float, *, alpha: float, power: float = 0.8, difference: float = 0.0
) -> int | None:
    """Return the number of items needed for a verdict.

    Args:
        flip_rate: Share of items that flip in either direction.
        margin: The allowed loss.
        alpha: Level of the one-sided test.
        power: The required probability of a verdict.
        difference: The assumed true difference. Above ``-margin`` the verdict is a pass, below it a
            fail.

    Returns:
        Number of independent items; None if the difference equals the margin, where no number of
        items is enough.
    """
    distance = abs(difference + margin)
    if distance < 1e-9:
        return None
    z_alpha, z_power = _NORMAL.inv_cdf(1 - alpha), _NORMAL.inv_cdf(power)
    deviation, null_deviation = _standard_deviations(flip_rate, margin, difference)
    return math.ceil(((z_alpha * null_deviation + z_power * deviation) / distance) ** 2)


def _standard_deviations(flip_rate: float, margin: float, difference: float) -> tuple[float, float]:
    """Return one item's true standard deviation, and that under the null hypothesis of the test."""
    flip_rate = max(flip_rate, abs(difference))
    gain, harm = (flip_rate + difference) / 2, (flip_rate - difference) / 2
    variance = flip_rate - difference * difference
    null_variance = _variance_under(gain, harm, -margin)
    return math.sqrt(max(variance, 1e-12)), math.sqrt(max(null_variance, 1e-12))
