"""Calls to upstream servers, and their answers."""

from __future__ import annotations

import asyncio
import time

import pytest
from tests.serve.helpers_raw import chunk, stream

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Call
from halfbyte.serve.upstream import UpstreamBackend, UpstreamTimeouts

HELLO = [{"role": "user", "content": "hello"}]
USAGE = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}}
FULL = stream(chunk("Hel"), chunk("lo"), chunk(finish="stop"), USAGE, "[DONE]")
NOBODY = "http://127.0.0.1:9/v1"  # the discard port: nothing listens there


def make_call(kind="chat", seconds=None, **body):
    content = {"messages": HELLO} if kind == "chat" else {"prompt": "hello"}
    deadline = None if seconds is None else time.monotonic() + seconds
    return Call(kind=kind, body={"model": "small", **content, **body}, id="x", deadline=deadline)


def ask(addresses, call=None, *, key=None, **timeouts):
    """Return all events; raises the error."""

    async def run():
        backend = UpstreamBackend.open(addresses, key=key, timeouts=UpstreamTimeouts(**timeouts))
        try:
            return [event async for event in backend.stream(call or make_call())]
        finally:
            await backend.close()

    return asyncio.run(run())


def refused(addresses, call=None, **more):
    with pytest.raises(ServeError) as caught:
        ask(addresses, call, **more)
    return caught.value
