"""A circuit breaker: a model that keeps failing gets no requests for a while, then one to test it.

::

    closed ──consecutive failures──> open ──pause──> half-open ──success──> closed
                                      ^──────────────── failure, twice the pause

Source:
    Nygard 2018, "Release It!", second edition, chapter 5.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]

MAX_PAUSE_FACTOR = 16
"""The longest pause, as a multiple of the first one."""

Clock = Callable[[], float]
"""Returns monotonic seconds, like :func:`time.monotonic`."""


class CircuitBreaker:
    """Decides whether requests may be sent to one model."""

    def __init__(
        self, *, failures: int = 5, seconds: float = 5.0, clock: Clock = time.monotonic
    ) -> None:
        """Start closed.

        Args:
            failures: Consecutive failures that open it.
            seconds: The first pause; it doubles each time the test request fails.
            clock: Returns monotonic seconds.
        """
        self._max_failures = failures
        self._first_pause = seconds
        self._clock = clock
        self._failures = 0
        self._pause = seconds
        self._open_until: float | None = None
        """End of the pause; None while closed."""
        self._is_testing = False
        """Whether a test request is running."""

    @property
    def state(self) -> State:
        """The current state."""
        if self._open_until is None:
            return "closed"
        return "open" if self._clock() < self._open_until else "half-open"

    @property
    def seconds_left(self) -> float:
        """Seconds until a test request is allowed; 0 if one is allowed now."""
        return 0.0 if self._open_until is None else max(0.0, self._open_until - self._clock())

    @property
    def allows_request(self) -> bool:
        """Whether :meth:`try_acquire` would allow a request."""
        return self._open_until is None or (
            not self._is_testing and self._clock() >= self._open_until
        )

    def try_acquire(self) -> bool:
        """Ask to send a request; if allowed, call one of the three methods below when it ends.

        Returns:
            Whether the request may be sent. While half-open, only one at a time may.
        """
        if not self.allows_request:
            return False
        self._is_testing = self._open_until is not None
        return True

    def record_success(self) -> None:
        """Record that the model answered, and close."""
        self._failures, self._open_until, self._is_testing = 0, None, False
        self._pause = self._first_pause

    def record_failure(self) -> None:
        """Record a failure of the model. Errors caused by the request do not count as failures."""
        self._failures += 1
        if self._is_testing:
            self._pause = min(2 * self._pause, MAX_PAUSE_FACTOR * self._first_pause)
            self._open_until = self._clock() + self._pause
            self._is_testing = False
        elif self._open_until is None and self._failures >= self._max_failures:
            self._open_until = self._clock() + self._pause

    def release(self) -> None:
        """Record that the request ended without a result, such as when its client disconnected."""
        self._is_testing = False
