"""How a server starts to listen, keeps connections, drains and stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from tests.serve.helpers_gateway import CHAT, JSON, make_gateway
from tests.serve.helpers_scripted import DEFAULT_ANSWER
from tests.serve.helpers_server import serve

from halfbyte.errors import ConfigError
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.running import bind, run_server


def test_draining_rejects_new_requests_and_finishes_running_ones():
    gateway, _ = make_gateway(delay=0.03)
    with serve(gateway) as server, ThreadPoolExecutor(1) as pool:

        def post():
            return httpx2.post(f"{server.v1}/chat/completions", json=CHAT, timeout=20)

        running = pool.submit(post)
        while not gateway.limits.running:
            time.sleep(0.01)
        server.loop.call_soon_threadsafe(server.server.drain)
        time.sleep(0.1)
        assert httpx2.get(f"{server.address}/ready").status_code == 503
        assert httpx2.get(f"{server.address}/health").status_code == 200
        refused = post()
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert "retry-after" in refused.headers
        answer = running.result()
    assert answer.json()["choices"][0]["message"]["content"] == DEFAULT_ANSWER


def test_draining_ends_at_its_timeout():
    gateway, engine = make_gateway(
        ServeConfig(drain_seconds=0.3), delay=0.2, script={"hello": "word " * 200}
    )
    start = time.monotonic()
    with serve(gateway) as server:

        def post():
            body = dict(CHAT, stream=True)
            request = httpx2.stream("POST", f"{server.v1}/chat/completions", json=body)
            with pytest.raises(httpx2.HTTPError), request as reply:
                list(reply.iter_lines())

        thread = threading.Thread(target=post)
        thread.start()
        while not gateway.limits.running:
            time.sleep(0.01)
    thread.join(10)
    assert time.monotonic() - start < 10
    assert engine.running == 0


@pytest.fixture
def terminal():
    """The tests may run with SIGHUP ignored, as under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("terminal")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_lets_running_answers_finish(name):
    gateway, _ = make_gateway()
    body = json.dumps(CHAT).encode()

    async def run():
        with bind("127.0.0.1", 0) as bound:
            ready = asyncio.Event()
            serving = asyncio.create_task(
                run_server(gateway, bound, on_ready=lambda server: ready.set())
            )
            await ready.wait()
            async with httpx2.AsyncClient() as client:
                url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/chat/completions"
                asked = asyncio.create_task(client.post(url, content=body, headers=JSON))
                while not gateway.limits.running:
                    await asyncio.sleep(0)
                os.kill(os.getpid(), getattr(signal, name))
                reply = await asked
            await asyncio.wait_for(serving, 30)
        return reply.status_code

    assert asyncio.run(run()) == 200


def test_asyncio_sends_small_pieces_without_delay():
    # Asyncio sets TCP_NODELAY only where the socket says that it is TCP; without it every answer's
    # first token waits 40 ms for an acknowledgement.
    with bind("127.0.0.1", 0) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_port_taken_while_the_model_loads_is_an_error():
    gateway, _ = make_gateway()
    with bind("127.0.0.1", 0) as other, bind(*other.getsockname()) as ours:
        other.listen()
        with pytest.raises(ConfigError, match="Cannot listen: Address already in use"):
            asyncio.run(run_server(gateway, ours))


def test_one_connection_serves_many_requests():
    with serve(make_gateway()[0]) as server:
        host = server.address.removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=10)
        for _ in range(3):
            connection.request("POST", "/v1/chat/completions", json.dumps(CHAT), JSON)
            reply = connection.getresponse()
            assert json.loads(reply.read())["choices"][0]["finish_reason"] == "stop"
        connection.close()


def test_many_concurrent_requests_are_answered():
    gateway, _ = make_gateway(delay=0.001)

    async def ask_all(address):
        async with httpx2.AsyncClient(timeout=30) as client:
            return await asyncio.gather(
                *(client.post(f"{address}/chat/completions", json=CHAT) for _ in range(50))
            )

    with serve(gateway) as server:
        replies = asyncio.run(ask_all(server.v1))
    texts = {reply.json()["choices"][0]["message"]["content"] for reply in replies}
    assert texts == {DEFAULT_ANSWER}
    assert gateway.limits.running == 0
