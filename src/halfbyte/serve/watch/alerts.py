"""Alerts: raised once, told by log, metric and webhook, cleared when it is over."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from halfbyte.errors import require_extra
from halfbyte.serve.routing.breaker import Clock

log = logging.getLogger(__name__)

QUIET_SECONDS = 300.0
"""After an alert was told, the same one is told again only after so long."""
LONGEST_QUEUE = 100
TRIES = 3
POST_SECONDS = 10.0

Count = Callable[[str, str], None]
"""Called with a counter's name and its label."""


@dataclass(slots=True)
class Alert:
    """Something that somebody should know."""

    name: str
    message: str
    value: float | None
    since: float
    told: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {"name": self.name, "message": self.message, "value": self.value}


class Alerts:
    """What is wrong now, and who has been told."""

    def __init__(
        self,
        *,
        webhook: str | None = None,
        count: Count | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Start with nothing wrong.

        Args:
            webhook: Address that gets each alert by POST; None: none.
            count: Counts what is raised and what is dropped.
            clock: The time.
        """
        self._webhook = webhook
        self._count = count or (lambda name, label: None)
        self._clock = clock
        self._active: dict[str, Alert] = {}
        self._told: dict[str, float] = {}
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(LONGEST_QUEUE)
        self._sender: asyncio.Task[None] | None = None

    @property
    def active(self) -> list[Alert]:
        """What is wrong now, the oldest first."""
        return list(self._active.values())

    def set(self, name: str, wrong: bool, message: str, value: float | None = None) -> None:
        """Say whether something is wrong.

        Args:
            name: Of the alert, such as ``repetition``.
            wrong: Whether it is.
            message: What was found against what is allowed.
            value: What was found, as a number.
        """
        alert = self._active.get(name)
        if not wrong:
            if alert is not None:
                del self._active[name]
                if alert.told is not None:
                    log.warning("alert over: %s", name)
                    self._post(alert, "cleared")
            return
        now = self._clock()
        if alert is None:
            alert = self._active[name] = Alert(name, message, value, now)
        alert.message, alert.value = message, value
        if alert.told is None and now - self._told.get(name, -QUIET_SECONDS) >= QUIET_SECONDS:
            alert.told = self._told[name] = now
            log.warning("alert: %s: %s", name, message)
            self._count("alerts_raised", name)
            self._post(alert, "raised")

    def tell(self, name: str, message: str, value: float | None = None) -> None:
        """Tell of something that happened once, such as a rollback."""
        log.warning("%s: %s", name, message)
        self._count("alerts_raised", name)
        self._post(Alert(name, message, value, self._clock()), "happened")

    def _post(self, alert: Alert, state: str) -> None:
        if self._webhook is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._queue.put_nowait({**alert.to_dict(), "state": state, "time": now})
        except asyncio.QueueFull:
            self._count("dropped", "webhook")

    async def start(self) -> None:
        """Begin to send. Needs a running event loop."""
        if self._webhook is not None:
            self._sender = asyncio.create_task(self._send_all(self._webhook))

    async def close(self) -> None:
        """Send what waits, within one try's time, then stop."""
        if self._sender is None:
            return
        try:
            async with asyncio.timeout(POST_SECONDS):
                await self._queue.join()
        except TimeoutError:
            self._count("dropped", "webhook")
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self, address: str) -> None:
        httpx2 = _load_httpx2()
        # An address on the command line is where it goes: no redirect leads elsewhere.
        async with httpx2.AsyncClient(timeout=POST_SECONDS, follow_redirects=False) as client:
            while True:
                values = await self._queue.get()
                try:
                    await self._send(client, address, values)
                finally:
                    self._queue.task_done()

    async def _send(self, client: Any, address: str, values: dict[str, Any]) -> None:
        for attempt in range(TRIES):
            try:
                reply = await client.post(address, json=values)
                if reply.status_code < 400:
                    return
                found = f"status {reply.status_code}"
            except _load_httpx2().HTTPError as error:
                found = repr(error)
            await asyncio.sleep(2.0**attempt)
        log.warning("alert %s did not reach the webhook: %s", values["name"], found)
        self._count("dropped", "webhook")


def _load_httpx2() -> Any:
    """Import httpx2, which the extra ``serve`` brings."""
    with require_extra("httpx2", "serve", "Sending alerts to a webhook"):
        import httpx2
    return httpx2
