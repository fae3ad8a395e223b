"""How much may be spent on other models: per minute and day, and on second tries."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.breaker import Clock

MINUTE, DAY = 60.0, 86_400.0
PARTS = 60
"""Of a window: what was spent leaves it in so many steps."""

RETRY_RESERVE = 64.0
"""Second tries that are there at once, so that a failure under a burst of requests loses none."""


class SpendingWindow:
    """What was spent in the last so many seconds, against a limit."""

    def __init__(self, limit: int | None, seconds: float, clock: Clock = time.monotonic) -> None:
        """Start with nothing spent.

        Args:
            limit: None: no limit.
            seconds: Length.
            clock: The time.
        """
        self._limit = limit
        self._part = seconds / PARTS
        self._clock = clock
        self._spent: deque[list[float]] = deque()
        """[number of the part, amount], oldest first."""
        self._total = 0.0

    @property
    def spent(self) -> float:
        """In the window that ends now."""
        first = math.floor(self._clock() / self._part) - PARTS
        while self._spent and self._spent[0][0] <= first:
            self._total -= self._spent.popleft()[1]
        return self._total

    @property
    def has_left(self) -> bool:
        """Whether something is left."""
        return self._limit is None or self.spent < self._limit

    def spend(self, amount: float, *, seconds_ago: float = 0.0) -> None:
        """Note that something was spent; what was spent longer ago is noted first."""
        part = math.floor((self._clock() - seconds_ago) / self._part)
        if not self._spent or self._spent[-1][0] != part:
            self._spent.append([part, 0.0])
        self._spent[-1][1] += amount
        self._total += amount

    def ages(self) -> list[tuple[float, float]]:
        """Give what counts in the window that ends now: (seconds ago, amount), oldest first."""
        if not self.spent:
            return []
        now = self._clock()
        return [(now - part * self._part, amount) for part, amount in self._spent]


@dataclass(frozen=True, slots=True)
class FallbackBudget:
    """Requests and tokens that the larger model may take.

    A request that has begun is finished: the tokens of the last ones may go over the limit.
    """

    requests: tuple[SpendingWindow, SpendingWindow]
    tokens: tuple[SpendingWindow, SpendingWindow]

    @classmethod
    def of(cls, config: QualityConfig, clock: Clock = time.monotonic) -> FallbackBudget:
        """Make the budget that the settings give."""
        return cls(
            requests=(
                SpendingWindow(config.fallback_requests_per_minute, MINUTE, clock),
                SpendingWindow(config.fallback_requests_per_day, DAY, clock),
            ),
            tokens=(
                SpendingWindow(config.fallback_tokens_per_minute, MINUTE, clock),
                SpendingWindow(config.fallback_tokens_per_day, DAY, clock),
            ),
        )

    @property
    def has_left(self) -> bool:
        """Whether one more request may be sent."""
        return all(window.has_left for window in self._windows)

    def spend_request(self) -> None:
        """Note a request as it is sent."""
        for window in self.requests:
            window.spend(1)

    def spend_tokens(self, count: int) -> None:
        """Note the tokens that one took."""
        for window in self.tokens:
            window.spend(count)

    def state(self, now: float) -> dict[str, Any]:
        """Give what was spent, for a restart to go on from.

        Args:
            now: The time of day, in seconds: the other clock begins anew with a machine.

        Returns:
            Plain values.
        """
        return {"time": now, "spent": [window.ages() for window in self._windows]}

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        """Take back what was spent before.

        Args:
            state: Of :meth:`state`.
            now: The time of day. Where it was set back, no time has passed.
        """
        passed = max(0.0, now - float(state["time"]))
        for window, spent in zip(self._windows, state["spent"], strict=True):
            for seconds_ago, amount in spent:
                window.spend(float(amount), seconds_ago=float(seconds_ago) + passed)

    @property
    def _windows(self) -> tuple[SpendingWindow, ...]:
        return (*self.requests, *self.tokens)


class RetryBudget:
    """Second tries as a share of requests: when everything fails, load does not double.

    Source:
        Finagle's RetryBudget: a token bucket that every request puts a share into.
    """

    def __init__(self, share: float) -> None:
        """Start with the reserve.

        Args:
            share: That each request adds.
        """
        self._share = share
        self._left = RETRY_RESERVE if share else 0.0

    def add_request(self) -> None:
        """Note a request."""
        self._left = min(RETRY_RESERVE, self._left + self._share)

    def take(self) -> bool:
        """Take one second try.

        Returns:
            Whether there was one.
        """
        if self._left < 1:
            return False
        self._left -= 1
        return True
