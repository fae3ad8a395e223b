"""Probes: questions with known answers, asked regularly to detect that the model has changed.

They are sent to the primary model directly, one at a time, without fallback and canary.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.judge.tasks import Item, read_tasks
from halfbyte.serve.backend import Call
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.attempt import Attempt, HoldBack
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts

log = logging.getLogger(__name__)

TIMEOUT_SECONDS = 120.0
"""Timeout of one answer."""
MIN_WRONG_ROUNDS = 2
"""Consecutive rounds in which a question must be answered wrong before there is an alert."""


class Probes:
    """Asks the probes and raises an alert."""

    def __init__(
        self,
        items: Sequence[Item],
        router: Router,
        config: QualityConfig,
        alerts: Alerts,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """Set up the probes; nothing is asked yet.

        Args:
            items: Questions whose generated answers can be checked.
            router: Knows the primary model.
            config: The interval and the timeouts.
            alerts: Where it is reported that a question is not answered correctly any more.
            clock: Returns monotonic seconds.
        """
        self._items = items
        self._router = router
        self._config = config
        self._alerts = alerts
        self._clock = clock
        self._numbers = itertools.count(1)
        self._initially_correct: dict[str, bool] = {}
        """Whether the first answer to a question was correct, by question."""
        self._wrong_rounds: dict[str, int] = {}
        """Consecutive rounds with a wrong answer, by question."""
        self.last: dict[str, bool] = {}
        """Results of the last round, by question. A request that failed counts as wrong."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Start asking. Needs a running event loop."""
        self._task = asyncio.create_task(self._ask_forever())

    async def close(self) -> None:
        """Stop."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _ask_forever(self) -> None:
        while True:
            try:
                await self.ask_all()
            except Exception:
                log.exception("a round of probes failed")
            await asyncio.sleep(60.0 * self._config.probe_minutes)

    async def ask_all(self) -> None:
        """Ask every question once, and update the alert."""
        results = {item.name: await self._ask(item) for item in self._items}
        self.last = {name: bool(correct) for name, correct in results.items()}
        for name, correct in results.items():
            if correct is not None:
                self._initially_correct.setdefault(name, correct)
        known = [name for name, correct in self._initially_correct.items() if correct]
        for name in known:
            rounds = self._wrong_rounds.get(name, 0)
            self._wrong_rounds[name] = 0 if results[name] else rounds + 1
        lost = sorted(n for n, rounds in self._wrong_rounds.items() if rounds >= MIN_WRONG_ROUNDS)
        self._alerts.update(
            "probes",
            bool(lost),
            f"{len(lost)} of {len(known)} questions that were answered correctly at first are "
            f"answered wrong now: {', '.join(lost[:5])}",
            float(len(lost)),
        )

    async def _ask(self, item: Item) -> bool | None:
        """Return whether the answer is correct; None if the request failed."""
        body: dict[str, Any] = {"temperature": 0, "max_tokens": item.max_new_tokens}
        if item.stop:
            body["stop"] = list(item.stop[:4])
        if item.messages:
            body["messages"] = [dict(message) for message in item.messages]
        else:
            body["prompt"] = item.prompt
        call = Call(
            kind="chat" if item.messages else "completion",
            body=body,
            id=f"probe-{next(self._numbers)}",
            deadline=time.monotonic() + TIMEOUT_SECONDS,
        )
        route = self._router.routes[0]
        attempt = Attempt(
            route, call, self._config, hold_back=HoldBack(tokens=None), clock=self._clock
        )
        try:
            cause = await attempt.fill_buffer()
        finally:
            await attempt.close()
        assert item.check is not None
        return None if cause else item.check.passes(attempt.record.text(), item.line, {})


def read_probes(path: Path) -> list[Item]:
    """Read probes from a task file.

    Args:
        path: A task file in the format of `halfbyte compare --tasks`.

    Returns:
        The questions.

    Raises:
        ConfigError: A question has choices, which probes cannot score.
    """
    items = read_tasks([path])
    for item in items:
        if item.check is None:
            raise ConfigError(
                f"Cannot use question '{item.name}' of '{path}' as a probe: it has choices. Probes "
                'check generated answers: give "answer" or "check" instead.'
            )
    return items
