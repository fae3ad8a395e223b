"""A candidate gets a share of the requests until a sequential test decides about it.

What counts is whether the drawn model failed the request: an error, too much to do, a timeout, a
client that left before the first token, a refusal of what the present model answers, a monitor that
the settings let it be replaced for (the client does not see it: the present model answers then), or
an answer that the present model finds far less likely than its own.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from halfbyte.errors import ConfigError
from halfbyte.serve.backend import Call
from halfbyte.serve.fault import Blame
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.rollout.sequential import TwoArmTest, requests_until_rejected
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.watch.drift import Window
from halfbyte.serve.watch.observation import Observation

log = logging.getLogger(__name__)

Status = Literal["running", "promoted", "rolled back"]
Decide = Callable[["Canary"], None]
Rate = Callable[[Call, str], Awaitable[float | None]]
"""Gives the mean log-likelihood of an answer, in nats a token; not-a-number where this one is not
to be rated, None where the model cannot."""

FILE = "canary.json"
FORM = 1
SAVE_SECONDS = 5.0
"""Between two writes of the evidence; a decision is written at once."""
USUAL, FEWEST_USUAL = 512, 32
"""Last ratings of the present model's own answers, and how many there must be."""
FAR = 4.0
"""Standard deviations below what is usual from which an answer counts as unlikely."""
RATED_AT_ONCE = 2
"""Answers; requests that end meanwhile are not counted, so that no client waits for ratings."""
MOST_UNRATED = 5
"""Ratings in a row that fail, before they are given up."""
VERDICTS: dict[Status, str] = {
    "running": "inconclusive",
    "promoted": "pass",
    "rolled back": "fail",
}
"""As the store calls them."""


@dataclass(slots=True)
class ArmCount:
    """What one of the two models did."""

    requests: int = 0
    failures: int = 0
    causes: Counter[str] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        """Share of requests that failed."""
        return self.failures / self.requests if self.requests else 0.0


class Canary:
    """The trial of one candidate, and all evidence about it."""

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
        """Begin, or go on where a file of the same trial says.

        Args:
            candidate: Names it, its version included: another one begins anew.
            config: Share, margin, alpha, where evidence is kept.
            decide: Called once, with the decision in :attr:`status`.
            rate: Lets the present model rate an answer; None: nobody does.
            clock: The time.
            seed: Of the draw of requests.
        """
        self.candidate = candidate
        self.status: Status = "running"
        self.reason = ""
        self._config = config
        self._decide = decide
        self._rate = rate
        self._rating: set[asyncio.Task[None]] = set()
        self._unrated = 0
        self.skipped = 0
        """Requests that were not counted because others were being rated."""
        self._clock = clock
        self._random = random.Random(seed)
        self._file = EvidenceFile(Path(config.evidence) / FILE) if config.evidence else None
        self._saved = -math.inf
        self.arms = {"primary": ArmCount(), "canary": ArmCount()}
        self._usual = Window(USUAL)
        self._test = TwoArmTest(config.canary_share, config.canary_margin)
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        if self._file is not None and self._file.path.is_file():
            self._resume(self._file.path)

    def pick(self, call: Call) -> bool:
        """Tell whether the candidate answers this request."""
        return self.status == "running" and self._random.random() < self._config.canary_share

    @property
    def num_requests(self) -> int:
        """Of both arms."""
        return sum(arm.requests for arm in self.arms.values())

    def observe(self, seen: Observation) -> None:
        """Take a request in that is over, and decide where that is possible."""
        if not seen.arm or self.status != "running":
            return
        cause = self._failure(seen)
        if cause is None:
            return
        if self._rate is not None and len(self._rating) >= RATED_AT_ONCE:
            # Failed or not: to leave out only those that need a rating would bend the rates.
            self.skipped += 1
        elif cause or self._rate is None:
            self._count(seen.arm, cause)
        else:
            task = asyncio.get_running_loop().create_task(self._rate_and_count(seen))
            self._rating.add(task)
            task.add_done_callback(self._rating.discard)

    def _failure(self, seen: Observation) -> str | None:
        """Tell why the drawn model failed; empty: it did not; None: nobody can tell."""
        drawn = next((a for a in seen.attempts if a.role == seen.arm), None)
        if drawn is None:
            # Not even asked: its breaker is open, because it failed before.
            return "breaker"
        if drawn.blame is Blame.REQUEST:
            # The request's fault, unless the present model could do what it asks for.
            present = next((a for a in seen.attempts if a.role == "primary"), None)
            return drawn.cause if present is not None and present.blame is None else None
        if drawn.blame is Blame.CLIENT and not drawn.cause:
            # Who waits for the first token in vain was let down; later there may be other reasons.
            return "left" if drawn.first is None else None
        if drawn.blame is not None or drawn.cause.startswith("check:"):
            return drawn.cause
        replaced = [f for f in drawn.failures if f in self._config.fallback_on]
        return f"check:{replaced[0]}" if replaced else ""

    async def _rate_and_count(self, seen: Observation) -> None:
        """Let the present model rate an answer, and count the request by that."""
        drawn = next(a for a in seen.attempts if a.role == seen.arm)
        assert self._rate is not None
        try:
            nats = await self._rate(seen.call, drawn.text())
        except Exception:
            log.exception("the canary's rating of %s failed", seen.call.id)
            nats = None
        self._unrated = self._unrated + 1 if nats is None else 0
        if self._unrated == MOST_UNRATED:
            log.warning("the present model rates no answers: the trial goes on without ratings")
            self._rate = None
        far = nats is not None and math.isfinite(nats) and self._is_far(seen, nats)
        self._count(seen.arm, "unlikely" if far else "")

    def _is_far(self, seen: Observation, nats: float) -> bool:
        """Whether an answer is far less likely than the present model's own usually are.

        Nonsense passes every look at the text, and a model that writes it may be sure of it. The
        line comes from earlier answers, so that it never depends on the one that is judged.
        """
        usual = self._usual.spread()
        if seen.arm == "primary":
            self._usual.add(nats)
        return usual.count >= FEWEST_USUAL and nats < usual.mean - FAR * math.sqrt(usual.variance)

    def _count(self, drawn: str, cause: str) -> None:
        if self.status != "running":
            return
        arm = self.arms[drawn]
        arm.requests += 1
        if cause:
            arm.failures += 1
            arm.causes[cause] += 1
        self._test.update(candidate=drawn == "canary", failed=bool(cause))
        self._look()

    def _look(self) -> None:
        goal = math.log(1 / self._config.canary_alpha)
        if self._test.worse.log_evidence >= goal:
            self._end("rolled back", "it fails more often than the present model")
        elif self._test.as_good.log_evidence >= goal and self._has_answered_enough:
            self._end(
                "promoted",
                "it fails less than "
                f"{100 * self._config.canary_margin:g} points more often than the present model",
            )
        elif self.num_requests >= self._config.canary_requests:
            self._end("rolled back", f"no decision within {self.num_requests} requests")
        elif self._clock() - self._saved >= SAVE_SECONDS:
            self.save()

    @property
    def _has_answered_enough(self) -> bool:
        """Whether the candidate's own requests could tell, if none of them had failed.

        Those of the present model are evidence too, and must not be all of it.
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
        """Give everything that the decision rests on, as plain values.

        Its key "verdict" makes the file one that `halfbyte store judge` takes.
        """
        base, candidate = self.arms["primary"], self.arms["canary"]
        config = self._config
        return {
            "form": FORM,
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
        """Give the evidence without what only a restart needs."""
        found = self.evidence()
        del found["log_wealth"]
        return found

    def _settings(self) -> dict[str, float]:
        config = self._config
        return {
            "share": config.canary_share,
            "margin": config.canary_margin,
            "alpha": config.canary_alpha,
        }

    async def close(self) -> None:
        """Leave what is being rated, and write the evidence down."""
        for task in self._rating:
            task.cancel()
        await asyncio.gather(*self._rating, return_exceptions=True)
        await asyncio.to_thread(self.save, wait=True)

    def save(self, *, wait: bool = False) -> None:
        """Write the evidence down, where a place for it is set.

        Args:
            wait: Until it is on the disk.
        """
        self._saved = self._clock()
        if self._file is not None:
            self._file.write(self.evidence(), wait=wait)

    def _resume(self, path: Path) -> None:
        """Go on from a file, if it is of this candidate under these settings; else put it aside."""
        try:
            values = json.loads(path.read_bytes())
            same = values["candidate"] == self.candidate and values["settings"] == self._settings()
            if not same:
                path.replace(path.with_name(f"canary-{values['started'].replace(':', '')}.json"))
                return
            for name, arm in values["arms"].items():
                self.arms[name] = ArmCount(arm["requests"], arm["failures"], Counter(arm["causes"]))
            self._test = TwoArmTest(
                self._config.canary_share, self._config.canary_margin, **values["log_wealth"]
            )
            self.status, self.reason = values["status"], values["reason"]
            self.started = values["started"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"Cannot go on from the canary's evidence in '{path}': {error!r}. Move the file "
                "away to begin anew."
            ) from error
