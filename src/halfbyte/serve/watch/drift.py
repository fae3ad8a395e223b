"""What has changed over the last answers: rates of failed checks, lengths, entropies.

Lengths and entropies are held against a reference: the answers of a comparison, or, where there is
none, the first ones that were served. They have drifted where the difference of means is both
beyond chance and large; with many answers a difference that nobody would notice is beyond chance.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import ConfigError
from halfbyte.serve.backend import Call
from halfbyte.serve.quality_config import CHECKS
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import Observation, Seen

WINDOW = 256
"""Last answers that are looked at."""
FEWEST = 32
"""Answers before anything is said."""
FIRST = 512
"""Answers that become the reference where none is given."""
SURE = 4.0
"""Standard errors; with a look at every answer 2 would be crossed all the time."""
LARGE = 0.5
"""Standard deviations of the reference (Cohen's medium effect)."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and variance of a figure."""

    count: int
    mean: float
    variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What answers usually are like."""

    spreads: dict[str, Spread]
    """By figure: ``length`` (log of 1 + tokens), ``entropy`` (mean nats of a token)."""
    failures: dict[str, float]
    """Usual share by check."""


class Window:
    """Mean and variance of the last values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._sum = self._squares = 0.0

    def add(self, value: float) -> None:
        """Take a value in, and forget one where there are too many."""
        self._values.append(value)
        self._sum += value
        self._squares += value * value
        if len(self._values) > self._size:
            old = self._values.popleft()
            self._sum -= old
            self._squares -= old * old

    @property
    def is_full(self) -> bool:
        """Whether the next value makes it forget one."""
        return len(self._values) >= self._size

    def spread(self) -> Spread:
        """Give mean and variance."""
        count = len(self._values)
        mean = self._sum / count if count else 0.0
        return Spread(count, mean, max(0.0, self._squares / count - mean * mean) if count else 0.0)


class Drift:
    """The last answers against what is usual."""

    def __init__(
        self, alerts: Alerts, *, reference: Reference | None = None, alert_share: float = 0.2
    ) -> None:
        """Start without answers.

        Args:
            alerts: Told of what is wrong.
            reference: What is usual; None: the first answers become it.
            alert_share: Of the last answers that may fail one check, above the usual share.
        """
        self._alerts = alerts
        self._reference = reference
        self._alert_share = alert_share
        self._figures: dict[str, Window] = {}
        self._first: dict[str, Window] = {}
        self._failures = {check: Window(WINDOW) for check in CHECKS}
        self.scores: dict[str, float] = {}
        """By figure: the difference from what is usual, in standard deviations of the reference."""

    @property
    def rates(self) -> dict[str, float]:
        """Share of the last answers that failed each check."""
        return {check: window.spread().mean for check, window in self._failures.items()}

    def observe(self, seen: Observation) -> None:
        """Take a request in that is over: the first attempt is the model that is watched."""
        attempt = seen.attempts[0] if seen.attempts else None
        if attempt is None or attempt.role != "primary" or not attempt.finished:
            return
        for check, window in self._failures.items():
            window.add(float(check in attempt.failures))
            self._check_rate(check, window.spread())
        for name, value in figures(attempt):
            self.note(name, value)

    def note(self, name: str, value: float, *, first: int = FIRST) -> None:
        """Take one value of a figure in.

        Args:
            name: Of the figure.
            value: Of one answer.
            first: So many first values are what is usual, where no reference says it.
        """
        if name not in self._figures:
            self._figures[name], self._first[name] = Window(WINDOW), Window(first)
        self._figures[name].add(value)
        if not self._first[name].is_full:
            self._first[name].add(value)
        self._check_figure(name)

    def _check_rate(self, check: str, found: Spread) -> None:
        usual = self._reference.failures.get(check, 0.0) if self._reference else 0.0
        allowed = min(1.0, usual + self._alert_share)
        self._alerts.set(
            check,
            found.count >= FEWEST and found.mean >= allowed,
            f"{100 * found.mean:.0f}% of the last {found.count} answers fail the check {check}; "
            f"{100 * allowed:.0f}% are allowed",
            found.mean,
        )

    def _check_figure(self, name: str) -> None:
        usual, found = self._usual(name), self._figures[name].spread()
        if usual is None or found.count < FEWEST:
            return
        deviation = math.sqrt(usual.variance) or 1e-9
        error = math.sqrt(usual.variance / usual.count + found.variance / found.count) or 1e-9
        difference = found.mean - usual.mean
        self.scores[name] = difference / deviation
        drifted = abs(difference) > SURE * error and abs(difference) > LARGE * deviation
        self._alerts.set(
            f"{name} drift",
            drifted,
            f"the {name} of the last {found.count} answers is {difference / deviation:+.1f} "
            f"standard deviations from the reference's; {LARGE:g} are allowed",
            difference / deviation,
        )

    def _usual(self, name: str) -> Spread | None:
        if self._reference is not None and name in self._reference.spreads:
            return self._reference.spreads[name]
        first = self._first[name]
        return first.spread() if first.is_full else None


def figures(attempt: Seen) -> Iterator[tuple[str, float]]:
    """Give the figures of an answer that drift is watched in."""
    yield "length", math.log1p(attempt.num_tokens)
    if attempt.entropies:
        yield "entropy", sum(attempt.entropies) / len(attempt.entropies)


def read_reference(path: Path) -> Reference:
    """Read what is usual from a comparison: the candidate's written answers.

    Args:
        path: ``report.json`` of `halfbyte compare`; the candidate is the model that is served.

    Returns:
        The reference.

    Raises:
        ConfigError: It is no such file, or has too few written answers.
    """
    try:
        items = json.loads(path.read_bytes())["items"]
        answers = [
            Seen(
                backend="",
                role="primary",
                started=0.0,
                num_tokens=len(item["candidate_entropies"]),
                texts={0: [item["candidate_text"]]},
                entropies=item["candidate_entropies"],
            )
            for item in items
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"Cannot read '{path}' as the report.json of a comparison: {error!r}. Write it with "
            "`halfbyte compare BASE MODEL -o FOLDER` of this version."
        ) from error
    if len(answers) < FEWEST:
        raise ConfigError(
            f"'{path}' has {len(answers)} written answers; {FEWEST} are needed to know what is "
            "usual. Compare on more items."
        )
    windows = {name: Window(len(answers)) for name in ("length", "entropy")}
    failing = dict.fromkeys(CHECKS, 0)
    for answer in answers:
        for name, value in figures(answer):
            windows[name].add(value)
        for check in find_failures(Call(kind="completion", body={}, id=""), answer):
            failing[check] += 1
    spreads = {name: window.spread() for name, window in windows.items()}
    return Reference(
        spreads={name: spread for name, spread in spreads.items() if spread.count >= FEWEST},
        failures={check: count / len(answers) for check, count in failing.items()},
    )
