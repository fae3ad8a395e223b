"""Bootstrap of a mean per token over whole documents: intervals and p-values.

Pure computation, as in :mod:`halfbyte.judge.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.judge.statistics import MIN_DOCUMENTS, Floats, Interval

RESAMPLES = 4000
"""Enough that the Monte Carlo error is well below the standard error of the data."""
DRAWN_AT_ONCE = 2**20
"""Documents drawn at a time, over several resamples: all of them would take gigabytes of memory for
ten thousand documents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioBootstrap:
    """A mean per token and its bootstrap distribution over documents."""

    mean: float
    standard_error: float
    studentized: Floats
    """Sorted, one per resample: (resampled mean - mean) / standard error of the resample."""

    def interval(self, confidence: float) -> Interval:
        """Return the bootstrap-t interval.

        Args:
            confidence: Confidence level of the two-sided interval.

        Returns:
            The interval of the true mean.
        """
        low, high = np.quantile(self.studentized, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(
            low=self.mean - float(high) * self.standard_error,
            high=self.mean - float(low) * self.standard_error,
        )

    def p_value_above(self, value: float) -> float:
        """Return the probability of a mean this high or higher if the true mean were ``value``."""
        return self._share_at_or_above(value)

    def p_value_below(self, value: float) -> float:
        """Return the probability of a mean this low or lower if the true mean were ``value``."""
        return 1 - self._share_at_or_above(value)

    def _share_at_or_above(self, value: float) -> float:
        if self.standard_error == 0:
            return 0.0 if self.mean > value else 1.0
        observed = (self.mean - value) / self.standard_error
        above = len(self.studentized) - int(np.searchsorted(self.studentized, observed))
        return (above + 1) / (len(self.studentized) + 2)


def bootstrap_ratio(
    totals: Sequence[float], counts: Sequence[int], *, seed: int = 0, resamples: int = RESAMPLES
) -> RatioBootstrap | None:
    """Bootstrap the mean per token by resampling documents with replacement.

    Args:
        totals: Per document, the sum of a quantity over its tokens, such as a paired difference.
        counts: Per document, its number of tokens.
        seed: Seed of the resampling.
        resamples: Number of resamples.

    Returns:
        The bootstrap; None for fewer documents than ``MIN_DOCUMENTS``.

    Source:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5 (bootstrap-t);
        the standard error is that of a ratio (Cochran 1977, section 6.2).
    """
    t, c = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n = len(t)
    if n < MIN_DOCUMENTS:
        return None
    mean, error = _ratio(t[None], c[None])
    rng, rows = np.random.default_rng(seed), max(1, DRAWN_AT_ONCE // n)
    parts = []
    for start in range(0, resamples, rows):
        picks = rng.integers(0, n, size=(min(rows, resamples - start), n))
        parts.append(_ratio(t[picks], c[picks]))
    means, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
    # A resample that consists of one document only has no standard error.
    usable = errors > 1e-12 * max(float(error[0]), 1e-300)
    studentized = np.sort((means[usable] - mean[0]) / errors[usable])
    if float(error[0]) == 0 or not len(studentized):
        studentized = np.zeros(1)
    return RatioBootstrap(
        mean=float(mean[0]), standard_error=float(error[0]), studentized=studentized
    )


def _ratio(totals: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Return means per token and their standard errors; one row per sample of documents."""
    n = totals.shape[1]
    tokens = counts.sum(axis=1)
    mean = totals.sum(axis=1) / tokens
    squares = ((totals - mean[:, None] * counts) ** 2).sum(axis=1)
    return mean, np.sqrt(squares * n / (n - 1)) / tokens
