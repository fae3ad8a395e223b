"""Time series of the last 15 minutes in slices of 10 seconds, for the dashboard."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.watch.observation import Observation

SLICE_SECONDS = 10.0
NUM_SLICES = 90
MAX_SAMPLES = 500
"""Latencies kept per slice, those of the first requests."""
PERCENTILES = (50, 95, 99)

Percentiles = tuple[float | None, ...]
"""One value for each of ``PERCENTILES``."""


@dataclass(slots=True)
class Slice:
    """What happened in 10 seconds."""

    requests: int = 0
    failures: int = 0
    tokens: float = 0.0
    first_token: list[float] = field(default_factory=list)
    """Seconds to the first token, by request."""
    whole: list[float] = field(default_factory=list)
    """Seconds to the end of the answer, by request."""
    causes: Counter[str] = field(default_factory=Counter)
    _cached: tuple[int, tuple[Percentiles, Percentiles]] = (-1, ((), ()))
    """Number of samples, and their percentiles."""

    def percentiles(self) -> tuple[Percentiles, Percentiles]:
        """Return the percentiles of both latencies; cached, because the page asks every second."""
        if self._cached[0] != len(self.whole):
            first_token = tuple(percentile(self.first_token, p) for p in PERCENTILES)
            whole = tuple(percentile(self.whole, p) for p in PERCENTILES)
            self._cached = (len(self.whole), (first_token, whole))
        return self._cached[1]


class History:
    """The recent slices."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._slices: dict[int, Slice] = {}
        """By slice number: the clock's time divided by ``SLICE_SECONDS``."""

    def observe(self, observation: Observation) -> None:
        """Add a finished request."""
        ended = observation.ended
        if ended is None:
            return
        current = self._get_slice(self._number(ended))
        if current is None:
            return
        current.requests += 1
        current.failures += observation.status != 200
        if observation.served.reason:
            current.causes[observation.served.reason] += 1
        answer = observation.answer
        if answer is None or observation.first is None:
            return
        if len(current.whole) < MAX_SAMPLES:
            current.first_token.append(observation.first - observation.started)
            current.whole.append(ended - observation.started)
        self._spread_tokens(answer.num_tokens, answer.first or ended, ended)

    def _spread_tokens(self, count: int, start: float, end: float) -> None:
        """Distribute an answer's tokens evenly over the slices in which it was generated."""
        first, last = self._number(start), self._number(end)
        share = 1.0 / (end - start) if end > start else 0.0
        for number in range(max(first, last - NUM_SLICES), last + 1):
            part = min(end, (number + 1) * SLICE_SECONDS) - max(start, number * SLICE_SECONDS)
            current = self._get_slice(number)
            if current is not None:
                current.tokens += count * (part * share if share else 1.0)

    def _number(self, when: float) -> int:
        return int(when // SLICE_SECONDS)

    def _get_slice(self, number: int) -> Slice | None:
        """Return a slice, created if it is missing; None if it is too old to be shown."""
        newest = max(number, *self._slices) if self._slices else number
        if number < newest - NUM_SLICES:
            return None
        if number not in self._slices:
            self._slices[number] = Slice()
            for old in [n for n in self._slices if n < newest - NUM_SLICES]:
                del self._slices[old]
        return self._slices[number]

    def series(self) -> dict[str, Any]:
        """Return the completed slices, oldest first, as lists of numbers (None: no requests)."""
        now = self._number(self._clock())
        slices = [self._slices.get(n) or Slice() for n in range(now - NUM_SLICES, now)]
        return {
            "slice_seconds": SLICE_SECONDS,
            "requests_per_second": [item.requests / SLICE_SECONDS for item in slices],
            "failures_per_second": [item.failures / SLICE_SECONDS for item in slices],
            "tokens_per_second": [item.tokens / SLICE_SECONDS for item in slices],
            "first_token": _by_percentile([item.percentiles()[0] for item in slices]),
            "whole": _by_percentile([item.percentiles()[1] for item in slices]),
            "causes": dict(sum((item.causes for item in slices), Counter())),
        }


def _by_percentile(rows: Sequence[Percentiles]) -> dict[str, list[float | None]]:
    return {f"p{p}": [row[index] for row in rows] for index, p in enumerate(PERCENTILES)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Return a percentile by the nearest-rank method; None if there are no values."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]
