"""A circuit breaker: a model that keeps failing is left alone, then tried with one request.

::

    closed ──failures in a row──> open ──after a while──> half-open ──success──> closed
                                    ^──────────────────────── failure, twice the while

Source:
    Nygard 2018, "Release It!", second edition, chapter 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]

LONGEST = 16
"""Times the first pause; a model that is back is found within so long."""

Clock = Callable[[], float]
"""Seconds that only go forward: the time of day may jump and does not matter."""


class CircuitBreaker:
    """Whether a model may be asked now."""

    def __init__(
        self, *, failures: int = 5, seconds: float = 5.0, clock: Clock = time.monotonic
    ) -> None:
        """Start closed.

        Args:
            failures: In a row, until it opens.
            seconds: First pause; it doubles with every failed try.
            clock: The time.
        """
        self._limit = failures
        self._seconds = seconds
        self._clock = clock
        self._failures = 0
        self._pause = seconds
        self._until: float | None = None
        """End of the pause; None: closed."""
        self._trying = False

    @property
    def state(self) -> State:
        """Where it stands."""
        if self._until is None:
            return "closed"
        return "open" if self._clock() < self._until else "half-open"

    @property
    def seconds_left(self) -> float:
        """Until it lets a request try; 0 where one may."""
        return 0.0 if self._until is None else max(0.0, self._until - self._clock())

    @property
    def allows(self) -> bool:
        """Whether :meth:`enter` would let a request through."""
        return self._until is None or (not self._trying and self._clock() >= self._until)

    def enter(self) -> bool:
        """Ask to send a request; where it is allowed, one of the three below must follow.

        Returns:
            Whether it is allowed. Half-open, only one at a time is.
        """
        if not self.allows:
            return False
        self._trying = self._until is not None
        return True

    def succeed(self) -> None:
        """Note that the model answered."""
        self._failures, self._until, self._trying = 0, None, False
        self._pause = self._seconds

    def fail(self) -> None:
        """Note that the model failed; what the request is to blame for is no failure."""
        self._failures += 1
        if self._trying:
            self._pause = min(2 * self._pause, LONGEST * self._seconds)
            self._until = self._clock() + self._pause
            self._trying = False
        elif self._until is None and self._failures >= self._limit:
            self._until = self._clock() + self._pause

    def leave(self) -> None:
        """Note that the request ended without telling anything, such as by its client."""
        self._trying = False
