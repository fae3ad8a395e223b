"""A mean per token with what resampling whole documents says about it.

Numbers in, numbers out, as in :mod:`halfbyte.judge.statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from halfbyte.judge.statistics import FEWEST_DOCUMENTS, Floats, Interval

RESAMPLES = 4000
"""Of the bootstrap: its own error is then well below that of the data."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RatioBootstrap:
    """A mean per token and what resampling documents says about it."""

    mean: float
    standard_error: float
    studentized: Floats
    """Sorted: (resampled mean - mean) / its own standard error, one per resample."""

    def interval(self, confidence: float) -> Interval:
        """Give the bootstrap-t interval.

        Args:
            confidence: Of the two-sided interval.

        Returns:
            The interval of the true mean.
        """
        low, high = np.quantile(self.studentized, [(1 - confidence) / 2, (1 + confidence) / 2])
        return Interval(
            low=self.mean - float(high) * self.standard_error,
            high=self.mean - float(low) * self.standard_error,
        )

    def p_value_above(self, value: float) -> float:
        """Give the chance of a mean at least this high if the true one were ``value``."""
        return self._share_at_or_above(value)

    def p_value_below(self, value: float) -> float:
        """Give the chance of a mean at most this low if the true one were ``value``."""
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
    """Resample documents with replacement: the mean per token, studentized.

    Args:
        totals: One per document: the sum over its tokens of a paired difference.
        counts: One per document: its tokens.
        seed: Of the resampling.
        resamples: How many.

    Returns:
        The bootstrap, or None for fewer documents than ``FEWEST_DOCUMENTS``.

    Source:
        Efron and Tibshirani 1993, "An Introduction to the Bootstrap", section 12.5 (bootstrap-t);
        the standard error is that of a ratio (Cochran 1977, section 6.2).
    """
    t, c = np.asarray(totals, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    n = len(t)
    if n < FEWEST_DOCUMENTS:
        return None
    picks = np.random.default_rng(seed).integers(0, n, size=(resamples, n))
    mean, error = _ratio(t[None], c[None])
    means, errors = _ratio(t[picks], c[picks])
    # A resample of one document many times has no spread of its own.
    usable = errors > 1e-12 * max(float(error[0]), 1e-300)
    studentized = np.sort((means[usable] - mean[0]) / errors[usable])
    if float(error[0]) == 0 or not len(studentized):
        studentized = np.zeros(1)
    return RatioBootstrap(
        mean=float(mean[0]), standard_error=float(error[0]), studentized=studentized
    )


def _ratio(totals: Floats, counts: Floats) -> tuple[Floats, Floats]:
    """Give means per token and their standard errors; one row per sample of documents."""
    n = totals.shape[1]
    tokens = counts.sum(axis=1)
    mean = totals.sum(axis=1) / tokens
    squares = ((totals - mean[:, None] * counts) ** 2).sum(axis=1)
    return mean, np.sqrt(squares * n / (n - 1)) / tokens
