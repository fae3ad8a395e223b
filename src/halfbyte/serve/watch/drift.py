"""Detects drift over the last answers: rates of failed checks, lengths, entropies.

Lengths and entropies are compared with a reference: the answers of a comparison, or else the first
answers that were served. A metric has drifted if the difference of means is both statistically
significant and large. With many answers, a difference too small to matter is significant too.
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
from halfbyte.serve.watch.observation import AttemptRecord, Observation

WINDOW = 256
"""Number of recent answers that are compared."""
MIN_ANSWERS = 32
"""Answers needed before anything is compared."""
REFERENCE_ANSWERS = 512
"""Number of first answers that become the reference if none is given."""
MIN_STANDARD_ERRORS = 4.0
"""For significance. The comparison is repeated after every answer, so 2 would be exceeded often."""
MIN_STANDARD_DEVIATIONS = 0.5
"""For a large difference, in standard deviations of the reference (Cohen's medium effect size)."""


@dataclass(frozen=True, slots=True)
class Moments:
    """Count, mean and variance of a metric."""

    count: int
    mean: float
    variance: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """What answers are usually like."""

    moments: dict[str, Moments]
    """By metric: ``length`` (log of 1 + tokens), ``entropy`` (mean over the tokens, in nats)."""
    failures: dict[str, float]
    """Share of answers that fail each check."""


class RollingMoments:
    """Mean and variance of the most recent values."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: deque[float] = deque()
        self._sum = self._squares = 0.0

    def add(self, value: float) -> None:
        """Add a value, and drop the oldest one if there are too many."""
        self._values.append(value)
        self._sum += value
        self._squares += value * value
        if len(self._values) > self._size:
            old = self._values.popleft()
            self._sum -= old
            self._squares -= old * old

    @property
    def is_full(self) -> bool:
        """Whether the next value replaces the oldest one."""
        return len(self._values) >= self._size

    def moments(self) -> Moments:
        """Return count, mean and variance."""
        count = len(self._values)
        if not count:
            return Moments(0, 0.0, 0.0)
        mean = self._sum / count
        return Moments(count, mean, max(0.0, self._squares / count - mean * mean))


class Drift:
    """Compares recent answers with the reference, and raises alerts."""

    def __init__(
        self, alerts: Alerts, *, reference: Reference | None = None, alert_share: float = 0.2
    ) -> None:
        """Start without answers.

        Args:
            alerts: Where drift is reported.
            reference: What is usual; None: the first answers become the reference.
            alert_share: Share of recent answers that may fail a check, on top of the usual share.
        """
        self._alerts = alerts
        self._reference = reference
        self._alert_share = alert_share
        self._recent: dict[str, RollingMoments] = {}
        self._first: dict[str, RollingMoments] = {}
        self._failures = {check: RollingMoments(WINDOW) for check in CHECKS}
        self.scores: dict[str, float] = {}
        """Difference from the reference by metric, in standard deviations of the reference."""

    @property
    def rates(self) -> dict[str, float]:
        """Share of recent answers that failed each check."""
        return {check: window.moments().mean for check, window in self._failures.items()}

    def observe(self, observation: Observation) -> None:
        """Add a finished request, if the primary model answered it first."""
        attempt = observation.attempts[0] if observation.attempts else None
        if attempt is None or attempt.role != "primary" or not attempt.finished:
            return
        for check, window in self._failures.items():
            window.add(float(check in attempt.failures))
            self._check_rate(check, window.moments())
        for name, value in measure_answer(attempt):
            self.add_value(name, value)

    def add_value(
        self, name: str, value: float, *, reference_size: int = REFERENCE_ANSWERS
    ) -> None:
        """Add one value of a metric, and check the metric for drift.

        Args:
            name: The metric.
            value: Its value for one answer.
            reference_size: Number of first values that become the reference if none is given.
        """
        if name not in self._recent:
            self._recent[name] = RollingMoments(WINDOW)
            self._first[name] = RollingMoments(reference_size)
        self._recent[name].add(value)
        if not self._first[name].is_full:
            self._first[name].add(value)
        self._check_metric(name)

    def _check_rate(self, check: str, recent: Moments) -> None:
        usual = self._reference.failures.get(check, 0.0) if self._reference else 0.0
        allowed = min(1.0, usual + self._alert_share)
        self._alerts.update(
            check,
            recent.count >= MIN_ANSWERS and recent.mean >= allowed,
            f"{100 * recent.mean:.0f}% of the last {recent.count} answers fail the check {check}; "
            f"{100 * allowed:.0f}% are allowed",
            recent.mean,
        )

    def _check_metric(self, name: str) -> None:
        usual, recent = self._find_reference(name), self._recent[name].moments()
        if usual is None or recent.count < MIN_ANSWERS:
            return
        deviation = math.sqrt(usual.variance) or 1e-9
        error = math.sqrt(usual.variance / usual.count + recent.variance / recent.count) or 1e-9
        difference = recent.mean - usual.mean
        self.scores[name] = difference / deviation
        is_significant = abs(difference) > MIN_STANDARD_ERRORS * error
        is_large = abs(difference) > MIN_STANDARD_DEVIATIONS * deviation
        self._alerts.update(
            f"{name} drift",
            is_significant and is_large,
            f"the {name} of the last {recent.count} answers differs from the reference by "
            f"{difference / deviation:+.1f} standard deviations; {MIN_STANDARD_DEVIATIONS:g} are "
            "allowed",
            difference / deviation,
        )

    def _find_reference(self, name: str) -> Moments | None:
        if self._reference is not None and name in self._reference.moments:
            return self._reference.moments[name]
        first = self._first[name]
        return first.moments() if first.is_full else None


def measure_answer(attempt: AttemptRecord) -> Iterator[tuple[str, float]]:
    """Yield name and value of each metric of an answer that is checked for drift."""
    yield "length", math.log1p(attempt.num_tokens)
    if attempt.entropies:
        yield "entropy", sum(attempt.entropies) / len(attempt.entropies)


def read_reference(path: Path) -> Reference:
    """Read the reference from a comparison: the candidate's generated answers.

    Args:
        path: ``report.json`` of `halfbyte compare`, whose candidate is the served model.

    Returns:
        The reference.

    Raises:
        ConfigError: The file cannot be read, or has too few generated answers.
    """
    try:
        items = json.loads(path.read_bytes())["items"]
        answers = [
            AttemptRecord(
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
            f"Cannot read '{path}' as the report.json of a comparison: {error!r}. Create it with "
            "`halfbyte compare BASE MODEL -o FOLDER` of this version."
        ) from error
    if len(answers) < MIN_ANSWERS:
        raise ConfigError(
            f"Cannot use '{path}' as a reference: it has {len(answers)} generated answers; at "
            f"least {MIN_ANSWERS} are needed. Compare on more items."
        )
    windows = {name: RollingMoments(len(answers)) for name in ("length", "entropy")}
    failing = dict.fromkeys(CHECKS, 0)
    for answer in answers:
        for name, value in measure_answer(answer):
            windows[name].add(value)
        for check in find_failures(Call(kind="completion", body={}, id=""), answer):
            failing[check] += 1
    moments = {name: window.moments() for name, window in windows.items()}
    return Reference(
        moments={name: found for name, found in moments.items() if found.count >= MIN_ANSWERS},
        failures={check: count / len(answers) for check, count in failing.items()},
    )
