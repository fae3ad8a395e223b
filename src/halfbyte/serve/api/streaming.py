"""Stream an answer, and cancel its generation when the client disconnects.

The code that runs for every piece of a stream competes with the model for cores and caches. So the
work is done in the request's own task, and the pieces go directly to the connection.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import AsyncExitStack, suppress
from types import TracebackType
from typing import Any

from starlette.types import Message, Receive, Scope, Send

_STREAM_HEADERS = (
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
)
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


class ClientDisconnected(Exception):
    """The client no longer waits for the answer."""


class CancelOnDisconnect:
    """A context manager that cancels its block when the client disconnects.

    It then raises ClientDisconnected, as :func:`asyncio.timeout` raises TimeoutError. The block
    must end before the answer's last message is sent: after that, ASGI reports a disconnect too.
    """

    def __init__(self, receive: Receive) -> None:
        """Prepare to watch a connection.

        Args:
            receive: The connection's ASGI receive; the request's body has been read.
        """
        self._receive = receive
        self._is_disconnected = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._cancelled_before = task, task.cancelling()
        self._watcher = asyncio.create_task(self._watch())

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watcher.cancel()
        if not self._is_disconnected:
            return
        # If someone else cancelled the task too, that cancellation must propagate.
        is_cancelled_by_others = self._task.uncancel() > self._cancelled_before
        if isinstance(error, asyncio.CancelledError) and not is_cancelled_by_others:
            raise ClientDisconnected from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._is_disconnected = True
        self._task.cancel()


class EventStream:
    """An ASGI response that streams server-sent events until the client disconnects."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        resources: AsyncExitStack,
    ) -> None:
        """Prepare the stream.

        Args:
            pieces: The bytes to send.
            headers: Additional response headers.
            resources: Closed when the stream ends in any way; contains a CancelOnDisconnect.
        """
        self._headers = [
            *_STREAM_HEADERS,
            *((name.lower().encode(), value.encode()) for name, value in headers.items()),
        ]
        self._pieces = pieces
        self._resources = resources

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all pieces, or stop when the client disconnects."""
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": self._headers,
        }
        with suppress(ClientDisconnected):
            async with self._resources:
                await send(start)
                async for piece in self._pieces:
                    body = {"type": "http.response.body", "body": piece, "more_body": True}
                    await send(body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def write_json(value: Any) -> str:
    """Encode a value as JSON without spaces."""
    return _ENCODER.encode(value)


def write_event(data: str) -> bytes:
    """Encode a server-sent event with one data line."""
    # A lone surrogate cannot be encoded as UTF-8.
    return f"data: {data}\n\n".encode("utf-8", "replace")
