"""What HTTP, JSON and text add to a request, over the engine called directly.

One process serves and also calls its own engine, another is the client. The same prompt and the
same number of greedy tokens go both ways in turn, so that whatever else the machine does meets
both alike. A third way is over HTTP with a piece of its own for every token.
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
"""Goes on in plain letters: a character of several tokens would be sent with its last one only."""
LATE = 0.99
ARMS = ("engine", "gateway", "each token")


def main() -> None:
    """Be the client, or measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=300)
    parser.add_argument("--client", type=int, metavar="PORT", help="for the script's own use")
    arguments = parser.parse_args()
    if arguments.client:
        run_client(arguments.client, arguments.model, arguments.tokens)
    else:
        asyncio.run(measure(arguments))


async def measure(arguments: argparse.Namespace) -> None:
    """Serve, call both ways in turn, save."""
    service = open_service(
        arguments.model, ServeConfig(), EngineConfig(cache_gb=0.2), QualityConfig(), ApiKeys()
    )
    await service.start()
    bound = bind("127.0.0.1", 0)
    server = DrainingServer(make_uvicorn_config(service.gateway), service.gateway)
    serving = asyncio.create_task(server.serve(sockets=[bound]))
    name = service.gateway.models[0]
    client = await asyncio.create_subprocess_exec(
        *(sys.executable, __file__, name, "--tokens", str(arguments.tokens)),
        *("--client", str(bound.getsockname()[1])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    backend = service.gateway.text_tools
    engine, told = backend._engine, await backend.tokenize({"prompt": TEXT})
    prompt = tuple(told["tokens"])
    times: dict[str, list[tuple[float, ...]]] = {arm: [] for arm in ARMS}
    usual = engine._piece_seconds
    for turn in range(arguments.pairs + 10):
        for arm in (*ARMS[turn % 3 :], *ARMS[: turn % 3]):
            engine._piece_seconds = 0.0 if arm == "each token" else usual
            if arm == "engine":
                found = await call_engine(engine, prompt, arguments.tokens)
            else:
                client.stdin.write(b"go\n")
                found = json.loads(await client.stdout.readline())
            if turn >= 10:  # the first ones warm up
                times[arm].append(tuple(found))
    client.stdin.close()
    await client.wait()
    server.drain()
    await serving
    await service.stop()
    save(arguments, times)


async def call_engine(engine, prompt: tuple[int, ...], tokens: int) -> tuple[float, ...]:
    """Give seconds until the first token and until the last, and in how many pieces they came."""
    request = TokenRequest(prompt=prompt, max_new_tokens=tokens, temperature=0.0, ignore_end=True)
    start = time.perf_counter()
    first, pieces = 0.0, 0
    async with aclosing(engine.generate(request)) as events:
        async for found in events:
            pieces += 1
            if not first and any(isinstance(event, Generated) for event in found):
                first = time.perf_counter() - start
    return first, time.perf_counter() - start, pieces


def run_client(port: int, model: str, tokens: int) -> None:
    """Make one streamed request for each line of stdin, over one connection."""
    body = json.dumps(
        {
            "model": model,
            "prompt": TEXT,
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
        }
    ).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in sys.stdin:
            start = time.perf_counter()
            connection.sendall(head + body)
            received, first, done, pieces = b"", 0.0, 0.0, 0
            # The last chunk of a chunked body: no client waits for it, but it must be read.
            while not received.endswith(b"\r\n0\r\n\r\n"):
                received += connection.recv(65536)
                now = time.perf_counter() - start
                pieces += not done and b"data: " in received
                first = first or (b"data: " in received and now)
                done = done or (b"data: [DONE]" in received and now)
            print(json.dumps([first, done, pieces]), flush=True)


def save(arguments: argparse.Namespace, times: dict[str, list[tuple[float, ...]]]) -> None:
    """Write the table: milliseconds, each way and the difference."""
    rows, data = [], {}
    pieces = {arm: statistics.median(found[2] for found in times[arm]) for arm in ARMS}
    for place, what, arm in (
        (0, "first token", "gateway"),
        (1, "whole answer", "gateway"),
        (1, "whole answer, a piece for each token", "each token"),
    ):
        found = {one: sorted(1000 * t[place] for t in times[one]) for one in ("engine", arm)}
        quantiles = [
            (statistics.median(values), values[int(LATE * (len(values) - 1))])
            for values in found.values()
        ]
        added = [round(b - a, 2) for a, b in zip(*quantiles, strict=True)]
        paired = [
            1000 * (b[place] - a[place]) for a, b in zip(times["engine"], times[arm], strict=True)
        ]
        rows.append(
            [
                what,
                *quantiles[0],
                *quantiles[1],
                *added,
                round(statistics.median(paired), 2),
                pieces[arm],
            ]
        )
        data[what] = found
    save_result(
        "gateway",
        columns=[
            "until the",
            "engine, median ms",
            "p99",
            "over HTTP, median ms",
            "p99",
            "added, median ms",
            "p99",
            "added, median of pairs",
            "pieces",
        ],
        rows=rows,
        note=f"{arguments.pairs} requests each way, in turn; {len(TEXT)} characters of prompt, "
        f"found in the cache, {arguments.tokens} tokens generated, streamed in pieces at least "
        f"{1000 * EngineConfig().piece_seconds:g} ms apart; the client is another "
        f"process on the same machine ({Path(arguments.model).name}).",
        data=data,
    )
    for row in rows:
        print(*row)


if __name__ == "__main__":
    main()
