"""Sequential tests: they may be evaluated after every request, with a type I error below alpha.

Evidence is the wealth of a gambler who bets against a hypothesis at fair odds: if the hypothesis is
true, the wealth ever reaches 1 / alpha with a probability of at most alpha (Ville's inequality).

Source:
    Waudby-Smith and Ramdas 2024, "Estimating means of bounded random variables by betting", JRSS B
    86 (the capital process of section 4; here a mixture over a grid of bets, their section 4.4).
    Ville 1939 (the inequality). Johari, Koomen, Pekelis, Walsh 2022, "Always valid inference",
    Operations Research 70 (why tests that are peeked at need it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

NUM_BETS = 24
MAX_BET = 0.95
"""Largest bet, as a share of the largest one possible; at 1 a single loss would take everything."""
BET_RATIO = 0.75
"""Ratio of one bet of the grid to the next larger one."""


class BettingTest:
    """Evidence against the hypothesis "the mean is at most ``bound``".

    It stays valid if the values' distribution changes over time, as long as the conditional mean of
    each value, given the past, is at most the bound under the hypothesis.
    """

    def __init__(self, low: float, bound: float, *, log_wealth: Sequence[float] = ()) -> None:
        """Start without evidence, or resume.

        Args:
            low: The smallest possible value.
            bound: Upper bound of the mean under the hypothesis; above ``low``.
            log_wealth: A saved :attr:`log_wealth` to resume from.

        Raises:
            ValueError: The saved wealth is of another number of bets.
        """
        self._bound = bound
        self._bets = bet_sizes(low, bound)
        if len(log_wealth) not in (0, NUM_BETS):
            raise ValueError(f"wealth of {len(log_wealth)} bets, not {NUM_BETS}")
        self._log_wealth = np.array(log_wealth or [0.0] * NUM_BETS, dtype=np.float64)

    def update(self, value: float) -> None:
        """Add one value."""
        self._log_wealth += np.log1p(self._bets * (value - self._bound))

    @property
    def log_wealth(self) -> list[float]:
        """Natural logarithm of each bet's wealth."""
        return [float(value) for value in self._log_wealth]

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the mean wealth; at log(1 / alpha) the hypothesis is rejected."""
        largest = float(self._log_wealth.max())
        return largest + math.log(float(np.exp(self._log_wealth - largest).mean()))


def bet_sizes(low: float, bound: float) -> NDArray[np.float64]:
    """Return the grid of bets, largest first."""
    largest = MAX_BET / (bound - low)
    return np.array([largest * BET_RATIO**step for step in range(NUM_BETS)])


class TwoArmTest:
    """Tests whether a candidate fails more often than the present model, or not by a margin.

    Each request is assigned at random to one of the two arms. A failure counts 1 / share in the
    candidate's arm and -1 / (1 - share) in the other, so that its mean is the difference of the two
    failure rates, also if the traffic changes.
    """

    def __init__(
        self,
        share: float,
        margin: float,
        *,
        worse: Sequence[float] = (),
        as_good: Sequence[float] = (),
    ) -> None:
        """Start without evidence, or resume.

        Args:
            share: Probability that a request is assigned to the candidate.
            margin: Difference of failure rates up to which the candidate counts as good.
            worse: Saved log wealth of :attr:`worse` to resume from.
            as_good: Saved log wealth of :attr:`as_good` to resume from.
        """
        self._share = share
        self.worse = BettingTest(-1 / (1 - share), 0.0, log_wealth=worse)
        """Evidence against "the candidate fails no more often"."""
        self.as_good = BettingTest(-1 / share, -margin, log_wealth=as_good)
        """Evidence against "the candidate fails more often by at least the margin"."""

    def update(self, *, candidate: bool, failed: bool) -> None:
        """Add one request."""
        weight = 1 / self._share if candidate else -1 / (1 - self._share)
        value = weight if failed else 0.0
        self.worse.update(value)
        self.as_good.update(-value)


class PairedTest:
    """The same test for requests that both models answered."""

    def __init__(
        self, margin: float, *, worse: Sequence[float] = (), as_good: Sequence[float] = ()
    ) -> None:
        """Start without evidence, or resume.

        Args:
            margin: Difference of failure rates up to which the candidate counts as good.
            worse: Saved log wealth of :attr:`worse` to resume from.
            as_good: Saved log wealth of :attr:`as_good` to resume from.
        """
        self.worse = BettingTest(-1.0, 0.0, log_wealth=worse)
        self.as_good = BettingTest(-1.0, -margin, log_wealth=as_good)

    def update(self, *, base_failed: bool, candidate_failed: bool) -> None:
        """Add one request."""
        value = float(candidate_failed) - float(base_failed)
        self.worse.update(value)
        self.as_good.update(-value)


def requests_until_rejected(
    rates: tuple[float, float], share: float, alpha: float, *, power: float = 0.95
) -> int | None:
    """Estimate after how many requests a worse candidate is rejected.

    Uses the normal approximation of one bet's log wealth, for the fastest bet of the grid; the
    mixture has at least 1 / ``NUM_BETS`` of its wealth.

    Args:
        rates: Failure rates of the present model and of the candidate.
        share: Share of the requests that the candidate gets.
        alpha: Probability of a false alarm.
        power: Probability that the candidate is rejected within the estimate.

    Returns:
        Requests of both arms together; None if the candidate is not worse, or by so little that
        even the smallest bet does not grow.
    """
    base, candidate = rates
    if candidate <= base:
        return None
    z = NormalDist().inv_cdf(power)
    needed = math.log(NUM_BETS / alpha)
    best = math.inf
    probabilities = np.array([share * candidate, (1 - share) * base])
    for bet in bet_sizes(-1 / (1 - share), 0.0):
        gains = np.log1p(bet * np.array([1 / share, -1 / (1 - share)]))
        growth = float(probabilities @ gains)
        if growth <= 0:
            continue
        deviation = math.sqrt(float(probabilities @ gains**2) - growth**2)
        root = z * deviation + math.sqrt((z * deviation) ** 2 + 4 * growth * needed)
        root /= 2 * growth
        best = min(best, root**2)
    return math.ceil(best) if math.isfinite(best) else None
