"""The last quarter of an hour in slices of ten seconds, for the dashboard."""

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
MOST_SAMPLES = 500
"""Latencies kept per slice; of more requests the first ones stand for all."""
PERCENTILES = (50, 95, 99)


Percentiles = tuple[float | None, ...]
"""One for each of ``PERCENTILES``."""


@dataclass(slots=True)
class Slice:
    """Ten seconds."""

    requests: int = 0
    failures: int = 0
    tokens: float = 0.0
    first_token: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    causes: Counter[str] = field(default_factory=Counter)
    _known: tuple[int, tuple[Percentiles, Percentiles]] = (-1, ((), ()))

    def percentiles(self) -> tuple[Percentiles, Percentiles]:
        """Give those of both latencies; sorted once, not at every look at the page."""
        if self._known[0] != len(self.whole):
            found = [
                tuple(percentile(values, p) for p in PERCENTILES)
                for values in (self.first_token, self.whole)
            ]
            self._known = (len(self.whole), (found[0], found[1]))
        return self._known[1]


class History:
    """What happened lately."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._slices: dict[int, Slice] = {}
        """By the number of ten seconds since the clock's zero."""

    def observe(self, seen: Observation) -> None:
        """Take a request in that is over."""
        if seen.ended is None:
            return
        here = self._at(self._number(seen.ended))
        if here is None:
            return
        here.requests += 1
        here.failures += seen.status != 200
        if seen.served.reason:
            here.causes[seen.served.reason] += 1
        answer = seen.answer
        if answer is None or seen.first is None:
            return
        if len(here.whole) < MOST_SAMPLES:
            here.first_token.append(seen.first - seen.started)
            here.whole.append(seen.ended - seen.started)
        self._spread_tokens(answer.num_tokens, answer.first or seen.ended, seen.ended)

    def _spread_tokens(self, count: int, start: float, end: float) -> None:
        """Count an answer's tokens in the slices in which they came, evenly."""
        first, last = self._number(start), self._number(end)
        share = 1.0 / (end - start) if end > start else 0.0
        for number in range(max(first, last - NUM_SLICES), last + 1):
            part = min(end, (number + 1) * SLICE_SECONDS) - max(start, number * SLICE_SECONDS)
            found = self._at(number)
            if found is not None:
                found.tokens += count * (part * share if share else 1.0)

    def _number(self, when: float) -> int:
        return int(when // SLICE_SECONDS)

    def _at(self, number: int) -> Slice | None:
        """Give a slice, made where it is missing; None for one that is not shown any more."""
        newest = max(number, *self._slices) if self._slices else number
        if number < newest - NUM_SLICES:
            return None
        if number not in self._slices:
            self._slices[number] = Slice()
            for old in [n for n in self._slices if n < newest - NUM_SLICES]:
                del self._slices[old]
        return self._slices[number]

    def series(self) -> dict[str, Any]:
        """Give the slices that are over, oldest first, as lists of numbers; None: nothing there."""
        now = self._number(self._clock())
        shown = [self._slices.get(n) or Slice() for n in range(now - NUM_SLICES, now)]
        return {
            "slice_seconds": SLICE_SECONDS,
            "requests_per_second": [one.requests / SLICE_SECONDS for one in shown],
            "failures_per_second": [one.failures / SLICE_SECONDS for one in shown],
            "tokens_per_second": [one.tokens / SLICE_SECONDS for one in shown],
            "first_token": _by_percentile([one.percentiles()[0] for one in shown]),
            "whole": _by_percentile([one.percentiles()[1] for one in shown]),
            "causes": dict(sum((one.causes for one in shown), Counter())),
        }


def _by_percentile(rows: Sequence[Percentiles]) -> dict[str, list[float | None]]:
    return {f"p{p}": [row[place] for row in rows] for place, p in enumerate(PERCENTILES)}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """Give the value that so many percent of the values do not exceed; None of none."""
    if not values:
        return None
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-len(ordered) * int(percent) // 100) - 1))]
