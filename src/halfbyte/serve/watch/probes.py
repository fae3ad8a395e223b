"""Questions with known answers, asked again and again: a model that forgets one has changed.

They go to the primary model itself, one at a time, past fallback and canary.
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
from halfbyte.serve.routing.attempt import Attempt, Demands
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts

log = logging.getLogger(__name__)

LONGEST_SECONDS = 120.0
"""For one answer."""
PATIENCE = 2
"""Rounds that a question must be wrong in, after it was right in the first one, for an alert."""


class Probes:
    """The questions and how they were answered."""

    def __init__(
        self,
        items: Sequence[Item],
        router: Router,
        config: QualityConfig,
        alerts: Alerts,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """Keep what is asked.

        Args:
            items: Questions whose written answers can be checked.
            router: Knows the primary model.
            config: How often, and the timeouts.
            alerts: Told when a question that was answered right is not any more.
            clock: The time.
        """
        self._items = items
        self._router = router
        self._config = config
        self._alerts = alerts
        self._clock = clock
        self._numbers = itertools.count(1)
        self._right_at_first: dict[str, bool] = {}
        """By question: whether its first answer, however late it came, was right."""
        self._wrong: dict[str, int] = {}
        """Rounds in a row, by question."""
        self.last: dict[str, bool] = {}
        """Whether each was right in the last round; one that got no answer was not."""
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin. Needs a running event loop."""
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
        """Ask every question once, and raise or clear the alert."""
        found = {item.name: await self._ask(item) for item in self._items}
        self.last = {name: bool(right) for name, right in found.items()}
        for name, right in found.items():
            if right is not None:
                self._right_at_first.setdefault(name, right)
        known = [name for name, right in self._right_at_first.items() if right]
        for name in known:
            self._wrong[name] = 0 if found[name] else self._wrong.get(name, 0) + 1
        lost = sorted(name for name, rounds in self._wrong.items() if rounds >= PATIENCE)
        self._alerts.set(
            "probes",
            bool(lost),
            f"{len(lost)} of {len(known)} questions that were answered right at "
            f"first are answered wrong now: {', '.join(lost[:5])}",
            float(len(lost)),
        )

    async def _ask(self, item: Item) -> bool | None:
        """Tell whether an answer is right; None: there is none."""
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
            deadline=time.monotonic() + LONGEST_SECONDS,
        )
        route = self._router.routes[0]
        attempt = Attempt(
            route, call, self._config, demands=Demands(tokens=None), clock=self._clock
        )
        try:
            cause = await attempt.hold()
        finally:
            await attempt.close()
        assert item.check is not None
        return None if cause else item.check.passes(attempt.seen.text(), item.line, {})


def read_probes(path: Path) -> list[Item]:
    """Read the questions.

    Args:
        path: A task file as `halfbyte compare --tasks` takes it.

    Returns:
        The questions.

    Raises:
        ConfigError: A question has choices, which a served model cannot rate.
    """
    items = read_tasks([path])
    for item in items:
        if item.check is None:
            raise ConfigError(
                f"'{path}': question '{item.name}' has choices. Probes are written answers: give "
                '"answer" or "check" instead.'
            )
    return items
