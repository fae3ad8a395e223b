"""Tests that may be looked at after every request: their false alarms stay at alpha all the same.

Evidence is the money of a gambler who bets against a hypothesis at fair odds: if the hypothesis is
true, the money reaches 1 / alpha with a chance of at most alpha, at whatever time one looks.

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
LARGEST_BET = 0.95
"""Of what may be bet at all: at 1 a single loss takes everything."""
STEP = 0.75
"""From one bet of the grid to the next smaller one."""


class BettingTest:
    """Evidence against "the mean is at most ``bound``", for values in [low, high].

    It stays valid when the values' distribution changes over time, as long as the mean of each,
    given the past, is at most the bound.
    """

    def __init__(self, low: float, bound: float, *, log_wealth: Sequence[float] = ()) -> None:
        """Start with nothing known.

        Args:
            low: The smallest value there can be.
            bound: Of the mean, if the hypothesis is true; above ``low``.
            log_wealth: What :attr:`log_wealth` was, to go on from there.
        """
        self._bound = bound
        self._bets = bet_sizes(low, bound)
        self._log_wealth = np.zeros(NUM_BETS)
        if len(log_wealth) == NUM_BETS:
            self._log_wealth = np.array(log_wealth, dtype=np.float64)

    def update(self, value: float) -> None:
        """Take one value in."""
        self._log_wealth += np.log1p(self._bets * (value - self._bound))

    @property
    def log_wealth(self) -> list[float]:
        """Of each bet."""
        return [float(value) for value in self._log_wealth]

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the mean wealth; at log(1 / alpha) the hypothesis is rejected."""
        largest = float(self._log_wealth.max())
        return largest + math.log(float(np.exp(self._log_wealth - largest).mean()))


def bet_sizes(low: float, bound: float) -> NDArray[np.float64]:
    """Give the grid of bets, the largest first."""
    largest = LARGEST_BET / (bound - low)
    return np.array([largest * STEP**step for step in range(NUM_BETS)])


class TwoArmTest:
    """Does a candidate fail more often than the present model, or not much more often?

    Each request is drawn at random for one of the two arms. A failure counts 1 / share for the
    candidate's arm and -1 / (1 - share) for the other: its mean is the difference of the two rates,
    whatever the traffic is like at that time.
    """

    def __init__(
        self,
        share: float,
        margin: float,
        *,
        worse: Sequence[float] = (),
        as_good: Sequence[float] = (),
    ) -> None:
        """Start with nothing known.

        Args:
            share: Chance that a request is drawn for the candidate.
            margin: How much more often it may fail and still count as good.
            worse: Log wealth of :attr:`worse`, to go on from there.
            as_good: The same of :attr:`as_good`.
        """
        self._share = share
        self.worse = BettingTest(-1 / (1 - share), 0.0, log_wealth=worse)
        """Against "it fails no more often"."""
        self.as_good = BettingTest(-1 / share, -margin, log_wealth=as_good)
        """Against "it fails more often by the margin, or by more"."""

    def update(self, *, candidate: bool, failed: bool) -> None:
        """Take one request in."""
        weight = 1 / self._share if candidate else -1 / (1 - self._share)
        value = weight if failed else 0.0
        self.worse.update(value)
        self.as_good.update(-value)


class PairedTest:
    """The same where both models answered the same request."""

    def __init__(self, margin: float) -> None:
        """Start with nothing known.

        Args:
            margin: How much more often the candidate may fail and still count as good.
        """
        self.worse = BettingTest(-1.0, 0.0)
        self.as_good = BettingTest(-1.0, -margin)

    def update(self, *, base_failed: bool, candidate_failed: bool) -> None:
        """Take one pair in."""
        value = float(candidate_failed) - float(base_failed)
        self.worse.update(value)
        self.as_good.update(-value)


def requests_until_rejected(
    rates: tuple[float, float], share: float, alpha: float, *, power: float = 0.95
) -> int | None:
    """Give after how many requests a worse candidate is found out.

    Args:
        rates: Share of requests that fail: of the present model, of the candidate.
        share: Of the requests that the candidate gets.
        alpha: Chance of a false alarm.
        power: Chance that it is found within the number.

    Returns:
        Requests of both arms together; None where the candidate is not worse, or by so little that
        even the smallest bet on it does not grow. The normal approximation of one bet's log wealth,
        for the bet with which it is soonest; the mixture has at least 1 / ``NUM_BETS`` of its
        wealth.
    """
    base, candidate = rates
    if candidate <= base:
        return None
    z = NormalDist().inv_cdf(power)
    goal = math.log(NUM_BETS / alpha)
    best = math.inf
    chances = np.array([share * candidate, (1 - share) * base])
    for bet in bet_sizes(-1 / (1 - share), 0.0):
        gains = np.log1p(bet * np.array([1 / share, -1 / (1 - share)]))
        growth = float(chances @ gains)
        if growth <= 0:
            continue
        spread = math.sqrt(float(chances @ gains**2) - growth**2)
        root = (z * spread + math.sqrt((z * spread) ** 2 + 4 * growth * goal)) / (2 * growth)
        best = min(best, root**2)
    return math.ceil(best) if math.isfinite(best) else None
