"""A canary: a candidate answers a share of the requests until a sequential test decides about it.

What counts is whether the drawn model failed the request: an error, overload, a timeout, a client
that disconnected before the first token, a refusal of what the present model answers, a failed
check that causes a fallback (the client does not see it: the present model answers then), or an
answer that the present model finds far less likely than its own.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from halfbyte.serve.backend import Call
from halfbyte.serve.fault import Fault
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.rollout.sequential import TwoArmTest, requests_until_rejected
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.watch.drift import RollingMoments
from halfbyte.serve.watch.observation import Observation

log = logging.getLogger(__name__)

Status = Literal["running", "promoted", "rolled back"]
Decide = Callable[["Canary"], None]
Rate = Callable[[Call, str], Awaitable[float | None]]
"""Returns the mean log-likelihood of an answer in nats per token; NaN if this answer cannot be
rated, None if the model cannot rate."""

FILE = "canary.json"
FORMAT_VERSION = 1
SAVE_SECONDS = 5.0
"""Minimum time between two writes of the evidence. A decision is written at once."""
BASELINE_RATINGS, MIN_BASELINE_RATINGS = 512, 32
"""Most recent ratings of the present model's own answers, and the minimum number of them."""
UNLIKELY_DEVIATIONS = 4.0
"""An answer is unlikely if it is this many standard deviations below the baseline."""
MAX_RATINGS_RUNNING = 2
"""While this many answers are being rated, other requests do not count, so that no client waits."""
MAX_FAILED_RATINGS = 5
"""Consecutive ratings that fail before rating is given up."""
VERDICTS: dict[Status, str] = {
    "running": "inconclusive",
    "promoted": "pass",
    "rolled back": "fail",
}
"""The store's verdict for each status."""


@dataclass(slots=True)
class ArmCount:
    """Requests and failures of one of the two models."""

    requests: int = 0
    failures: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Share of requests that failed."""
        return self.failures / self.requests if self.requests else 0.0


class Canary:
    """The trial of one candidate, with its evidence."""

    def __init__(
        self,
        candidate: str,
        config: QualityConfig,
        *,
        decide: Decide | None = None,
        rate: Rate | None = None,
        clock: Clock = time.monotonic,
        seed: int | None = None,
    ) -> None:
        """Start the trial, or resume it from its file.

        Args:
            candidate: Identifies the candidate, with its version. Another one starts a new trial.
            config: Share, margin, alpha, and where the evidence is saved.
            decide: Called once, when :attr:`status` is decided.
            rate: Lets the present model rate an answer; None: answers are not rated.
            clock: Returns monotonic seconds.
            seed: For drawing the requests.
        """
        self.candidate = candidate
        self.status: Status = "running"
        self.reason = ""
        self._config = config
        self._decide = decide
        self._rate = rate
        self._rating_tasks: set[asyncio.Task[None]] = set()
        self._failed_ratings = 0
        self.skipped = 0
        """Requests that did not count because other answers were being rated."""
        self._clock = clock
        self._random = random.Random(seed)
        self._file = EvidenceFile(Path(config.evidence) / FILE) if config.evidence else None
        self._saved_at = -math.inf
        self.arms = {"primary": ArmCount(), "canary": ArmCount()}
        self._baseline = RollingMoments(BASELINE_RATINGS)
        self._test = TwoArmTest(config.canary_share, config.canary_margin)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        if self._file is not None:
            self._file.resume(candidate, self._settings(), self._restore)

    def pick(self, call: Call) -> bool:
        """Draw at random whether the candidate answers this request."""
        return self.status == "running" and self._random.random() < self._config.canary_share

    @property
    def num_requests(self) -> int:
        """Requests of both arms."""
        return sum(arm.requests for arm in self.arms.values())

    def observe(self, observation: Observation) -> None:
        """Count a finished request, and decide if the evidence is sufficient."""
        if not observation.arm or self.status != "running":
            return
        cause = self._find_failure(observation)
        if cause is None:
            return
        if self._rate is not None and len(self._rating_tasks) >= MAX_RATINGS_RUNNING:
            # Failed or not: skipping only those that need a rating would bias the failure rates.
            self.skipped += 1
        elif cause or self._rate is None:
            self._count(observation.arm, cause)
        else:
            task = asyncio.get_running_loop().create_task(self._rate_and_count(observation))
            self._rating_tasks.add(task)
            task.add_done_callback(self._rating_tasks.discard)

    def _find_failure(self, observation: Observation) -> str | None:
        """Return why the drawn model failed; empty if it did not; None if that is unknown."""
        attempts = observation.attempts
        drawn = next((a for a in attempts if a.role == observation.arm), None)
        if drawn is None:
            # Not asked because its breaker is open: it failed before.
            return "breaker"
        if drawn.fault is Fault.REQUEST:
            # The request is invalid, unless the present model could answer it.
            present = next((a for a in attempts if a.role == "primary"), None)
            return drawn.cause if present is not None and present.fault is None else None
        if drawn.fault is Fault.CLIENT and not drawn.cause:
            # Before the first token, the wait was too long; later there may be other reasons.
            return "left" if drawn.first is None else None
        if drawn.fault is not None or drawn.cause.startswith("check:"):
            return drawn.cause
        rejected = [check for check in drawn.failures if check in self._config.fallback_on]
        return f"check:{rejected[0]}" if rejected else ""

    async def _rate_and_count(self, observation: Observation) -> None:
        """Let the present model rate an answer, and count the request by the result."""
        drawn = next(a for a in observation.attempts if a.role == observation.arm)
        assert self._rate is not None
        try:
            nats = await self._rate(observation.call, drawn.text())
        except Exception:
            log.exception("rating the canary's answer to %s failed", observation.call.id)
            nats = None
        self._failed_ratings = self._failed_ratings + 1 if nats is None else 0
        if self._failed_ratings == MAX_FAILED_RATINGS:
            log.warning(
                "the present model cannot rate answers: the trial continues without ratings"
            )
            self._rate = None
        is_unlikely = (
            nats is not None and math.isfinite(nats) and self._is_unlikely(observation, nats)
        )
        self._count(observation.arm, "unlikely" if is_unlikely else "")

    def _is_unlikely(self, observation: Observation, nats: float) -> bool:
        """Return whether an answer is far less likely than the present model's own usually are.

        Nonsense may pass all checks of the text, and a model that writes it may be confident. The
        baseline comes from earlier answers, so that it never depends on the one that is judged.
        """
        baseline = self._baseline.moments()
        if observation.arm == "primary":
            self._baseline.add(nats)
        limit = baseline.mean - UNLIKELY_DEVIATIONS * math.sqrt(baseline.variance)
        return baseline.count >= MIN_BASELINE_RATINGS and nats < limit

    def _count(self, drawn: str, cause: str) -> None:
        if self.status != "running":
            return
        arm = self.arms[drawn]
        arm.requests += 1
        if cause:
            arm.failures += 1
            arm.causes[cause] += 1
        self._test.update(candidate=drawn == "canary", failed=bool(cause))
        self._check_decision()

    def _check_decision(self) -> None:
        needed = math.log(1 / self._config.canary_alpha)
        if self._test.worse.log_evidence >= needed:
            self._end("rolled back", "it fails more often than the present model")
        elif self._test.as_good.log_evidence >= needed and self._has_enough_requests:
            self._end(
                "promoted",
                "it fails less than "
                f"{100 * self._config.canary_margin:g} points more often than the present model",
            )
        elif self.num_requests >= self._config.canary_requests:
            self._end("rolled back", f"no decision within {self.num_requests} requests")
        elif self._clock() - self._saved_at >= SAVE_SECONDS:
            self.save()

    @property
    def _has_enough_requests(self) -> bool:
        """Whether the candidate's own requests would suffice for a promotion if none had failed.

        The present model's requests are evidence too, but must not be all of it.
        """
        alpha, margin = self._config.canary_alpha, self._config.canary_margin
        return self.arms["canary"].requests >= math.log(alpha) / math.log1p(-margin)

    def _end(self, status: Status, reason: str) -> None:
        self.status, self.reason = status, reason
        log.info("canary %s is %s: %s", self.candidate, status, reason)
        self.save(wait=True)
        if self._decide is not None:
            self._decide(self)

    def evidence(self) -> dict[str, Any]:
        """Return everything that the decision is based on, as JSON-serializable values.

        With its key "verdict", the file is accepted by `halfbyte store judge`.
        """
        base, candidate = self.arms["primary"], self.arms["canary"]
        config = self._config
        return {
            "form": FORMAT_VERSION,
            "verdict": VERDICTS[self.status],
            "status": self.status,
            "reason": self.reason,
            "candidate": self.candidate,
            "settings": self._settings(),
            "started": self.started,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "requests": self.num_requests,
            "skipped": self.skipped,
            "arms": {
                name: {
                    "requests": arm.requests,
                    "failures": arm.failures,
                    "rate": arm.rate,
                    "causes": dict(arm.causes),
                }
                for name, arm in self.arms.items()
            },
            "evidence_worse": self._test.worse.log_evidence,
            "evidence_as_good": self._test.as_good.log_evidence,
            "evidence_needed": math.log(1 / config.canary_alpha),
            "rollback_expected_within": requests_until_rejected(
                (base.rate, candidate.rate), config.canary_share, config.canary_alpha
            ),
            "log_wealth": {
                "worse": self._test.worse.log_wealth,
                "as_good": self._test.as_good.log_wealth,
            },
        }

    def summary(self) -> dict[str, Any]:
        """Return the evidence without the values that only a restart needs."""
        evidence = self.evidence()
        del evidence["log_wealth"]
        return evidence

    def _settings(self) -> dict[str, float]:
        config = self._config
        return {
            "share": config.canary_share,
            "margin": config.canary_margin,
            "alpha": config.canary_alpha,
        }

    async def close(self) -> None:
        """Cancel running ratings, and save the evidence."""
        for task in self._rating_tasks:
            task.cancel()
        await asyncio.gather(*self._rating_tasks, return_exceptions=True)
        await asyncio.to_thread(self.save, wait=True)

    def save(self, *, wait: bool = False) -> None:
        """Save the evidence, if a folder is configured.

        Args:
            wait: Wait until it is written.
        """
        self._saved_at = self._clock()
        if self._file is not None:
            self._file.write(self.evidence(), wait=wait)

    def _restore(self, values: Mapping[str, Any]) -> None:
        for name, arm in values["arms"].items():
            self.arms[name] = ArmCount(arm["requests"], arm["failures"], Counter(arm["causes"]))
        self._test = TwoArmTest(
            self._config.canary_share, self._config.canary_margin, **values["log_wealth"]
        )
        self.skipped = values["skipped"]
        self.status, self.reason = values["status"], values["reason"]
        self.started = values["started"]
