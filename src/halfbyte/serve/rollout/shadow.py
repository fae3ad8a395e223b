"""Shadow traffic: a candidate answers a copy of some requests; its answers are only compared.

The copy is sent after the client got its answer. Only few copies run at a time, and meanwhile other
requests are not copied, so that a candidate in this process does not slow down other requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from halfbyte.serve.backend import Backend, Call
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.rollout.sequential import PairedTest
from halfbyte.serve.routing.attempt import Attempt, HoldBack, Route
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import AttemptRecord, Observation

log = logging.getLogger(__name__)

FILE = "shadow.json"
MAX_RUNNING = 2
TIMEOUT_SECONDS = 120.0
"""A copy that takes longer is not compared."""

Alarm = Callable[[str], None]
"""Called with a message."""


class Shadow:
    """Sends copies of requests to a candidate, and compares the answers."""

    def __init__(
        self,
        candidate: Backend,
        config: QualityConfig,
        *,
        name: str = "",
        alarm: Alarm | None = None,
        clock: Clock = time.monotonic,
        seed: int | None = None,
    ) -> None:
        """Start with nothing compared, or resume from the file.

        Args:
            candidate: The model that gets the copies.
            config: Share, margin, alpha, and where the evidence is saved.
            name: Identifies the candidate, with its version; empty: the backend's name. Another one
                starts anew.
            alarm: Called once, when it is shown that the candidate fails more often.
            clock: Returns monotonic seconds.
            seed: For drawing the requests.
        """
        self._route = Route(candidate, "canary", name or candidate.name)
        self._config = config
        self._alarm = alarm
        self._clock = clock
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self._file = EvidenceFile(Path(config.evidence) / FILE) if config.evidence else None
        self._test = PairedTest(config.canary_margin)
        self._alarmed = False
        self.counts: Counter[str] = Counter()
        self._agreement = 0.0
        self._seconds = {"base": 0.0, "candidate": 0.0}
        self._started = datetime.now(UTC).isoformat(timespec="seconds")
        if self._file is not None:
            self._file.resume(self._route.name, self._settings(), self._restore)

    def observe(self, observation: Observation) -> None:
        """Copy a finished request, if it is drawn."""
        answer = observation.answer
        if observation.status != 200 or answer is None or answer.role == "canary":
            return
        if self._random.random() >= self._config.shadow_share:
            return
        if len(self._running) >= MAX_RUNNING:
            self.counts["skipped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._copy(observation.call, answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _copy(self, call: Call, base: AttemptRecord) -> None:
        """Let the candidate answer, and compare it with the answer that the client got.

        A refusal counts as a failure, because another model has answered the same request.
        """
        call = replace(call, deadline=time.monotonic() + TIMEOUT_SECONDS)
        attempt = Attempt(
            self._route, call, self._config, hold_back=HoldBack(tokens=None), clock=self._clock
        )
        try:
            cause = await attempt.fill_buffer()
        except Exception:
            log.exception("the shadow copy of %s failed", call.id)
            cause = "error"
        finally:
            await attempt.close()
        if cause == "deadline":
            # Not a failure: the client's request did not have this deadline.
            self.counts["late"] += 1
            return
        attempt.record.failures = find_failures(call, attempt.record)
        self._compare(base, attempt.record, cause)

    def _compare(self, base: AttemptRecord, candidate: AttemptRecord, cause: str) -> None:
        causes = set(self._config.fallback_on)
        base_failed = not causes.isdisjoint(base.failures)
        candidate_failed = bool(cause) or not causes.isdisjoint(candidate.failures)
        self.counts["compared"] += 1
        self.counts["base_failed"] += base_failed
        self.counts["candidate_failed"] += candidate_failed
        for check in [cause] if cause else candidate.failures:
            self.counts[f"candidate:{check}"] += 1
        self.counts["identical"] += base.text() == candidate.text()
        self._agreement += agreement(base.text(), candidate.text())
        for name, record in (("base", base), ("candidate", candidate)):
            self._seconds[name] += (record.ended or record.last) - record.started
        self._test.update(base_failed=base_failed, candidate_failed=candidate_failed)
        is_worse = self._test.worse.log_evidence >= math.log(1 / self._config.canary_alpha)
        if is_worse and not self._alarmed and self._alarm is not None:
            self._alarm(
                f"the shadow candidate failed {self.counts['candidate_failed']} of "
                f"{self.counts['compared']} requests, the present model "
                f"{self.counts['base_failed']} of the same"
            )
        self._alarmed = self._alarmed or is_worse
        if self._file is not None:
            self._file.write(self._state())

    def evidence(self) -> dict[str, Any]:
        """Return the results, as JSON-serializable values."""
        compared = self.counts["compared"]
        return {
            "candidate": self._route.name,
            "started": self._started,
            "counts": dict(self.counts),
            "identical": self.counts["identical"] / compared if compared else None,
            "agreement": self._agreement / compared if compared else None,
            "mean_seconds": {
                name: total / compared if compared else None
                for name, total in self._seconds.items()
            },
            "evidence_worse": self._test.worse.log_evidence,
            "evidence_as_good": self._test.as_good.log_evidence,
            "evidence_needed": math.log(1 / self._config.canary_alpha),
        }

    def _state(self) -> dict[str, Any]:
        """Return the evidence with the values that only a restart needs."""
        return {
            **self.evidence(),
            "settings": self._settings(),
            "alarmed": self._alarmed,
            "log_wealth": {
                "worse": self._test.worse.log_wealth,
                "as_good": self._test.as_good.log_wealth,
            },
        }

    def _settings(self) -> dict[str, float]:
        return {"margin": self._config.canary_margin}

    def _restore(self, values: Mapping[str, Any]) -> None:
        self.counts.update(values["counts"])
        if compared := self.counts["compared"]:
            self._agreement = values["agreement"] * compared
            self._seconds = {name: mean * compared for name, mean in values["mean_seconds"].items()}
        self._test = PairedTest(self._config.canary_margin, **values["log_wealth"])
        self._alarmed = values["alarmed"]
        self._started = values["started"]

    async def close(self) -> None:
        """Cancel running copies, and save the evidence."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._file is not None:
            self._file.write(self._state(), wait=True)


def agreement(left: str, right: str) -> float:
    """Return the number of equal leading words as a share of the longer text's words."""
    if left == right:
        return 1.0
    a, b = left.split(), right.split()
    num_equal = 0
    for left_word, right_word in zip(a, b, strict=False):
        if left_word != right_word:
            break
        num_equal += 1
    return num_equal / max(len(a), len(b), 1)
