"""Measure the overhead of HTTP, JSON and text per request, over calling the engine directly.

One process serves and also calls its own engine; another one is the client. All arms generate the
same number of greedy tokens from the same prompt, in turn, so that other load affects them equally:

::

    engine       called in the server's process
    fixed bytes  called in the server's process; the client gets constant bytes for each chunk
    gateway      over HTTP, streamed
    each token   over HTTP, streamed with one chunk per token
    whole        over HTTP, not streamed

``fixed bytes`` is the cost of a client in another process, whatever it reads. Wall time jitters by
milliseconds, so the CPU time of the event loop's thread and its number of wake-ups are reported
too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import socket
import statistics
import sys
import time
from contextlib import aclosing
from functools import partial
from pathlib import Path

from halfbyte.serve.assembly import open_service
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Generated, TokenRequest
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.running import DrainingServer, bind, make_uvicorn_config
from record import save_result

TEXT = "The old lighthouse keeper climbed the stairs every evening, and while he climbed he counted"
"""Continued in plain letters: a character of several tokens is sent only with its last token."""
TAIL_QUANTILE = 0.99
ARMS = ("engine", "fixed bytes", "gateway", "each token", "whole")
COMPARISONS = (
    (0, "first token", "engine", "gateway"),
    (1, "whole answer, streamed", "engine", "gateway"),
    (1, "whole answer, not streamed", "engine", "whole"),
    (1, "whole answer, a piece for each token", "engine", "each token"),
    (0, "first token", "engine", "fixed bytes"),
    (1, "whole answer", "engine", "fixed bytes"),
    (0, "first token", "fixed bytes", "gateway"),
    (1, "whole answer, streamed", "fixed bytes", "gateway"),
)
"""Column of the times (0: first token, 1: last token), event, base arm and compared arm."""
WARM_UP = 10
"""Rounds that are not recorded."""
CHUNK = b"data: " + b"." * 220 + b"\n\n"
"""A chunk of the same length as the gateway's."""
LAST_CHUNK = b"\r\n0\r\n\r\n"


def main() -> None:
    """Measure, or run as the client."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument(
        "--client", type=int, metavar="PORT", help="internal: run as the client of this port"
    )
    arguments = parser.parse_args()
    if arguments.client:
        run_client(arguments.client, arguments.model, arguments.tokens)
    else:
        asyncio.run(measure(arguments))


async def measure(arguments: argparse.Namespace) -> None:
    """Serve, run all arms in turn, save."""
    service = open_service(
        arguments.model, ServeConfig(), EngineConfig(cache_gb=0.2), QualityConfig(), ApiKeys()
    )
    await service.start()
    bound = bind("127.0.0.1", 0)
    server = DrainingServer(make_uvicorn_config(service.gateway), service.gateway)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    backend = service.gateway.text_tools
    engine, tokenized = backend._engine, await backend.tokenize({"prompt": TEXT})
    prompt = tuple(tokenized["tokens"])
    bare = await asyncio.get_running_loop().create_server(
        partial(FixedBytes, engine, prompt, arguments.tokens), sock=bind("127.0.0.1", 0)
    )
    name = service.gateway.models[0]
    over_http = await start_client(bound.getsockname()[1], name, arguments.tokens)
    clients = dict.fromkeys(ARMS[2:], over_http)
    bare_port = bare.sockets[0].getsockname()[1]
    clients["fixed bytes"] = await start_client(bare_port, name, arguments.tokens)
    times: dict[str, list[tuple[float, ...]]] = {arm: [] for arm in ARMS}
    usual = engine._piece_seconds
    wake_ups = count_wake_ups(asyncio.get_running_loop())
    for turn in range(arguments.pairs + WARM_UP):
        first = turn % len(ARMS)
        for arm in (*ARMS[first:], *ARMS[:first]):
            engine._piece_seconds = 0.0 if arm == "each token" else usual
            used, woken = time.thread_time(), len(wake_ups)
            if arm == "engine":
                found = await call_engine(engine, prompt, arguments.tokens)
            else:
                clients[arm].stdin.write(b"whole\n" if arm == "whole" else b"stream\n")
                found = json.loads(await clients[arm].stdout.readline())
            spent = (time.thread_time() - used, len(wake_ups) - woken)
            if turn >= WARM_UP:
                times[arm].append((*found, *spent))
    for client in {*clients.values()}:
        client.stdin.close()
        await client.wait()
    bare.close()
    server.drain()
    await serving
    await service.stop()
    save(arguments, times)


def count_wake_ups(loop: asyncio.AbstractEventLoop) -> list[float]:
    """Record the times at which a loop polls for events, in the returned list."""
    times: list[float] = []
    select = loop._selector.select

    def record_and_select(timeout=None):
        times.append(time.perf_counter())
        return select(timeout)

    loop._selector.select = record_and_select
    return times


async def start_client(port: int, model: str, tokens: int) -> asyncio.subprocess.Process:
    """Start a client process that sends one request per line of its stdin."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, model, "--tokens", str(tokens), "--client", str(port)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )


def make_request(prompt: tuple[int, ...], tokens: int) -> TokenRequest:
    """Make the engine's form of the request."""
    return TokenRequest(prompt=prompt, max_new_tokens=tokens, temperature=0.0, ignore_end=True)


async def call_engine(engine, prompt: tuple[int, ...], tokens: int) -> tuple[float, ...]:
    """Return the seconds until the first and the last token, and the number of chunks."""
    start = time.perf_counter()
    first, pieces = 0.0, 0
    async with aclosing(engine.generate(make_request(prompt, tokens))) as events:
        async for found in events:
            pieces += 1
            if not first and any(isinstance(event, Generated) for event in found):
                first = time.perf_counter() - start
    return first, time.perf_counter() - start, pieces


class FixedBytes(asyncio.Protocol):
    """Runs the engine for each request, and answers with constant bytes for each chunk."""

    def __init__(self, engine, prompt: tuple[int, ...], tokens: int) -> None:
        """Set the request that is run every time."""
        self.generate = partial(engine.generate, make_request(prompt, tokens))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store the transport to write to."""
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Answer the request, which arrives in one piece."""
        self.answering = asyncio.ensure_future(self.answer())

    async def answer(self) -> None:
        """Write a constant chunk for each one from the engine."""
        async with aclosing(self.generate()) as events:
            async for found in events:
                if any(isinstance(event, Generated) for event in found):
                    self.transport.write(CHUNK)
        self.transport.write(b"data: [DONE]\n\n" + LAST_CHUNK)


def run_client(port: int, model: str, tokens: int) -> None:
    """Send a request per line of stdin, streamed or not, over one connection."""
    body = {
        "model": model,
        "prompt": TEXT,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    requests = {
        f"{kind}\n": write_request(json.dumps({**body, "stream": kind == "stream"}))
        for kind in ("stream", "whole")
    }
    connection = None
    for line in sys.stdin:
        # Not earlier: the server closes a connection without a first request.
        connection = connection or connect(port)
        read = read_whole if line == "whole\n" else read_stream
        start = time.perf_counter()
        connection.sendall(requests[line])
        print(json.dumps(read(connection, start)), flush=True)


def connect(port: int) -> socket.socket:
    """Open a connection that sends small writes immediately (TCP_NODELAY)."""
    connection = socket.create_connection(("127.0.0.1", port))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def receive(connection: socket.socket) -> bytes:
    """Receive at least one byte, or exit."""
    return connection.recv(65536) or sys.exit("The server closed the connection.")


def write_request(body: str) -> bytes:
    """Format an HTTP request with a body."""
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


def read_stream(connection: socket.socket, start: float) -> tuple[float, float, int]:
    """Return the seconds until the first and the last chunk, and the number of chunks."""
    received, first, done, pieces = b"", 0.0, 0.0, 0
    # The terminating chunk must be read, although clients do not wait for it.
    while not received.endswith(LAST_CHUNK):
        received += receive(connection)
        now = time.perf_counter() - start
        pieces += not done and b"data: " in received
        first = first or (b"data: " in received and now)
        done = done or (b"data: [DONE]" in received and now)
    return first, done, pieces


def read_whole(connection: socket.socket, start: float) -> tuple[float, float, int]:
    """Return the seconds until the whole answer has arrived."""
    received, size = b"", None
    while size is None or len(received) < size:
        received += receive(connection)
        head, end, _ = received.partition(b"\r\n\r\n")
        if end and size is None:
            length = head.lower().partition(b"content-length:")[2].partition(b"\r\n")[0]
            size = len(head) + len(end) + int(length)
    now = time.perf_counter() - start
    return now, now, 1


def save(arguments: argparse.Namespace, times: dict[str, list[tuple[float, ...]]]) -> None:
    """Save the table: milliseconds of each pair of arms, and their difference."""
    medians = {
        arm: [statistics.median(column) for column in zip(*found, strict=True)]
        for arm, found in times.items()
    }
    rows, data = [], {}
    for column, event, base, arm in COMPARISONS:
        name = f"{event}: {arm} over {base}"
        found = {one: sorted(1000 * t[column] for t in times[one]) for one in (base, arm)}
        quantiles = [
            (statistics.median(values), values[int(TAIL_QUANTILE * (len(values) - 1))])
            for values in found.values()
        ]
        added = [round(b - a, 2) for a, b in zip(*quantiles, strict=True)]
        paired = [
            1000 * (b[column] - a[column]) for a, b in zip(times[base], times[arm], strict=True)
        ]
        _, _, _, base_cpu, base_wake_ups = medians[base]
        _, _, chunks, cpu, wake_ups = medians[arm]
        rows.append(
            [
                name,
                *quantiles[0],
                *quantiles[1],
                *added,
                round(statistics.median(paired), 2),
                chunks,
                round(1000 * (cpu - base_cpu), 2),
                wake_ups - base_wake_ups,
            ]
        )
        data[name] = found
    save_result(
        "gateway",
        columns=[
            "until the",
            "without, median ms",
            "p99",
            "with, median ms",
            "p99",
            "added, median ms",
            "p99",
            "added, median of pairs",
            "pieces",
            "loop's CPU added, ms",
            "wake-ups added",
        ],
        rows=rows,
        note=f"{arguments.pairs} requests each way, in turn; {len(TEXT)} characters of prompt, "
        f"found in the cache, {arguments.tokens} tokens generated, streamed in pieces at least "
        f"{1000 * EngineConfig().chunk_interval:g} ms apart; the client is another process on the "
        f"same machine ({Path(arguments.model).name}). Fixed bytes: what such a client costs, "
        "whatever it reads. The loop's CPU: of its thread, for the whole answer, what watches it "
        "afterwards among it; medians.",
        data=data,
    )
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
