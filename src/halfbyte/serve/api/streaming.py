"""Work for a client as long as the client is there."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

Result = TypeVar("Result")

_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


async def while_connected(receive: Receive, work: Awaitable[Result]) -> Result | None:
    """Run until it is done or the client has left; then it is cancelled, and waited for.

    Args:
        receive: Of the connection; the request's body has been read.
        work: To do.

    Returns:
        Its result; None where the client left.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


class EventStream(Response):
    """Server-sent events, for as long as the client listens."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        held: AsyncExitStack,
    ) -> None:
        """Take what is to be sent.

        Args:
            events: Lines of the stream.
            headers: To send along.
            held: Left when the stream is over, however it ends.
        """
        super().__init__(
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._events = events
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client leaves."""
        async with self._held, aclosing(self._events):
            await while_connected(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        start: Message = {
            "type": "http.response.start",
            "status": self.status_code,
            "headers": self.raw_headers,
        }
        await send(start)
        async for line in self._events:
            await send({"type": "http.response.body", "body": line, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def write_json(value: Any) -> str:
    """Write a value as JSON without spaces."""
    return _ENCODER.encode(value)


def write_event(data: str) -> bytes:
    """Write a server-sent event of one line."""
    # A lone surrogate is no UTF-8; a client could not read it either.
    return f"data: {data}\n\n".encode("utf-8", "replace")


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
