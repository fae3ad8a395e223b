"""Connections to upstream servers that the server closes while they are idle."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
from tests.serve.helpers_raw import MODELS, reply
from tests.serve.helpers_upstream import FULL, make_call

from halfbyte.errors import ServeError
from halfbyte.serve import upstream_connections
from halfbyte.serve.upstream import UpstreamBackend


@dataclass
class KeepAliveServer:
    address: str = ""
    connections: int = 0
    posts: int = 0


@asynccontextmanager
async def keep_alive_server(
    *, closes_first_posts: int = 0, closes_after: float = 0.0, sends: bytes = b""
):
    """Keeps connections open after GET; after POST, closes some early, the others after FULL."""
    state = KeepAliveServer()

    async def handle(reader, writer):
        state.connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                if head.startswith(b"GET"):
                    writer.write(reply(MODELS))
                    continue
                state.posts += 1
                if state.posts > closes_first_posts:
                    writer.write(FULL)
                    await writer.drain()
                else:
                    await asyncio.sleep(closes_after)
                    writer.write(sends)
                return
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    state.address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    async with server:
        yield state


def run(test, **settings):
    """Run a test with a server and a backend for it."""

    async def inside():
        async with keep_alive_server(**settings) as server:
            backend = UpstreamBackend.open([server.address])
            try:
                await test(server, backend)
            finally:
                await backend.close()

    asyncio.run(inside())


async def answer(backend):
    return [event async for event in backend.stream(make_call())]


def test_request_on_a_closed_idle_connection_is_retried():
    async def test(server, backend):
        assert (await answer(backend))[-1].completion_tokens == 2
        assert (server.connections, server.posts) == (2, 2)
        assert backend.hosts[0].is_up

    run(test, closes_first_posts=1)


def test_request_is_retried_only_once():
    async def test(server, backend):
        with pytest.raises(ServeError, match="Server disconnected without") as caught:
            await answer(backend)
        assert (caught.value.status, server.posts) == (502, 2)

    run(test, closes_first_posts=9)


def test_request_on_a_new_connection_is_not_retried():
    async def test(server, backend):
        backend.model = "big"  # so that no list of models is asked for first
        with pytest.raises(ServeError, match="Server disconnected without"):
            await answer(backend)
        assert (server.connections, server.posts) == (1, 1)

    run(test, closes_first_posts=9)


def test_request_that_fails_later_is_not_retried(monkeypatch):
    monkeypatch.setattr(upstream_connections, "RETRY_WINDOW_SECONDS", 0.05)

    async def test(server, backend):
        with pytest.raises(ServeError, match="Server disconnected without"):
            await answer(backend)
        assert server.posts == 1

    run(test, closes_first_posts=9, closes_after=0.2)


def test_request_with_an_invalid_response_is_not_retried():
    async def test(server, backend):
        with pytest.raises(ServeError, match="illegal"):
            await answer(backend)
        assert server.posts == 1

    run(test, closes_first_posts=9, sends=b"this is not HTTP\r\n\r\n")


def test_idle_connection_is_dropped_before_servers_close_it(monkeypatch):
    assert upstream_connections.KEEPALIVE_SECONDS < 5
    monkeypatch.setattr(upstream_connections, "KEEPALIVE_SECONDS", 0.05)

    async def test(server, backend):
        for pause, connections in ((0.0, 1), (0.0, 1), (0.2, 2)):
            await asyncio.sleep(pause)
            response = await backend._open_client().get(f"{server.address}/models")
            assert (response.status_code, server.connections) == (200, connections)

    run(test)
