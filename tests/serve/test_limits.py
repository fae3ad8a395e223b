"""Limits per key, and timeouts of stalled connections."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from tests.serve.helpers_gateway import CHAT, HEAD, bearer, make_gateway
from tests.serve.helpers_server import serve

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Delta, Finish, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.limits import Limits
from halfbyte.serve.routing.router import Router


def test_limits_are_counted_per_key():
    exceeded = []
    limits = Limits(
        max_requests=3, max_requests_per_key=2, tokens_per_minute=100, on_rejection=exceeded.append
    )
    with limits.enter("ann"), limits.enter("ann"):
        with pytest.raises(ServeError, match="2 running requests") as caught, limits.enter("ann"):
            pass
        assert (caught.value.status, caught.value.retry_after) == (429, 1.0)
        refused = pytest.raises(ServeError, match="has 3 running requests")
        with limits.enter("bob"), refused, limits.enter("carl"):
            pass
    assert limits.running == 0
    with limits.enter("ann") as tally:
        tally.note(Usage(prompt_tokens=40, completion_tokens=20))
    # Who leaves pays for what has come, and for about as much as was to read.
    with contextlib.suppress(KeyError), limits.enter("ann", prompt=59) as tally:
        tally.note(Delta(text="x"))
        raise KeyError
    # What was refused costs nothing.
    with contextlib.suppress(ServeError), limits.enter("carl", prompt=1000):
        raise ServeError("Too long.")
    with limits.enter("carl"):
        pass
    with pytest.raises(ServeError, match="used 120 tokens") as caught, limits.enter("ann"):
        pass
    assert 50 < caught.value.retry_after <= 60
    assert exceeded == ["max_requests_per_key", "requests", "tokens_per_minute_per_key"]
    with limits.enter("bob"):
        pass


def test_requests_over_a_keys_limit_get_429():
    gateway, _ = make_gateway(
        ServeConfig(max_requests_per_key=2),
        keys=["ann:first-secret", "bob:second-secret"],
        delay=0.02,
    )
    with serve(gateway) as server, ThreadPoolExecutor(8) as pool:

        def post(secret):
            return httpx2.post(
                f"{server.v1}/chat/completions", json=CHAT, headers=bearer(secret), timeout=20
            )

        replies = [pool.submit(post, "first-secret") for _ in range(6)]
        time.sleep(0.3)
        other = pool.submit(post, "second-secret")
        codes = sorted(reply.result().status_code for reply in replies)
        assert codes == [200, 200, 429, 429, 429, 429]
        assert other.result().status_code == 200
    refused = [r.result() for r in replies if r.result().status_code == 429]
    assert all(reply.headers["retry-after"] == "1" for reply in refused)


def test_tokens_count_against_the_keys_limit():
    gateway, _ = make_gateway(ServeConfig(tokens_per_minute_per_key=50), keys=["ann:first-secret"])
    with serve(gateway) as server:
        codes = [
            httpx2.post(
                f"{server.v1}/chat/completions", json=CHAT, headers=bearer("first-secret")
            ).status_code
            for _ in range(3)
        ]
    assert codes == [200, 429, 429] or codes == [200, 200, 429]


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_an_abandoned_answer_count(stream):
    gateway, engine = make_gateway(
        ServeConfig(tokens_per_minute_per_key=10), keys=["ann:first-secret"], delay=0.05
    )
    body = json.dumps(CHAT | {"stream": stream}).encode()
    head = HEAD + "Authorization: Bearer first-secret\r\n" + f"Content-Length: {len(body)}\r\n\r\n"
    with serve(gateway) as server:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        with socket.create_connection(address) as client:
            client.sendall(head.encode() + body)
            while not gateway.limits.running:
                time.sleep(0.01)
            time.sleep(0.8)
        while gateway.limits.running:
            time.sleep(0.01)
        reply = httpx2.post(
            f"{server.v1}/chat/completions", json=CHAT, headers=bearer("first-secret")
        )
    assert (reply.status_code, engine.closed_early) == (429, 1)


def test_endless_body_of_a_rejected_request_is_cut_off(monkeypatch):
    monkeypatch.setattr("halfbyte.serve.api.connection.REST_SECONDS", 0.3)
    gateway, _ = make_gateway(keys=["ann:first-secret"])
    with serve(gateway) as server:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as client:
            client.sendall((HEAD + "Content-Length: 1000000000\r\n\r\n{").encode())
            assert client.recv(1000).startswith(b"HTTP/1.1 401")
            start = time.monotonic()
            with contextlib.suppress(ConnectionError):
                while client.recv(1000):
                    pass
            assert time.monotonic() - start < 5
        # One that comes to its end leaves the connection as it was.
        with socket.create_connection(address, timeout=10) as client:
            for _ in range(2):
                client.sendall((HEAD + "Content-Length: 10\r\n\r\n{").encode())
                time.sleep(0.1)
                assert client.recv(1000).startswith(b"HTTP/1.1 401")
                client.sendall(b"123456789")
                time.sleep(0.5)


class Flood(Router):
    def __init__(self, backend, pieces, characters):
        super().__init__(backend)
        self.pieces, self.characters = pieces, characters

    async def stream(self, call, served):
        for _ in range(self.pieces):
            yield Delta(text="x" * self.characters)
        yield Finish()
        yield Usage(prompt_tokens=1, completion_tokens=1)


@contextlib.contextmanager
def flooded(monkeypatch, *flood):
    """A client to whom a long stream is sent, and the gateway that sends it."""
    monkeypatch.setattr("halfbyte.serve.api.connection.READ_SECONDS", 0.3)
    gateway, _ = make_gateway()
    gateway.router = Flood(gateway.backend, *flood)
    body = json.dumps(CHAT | {"stream": True}).encode()
    with serve(gateway) as server:
        address = ("127.0.0.1", int(server.address.rpartition(":")[2]))
        with socket.create_connection(address, timeout=10) as client:
            client.sendall((HEAD + f"Content-Length: {len(body)}\r\n\r\n").encode() + body)
            yield client, gateway


def test_stalled_reader_is_disconnected(monkeypatch):
    with flooded(monkeypatch, 100, 1_000_000) as (_, gateway):
        deadline = time.monotonic() + 10
        time.sleep(0.2)
        assert gateway.limits.running == 1
        while gateway.limits.running:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_slow_reader_gets_a_large_answer(monkeypatch):
    with flooded(monkeypatch, 1, 20_000_000) as (client, _):
        end = b""
        while not end.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"):
            part = client.recv(200_000)
            assert part
            end = (end + part)[-100:]
            time.sleep(0.01)
