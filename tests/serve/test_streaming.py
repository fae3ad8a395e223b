"""Work that ends when its client leaves, and pieces that go straight to the connection."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import pytest

from halfbyte.serve.api.streaming import (
    CONNECTION_SEND,
    ClientLeft,
    EventStream,
    WhileConnected,
)


class Client:
    """Stays until it is told to leave."""

    def __init__(self):
        self.leaving = asyncio.Event()

    async def receive(self):
        await self.leaving.wait()
        return {"type": "http.disconnect"}


async def wait_for(client, begun, cleaned):
    async with WhileConnected(client.receive):
        try:
            begun.set()
            await asyncio.Event().wait()
        finally:
            cleaned.append(True)


def test_work_is_cancelled_when_the_client_leaves_and_the_task_goes_on():
    async def run():
        client, begun, cleaned = Client(), asyncio.Event(), []
        asyncio.get_running_loop().call_later(0.01, client.leaving.set)
        with pytest.raises(ClientLeft):
            await wait_for(client, begun, cleaned)
        assert cleaned == [True]
        assert asyncio.current_task().cancelling() == 0
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_task_that_somebody_else_cancels_is_cancelled(leaves):
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


def test_a_client_that_leaves_afterwards_cancels_nobody():
    async def run():
        client = Client()
        async with WhileConnected(client.receive):
            await asyncio.sleep(0)
        client.leaving.set()
        await asyncio.sleep(0.01)
        return "done"

    assert asyncio.run(run()) == "done"


def test_pieces_go_to_the_connection_and_the_rest_through_every_layer():
    layered, direct = [], []

    async def pieces():
        yield b"one"
        yield b"two"

    async def send(message):
        layered.append(message)

    async def send_directly(message):
        direct.append(message)

    async def run():
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(WhileConnected(Client().receive))
            stream = EventStream(pieces(), {"X-Request-Id": "a"}, stack.pop_all())
        await stream({CONNECTION_SEND: send_directly}, None, send)

    asyncio.run(run())
    start, end = layered
    assert (start["type"], start["status"]) == ("http.response.start", 200)
    assert (b"x-request-id", b"a") in start["headers"]
    assert (end["body"], end["more_body"]) == (b"", False)
    assert [(m["body"], m["more_body"]) for m in direct] == [(b"one", True), (b"two", True)]
