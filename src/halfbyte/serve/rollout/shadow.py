"""A candidate answers a copy of some requests; what it says is compared and thrown away.

The copy is sent when the client has its answer. Few run at a time: what comes meanwhile is not
copied, so that the candidate never makes the requests of others wait in this process.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfbyte.serve.backend import Backend
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.rollout.sequential import PairedTest
from halfbyte.serve.routing.attempt import Attempt, Demands, Route
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import Observation, Seen

log = logging.getLogger(__name__)

FILE = "shadow.json"
AT_ONCE = 2
LONGEST_SECONDS = 120.0
"""That a copy may take; one that takes longer is not compared."""

Alarm = Callable[[str], None]


class Shadow:
    """Copies of requests to a candidate."""

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
        """Begin with nothing compared.

        Args:
            candidate: Gets the copies.
            config: Share, margin, alpha, where the comparison is kept.
            name: Of the candidate for people; empty: the backend's.
            alarm: Called once, with words, when it is sure that the candidate fails more often.
            clock: The time.
            seed: Of the draw of requests.
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

    def observe(self, seen: Observation) -> None:
        """Copy a request that is over, if it is drawn."""
        if seen.status != 200 or seen.answer is None or seen.answer.role == "canary":
            return
        if self._random.random() >= self._config.shadow_share:
            return
        if len(self._running) >= AT_ONCE:
            self.counts["skipped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._copy(seen, seen.answer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _copy(self, seen: Observation, base: Seen) -> None:
        """Let the candidate answer, and hold it against what the client got.

        What it refuses counts against it: another model has answered the same request.
        """
        call = replace(seen.call, deadline=time.monotonic() + LONGEST_SECONDS)
        attempt = Attempt(
            self._route, call, self._config, demands=Demands(tokens=None), clock=self._clock
        )
        try:
            cause = await attempt.hold()
        except Exception:
            log.exception("the shadow of %s failed", call.id)
            cause = "error"
        finally:
            await attempt.close()
        if cause == "deadline":
            # Slow is not wrong: the client had no such deadline.
            self.counts["late"] += 1
            return
        attempt.seen.failures = find_failures(call, attempt.seen)
        self._compare(base, attempt.seen, cause)

    def _compare(self, base: Seen, other: Seen, cause: str) -> None:
        failed = [bool(set(one.failures) & set(self._config.fallback_on)) for one in (base, other)]
        failed[1] = failed[1] or bool(cause)
        self.counts["compared"] += 1
        for name, value in zip(("base_failed", "candidate_failed"), failed, strict=True):
            self.counts[name] += value
        for check in [cause] if cause else other.failures:
            self.counts[f"candidate:{check}"] += 1
        self.counts["identical"] += base.text() == other.text()
        self._agreement += agreement(base.text(), other.text())
        for name, one in (("base", base), ("candidate", other)):
            self._seconds[name] += (one.ended or one.last) - one.started
        self._test.update(base_failed=failed[0], candidate_failed=failed[1])
        sure = self._test.worse.log_evidence >= math.log(1 / self._config.canary_alpha)
        if sure and not self._alarmed and self._alarm is not None:
            self._alarm(
                f"the shadowed candidate failed {self.counts['candidate_failed']} of "
                f"{self.counts['compared']} requests, the present model "
                f"{self.counts['base_failed']} of the same"
            )
        self._alarmed = self._alarmed or sure
        if self._file is not None:
            self._file.write(self.evidence())

    def evidence(self) -> dict[str, Any]:
        """Give what was found, as plain values."""
        compared = self.counts["compared"]
        return {
            "candidate": self._route.name,
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

    async def close(self) -> None:
        """Stop the copies and write down what was found."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        if self._file is not None:
            self._file.write(self.evidence(), wait=True)


def agreement(left: str, right: str) -> float:
    """Give the share of the longer text's words before the first one that differs; 1: the same."""
    if left == right:
        return 1.0
    a, b = left.split(), right.split()
    same = 0
    for one, other in zip(a, b, strict=False):
        if one != other:
            break
        same += 1
    return same / max(len(a), len(b), 1)
