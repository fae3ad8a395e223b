"""Limits on fallback (requests and tokens per minute and per day) and on retries."""

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
NUM_SLOTS = 60
"""Slots of a sliding window. Spending expires one slot at a time."""

RETRY_RESERVE = 64.0
"""Retries available at the start, so that a failure during a burst of requests loses none."""


class SpendingWindow:
    """A sliding window of what was spent, with a limit."""

    def __init__(self, limit: int | None, seconds: float, clock: Clock = time.monotonic) -> None:
        """Start with nothing spent.

        Args:
            limit: The most that may be spent within the window; None: no limit.
            seconds: Length of the window.
            clock: Returns monotonic seconds.
        """
        self._limit = limit
        self._slot_seconds = seconds / NUM_SLOTS
        self._clock = clock
        self._slots: deque[list[float]] = deque()
        """[slot number, amount], oldest first."""
        self._total = 0.0

    @property
    def spent(self) -> float:
        """What was spent in the window that ends now."""
        last_expired = math.floor(self._clock() / self._slot_seconds) - NUM_SLOTS
        while self._slots and self._slots[0][0] <= last_expired:
            self._total -= self._slots.popleft()[1]
        return self._total

    @property
    def has_left(self) -> bool:
        """Whether the limit is not reached."""
        return self._limit is None or self.spent < self._limit

    def spend(self, amount: float, *, seconds_ago: float = 0.0) -> None:
        """Record spending. Past spending must be recorded oldest first."""
        slot = math.floor((self._clock() - seconds_ago) / self._slot_seconds)
        if not self._slots or self._slots[-1][0] != slot:
            self._slots.append([slot, 0.0])
        self._slots[-1][1] += amount
        self._total += amount

    def ages(self) -> list[tuple[float, float]]:
        """Return the spending within the window as (seconds ago, amount), oldest first."""
        if not self.spent:
            return []
        now = self._clock()
        return [(now - slot * self._slot_seconds, amount) for slot, amount in self._slots]


@dataclass(frozen=True, slots=True)
class FallbackBudget:
    """The requests and tokens that fallback models may use.

    A request that has started is always finished, so the last ones may exceed the token limit.
    """

    requests: tuple[SpendingWindow, SpendingWindow]
    """Per minute and per day."""
    tokens: tuple[SpendingWindow, SpendingWindow]
    """Per minute and per day."""

    @classmethod
    def from_config(cls, config: QualityConfig, clock: Clock = time.monotonic) -> FallbackBudget:
        """Create the budget that the settings define."""
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
        """Whether another request may be sent to a fallback model."""
        return all(window.has_left for window in self._windows)

    def spend_request(self) -> None:
        """Record a request when it is sent."""
        for window in self.requests:
            window.spend(1)

    def spend_tokens(self, count: int) -> None:
        """Record the prompt and completion tokens of a request."""
        for window in self.tokens:
            window.spend(count)

    def state(self, now: float) -> dict[str, Any]:
        """Return what was spent, so that it can be saved for a restart.

        Args:
            now: Unix time in seconds. The monotonic clock does not survive a reboot.

        Returns:
            JSON-serializable values.
        """
        return {"time": now, "spent": [window.ages() for window in self._windows]}

    def restore(self, state: Mapping[str, Any], now: float) -> None:
        """Restore what was spent before a restart.

        Args:
            state: From :meth:`state`.
            now: Unix time in seconds. If it was set back, no time counts as elapsed.
        """
        elapsed = max(0.0, now - float(state["time"]))
        for window, spent in zip(self._windows, state["spent"], strict=True):
            for seconds_ago, amount in spent:
                window.spend(float(amount), seconds_ago=float(seconds_ago) + elapsed)

    @property
    def _windows(self) -> tuple[SpendingWindow, ...]:
        return (*self.requests, *self.tokens)


class RetryBudget:
    """Limits retries to a share of the requests, so that an outage does not double the load.

    Source:
        Finagle's RetryBudget: a token bucket to which each request adds a share.
    """

    def __init__(self, share: float) -> None:
        """Start with the reserve.

        Args:
            share: Retries that each request adds.
        """
        self._share = share
        self._left = RETRY_RESERVE if share else 0.0

    def add_request(self) -> None:
        """Record a request."""
        self._left = min(RETRY_RESERVE, self._left + self._share)

    def try_spend(self) -> bool:
        """Spend one retry.

        Returns:
            Whether one was left.
        """
        if self._left < 1:
            return False
        self._left -= 1
        return True
