"""Alerts: raised once, reported by log, metric and webhook, cleared when the problem is over."""

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

REPEAT_SECONDS = 300.0
"""The same alert is not reported again within this time."""
MAX_QUEUE = 100
"""Webhook messages waiting to be sent; more are dropped."""
MAX_TRIES = 3
POST_SECONDS = 10.0
"""Timeout of one webhook request."""

Count = Callable[[str, str], None]
"""Called with a counter's name and its label."""


@dataclass(slots=True)
class Alert:
    """One problem."""

    name: str
    message: str
    value: float | None = None
    reported_at: float | None = None
    """Monotonic seconds; None while the same alert was reported too recently."""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-serializable values."""
        return {"name": self.name, "message": self.message, "value": self.value}


class Alerts:
    """The active alerts, and the webhook that they are sent to."""

    def __init__(
        self,
        *,
        webhook: str | None = None,
        count: Count | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        """Start without alerts.

        Args:
            webhook: URL to which each alert is posted; None: nowhere.
            count: Counts raised and dropped alerts.
            clock: Returns monotonic seconds.
        """
        self._webhook = webhook
        self._count = count or (lambda name, label: None)
        self._clock = clock
        self._active: dict[str, Alert] = {}
        self._reported_at: dict[str, float] = {}
        """When each alert was last reported, by name."""
        self._queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue(MAX_QUEUE)
        self._sender: asyncio.Task[None] | None = None

    @property
    def active(self) -> list[Alert]:
        """The active alerts, oldest first."""
        return list(self._active.values())

    def update(self, name: str, is_active: bool, message: str, value: float | None = None) -> None:
        """Raise, update or clear an alert.

        Args:
            name: Identifies the alert, such as ``repetition``.
            is_active: Whether the problem exists now.
            message: What was found, and what is allowed.
            value: What was found, as a number.
        """
        alert = self._active.get(name)
        if not is_active:
            if alert is not None:
                del self._active[name]
                if alert.reported_at is not None:
                    log.warning("alert cleared: %s", name)
                    self._post(alert, "cleared")
            return
        now = self._clock()
        if alert is None:
            alert = self._active[name] = Alert(name, message, value)
        alert.message, alert.value = message, value
        last = self._reported_at.get(name, -REPEAT_SECONDS)
        if alert.reported_at is None and now - last >= REPEAT_SECONDS:
            alert.reported_at = self._reported_at[name] = now
            log.warning("alert: %s: %s", name, message)
            self._count("alerts_raised", name)
            self._post(alert, "raised")

    def report_event(self, name: str, message: str) -> None:
        """Report something that happened once, such as a rollback."""
        log.warning("%s: %s", name, message)
        self._count("alerts_raised", name)
        self._post(Alert(name, message), "happened")

    def _post(self, alert: Alert, state: str) -> None:
        """Queue a webhook message."""
        if self._webhook is None:
            return
        now = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            self._queue.put_nowait({**alert.to_dict(), "state": state, "time": now})
        except asyncio.QueueFull:
            self._count("dropped", "webhook")

    async def start(self) -> None:
        """Start the sender. Needs a running event loop."""
        if self._webhook is not None:
            self._sender = asyncio.create_task(self._send_all(self._webhook))

    async def close(self) -> None:
        """Send the queued messages, within the timeout of one request, and stop."""
        if self._sender is None:
            return
        try:
            async with asyncio.timeout(POST_SECONDS):
                await self._queue.join()
        except TimeoutError:
            self._count("dropped", "webhook")
        self._sender.cancel()
        await asyncio.gather(self._sender, return_exceptions=True)

    async def _send_all(self, url: str) -> None:
        httpx2 = _load_httpx2()
        # Alerts go to the configured address only: a redirect could lead anywhere.
        async with httpx2.AsyncClient(timeout=POST_SECONDS, follow_redirects=False) as client:
            while True:
                values = await self._queue.get()
                try:
                    await self._send(client, url, values)
                finally:
                    self._queue.task_done()

    async def _send(self, client: Any, url: str, values: dict[str, Any]) -> None:
        for attempt in range(MAX_TRIES):
            try:
                response = await client.post(url, json=values)
                if response.status_code < 400:
                    return
                problem = f"status {response.status_code}"
            except _load_httpx2().HTTPError as error:
                problem = repr(error)
            await asyncio.sleep(2.0**attempt)
        log.warning("alert %s could not be sent to the webhook: %s", values["name"], problem)
        self._count("dropped", "webhook")


def _load_httpx2() -> Any:
    """Import httpx2, which the extra ``serve`` installs."""
    with require_extra("httpx2", "serve", "Sending alerts to a webhook"):
        import httpx2
    return httpx2
