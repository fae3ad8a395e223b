"""Cancellation when the client disconnects, and what a stream sends."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from halfbyte.serve.api.streaming import CancelOnDisconnect, ClientDisconnected, EventStream


class Client:
    """A client that stays connected until it is told to disconnect."""

    def __init__(self):
        self.leaving = asyncio.Event()

    async def receive(self):
        await self.leaving.wait()
        return {"type": "http.disconnect"}


async def wait_for(client, begun, cleaned):
    async with CancelOnDisconnect(client.receive):
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)


def test_work_is_cancelled_on_disconnect_and_the_task_continues():
    async def run():
        client, begun, cleaned = Client(), asyncio.Event(), []
        asyncio.get_running_loop().call_later(0.01, client.leaving.set)
        with pytest.raises(ClientDisconnected):
            await wait_for(client, begun, cleaned)
        assert cleaned == [True]
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


@pytest.mark.parametrize("leaves", [False, True])
def test_external_cancellation_is_passed_on(leaves):
    async def run():
        client, begun, cleaned = Client(), asyncio.Event(), []
        task = asyncio.create_task(wait_for(client, begun, cleaned))
        await begun.wait()
        if leaves:
            client.leaving.set()
            # Cancelled by that, and not run since.
            while not task.cancelling():
                await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert cleaned == [True]

    asyncio.run(run())


def test_disconnect_after_the_block_cancels_nothing():
    async def run():
        client = Client()
        async with CancelOnDisconnect(client.receive):
            await asyncio.sleep(0)
        client.leaving.set()
        await asyncio.sleep(0.01)
        return "done"

    assert asyncio.run(run()) == "done"


def test_stream_sends_headers_pieces_and_end():
    sent = []

    async def pieces():
        yield b"one"
        yield b"two"

    async def send(message):
        sent.append(message)

    async def run():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(CancelOnDisconnect(Client().receive))
            stream = EventStream(pieces(), {"X-Request-Id": "a"}, stack.pop_all())
        await stream({}, None, send)

    asyncio.run(run())
    start, *bodies = sent
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert (b"content-type", b"text/event-stream; charset=utf-8") in start["headers"]
    assert (b"x-request-id", b"a") in start["headers"]
    assert [(m["body"], m["more_body"]) for m in bodies] == [
        (b"one", True),
        (b"two", True),
        (b"", False),
    ]
