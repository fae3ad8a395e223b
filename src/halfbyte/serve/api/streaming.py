"""Work for a client as long as the client is there.

What every piece of a stream goes through costs the model time: beside it, both want the same cores
and caches. So the work is done in the request's own task, and the pieces go to the connection
directly.
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


class ClientLeft(Exception):
    """Nobody waits for the answer any more."""


class WhileConnected:
    """Cancels what is done within it when the client leaves; ClientLeft comes out of it then.

    As :func:`asyncio.timeout` does when the time is over. It must be left before the answer's last
    message is sent: to who listens, a finished connection looks like one that was left.
    """

    def __init__(self, receive: Receive) -> None:
        """Prepare.

        Args:
            receive: Of the connection; the request's body has been read.
        """
        self._receive = receive
        self._has_left = False

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
        if not self._has_left:
            return
        # Somebody else may have cancelled the task as well: that goes on.
        others = self._task.uncancel() > self._cancelled_before
        if isinstance(error, asyncio.CancelledError) and not others:
            raise ClientLeft from error

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self._has_left = True
        self._task.cancel()


class EventStream:
    """Server-sent events, for as long as the client listens."""

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        held: AsyncExitStack,
    ) -> None:
        """Take what is to be sent.

        Args:
            pieces: Of the stream.
            headers: To send along.
            held: Left when the stream is over, however it ends; with a WhileConnected in it.
        """
        self._headers = [
            *_STREAM_HEADERS,
            *((name.lower().encode(), value.encode()) for name, value in headers.items()),
        ]
        self._pieces = pieces
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop where the client leaves."""
        start: Message = {
            "type": "http.response.start",
            "status": 200,
            "headers": self._headers,
        }
        with suppress(ClientLeft):
            async with self._held:
                await send(start)
                async for piece in self._pieces:
                    body = {"type": "http.response.body", "body": piece, "more_body": True}
                    await send(body)
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def write_json(value: Any) -> str:
    """Write a value as JSON without spaces."""
    return _ENCODER.encode(value)


def write_event(data: str) -> bytes:
    """Write a server-sent event of one line."""
    # A lone surrogate is no UTF-8; a client could not read it either.
    return f"data: {data}\n\n".encode("utf-8", "replace")
