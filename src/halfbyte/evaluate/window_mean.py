"""The mean of a per-token quantity and its standard error over windows."""

from __future__ import annotations

import math


class WindowMean:
    """Mean per token and its standard error over windows, from one total per window.

    Tokens of a window are correlated (same article, same style), so a standard error over tokens
    would be several times too small. If window lengths differ, the mean is a ratio estimate.

    Source:
        Cochran 1977, "Sampling Techniques", 3rd edition, section 6.2 (ratio estimate).
    """

    def __init__(self) -> None:
        self._totals: list[float] = []
        self._counts: list[int] = []

    def add(self, total: float, count: int) -> None:
        """Add a window: the sum over its tokens and its number of tokens."""
        self._totals.append(total)
        self._counts.append(count)

    @property
    def num_windows(self) -> int:
        """Number of windows added."""
        return len(self._counts)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all windows."""
        return sum(self._counts)

    @property
    def mean(self) -> float:
        """Mean per token over all windows."""
        return math.fsum(self._totals) / self.num_tokens

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None for a single window."""
        n = self.num_windows
        if n < 2:
            return None
        mean = self.mean
        squares = math.fsum(
            (total - mean * count) ** 2
            for total, count in zip(self._totals, self._counts, strict=True)
        )
        return math.sqrt(squares * n / (n - 1)) / self.num_tokens
