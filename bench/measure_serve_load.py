"""Load test of `halfbyte serve`: 16 clients, mixed lengths, aborted and invalid requests.

Expected: every valid request is answered completely, every invalid one gets a 4xx, greedy answers
equal those of the same requests sent alone afterwards, and memory neither grows after warm-up nor
exceeds the plan.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import psutil

from record import save_result

WARM_SHARE = 0.2
"""Share of the time before memory is recorded."""
NUM_REPEATED = 64
"""Greedy requests that are sent again alone."""
STORY = (
    "the sea was calm and the old man rowed on while gulls cried over the pier and children ran "
    "along the sand with kites of red paper that rose and fell"
)
BAD = (
    {"messages": []},
    {"temperature": 9},
    {"model": "nobody"},
    {"max_tokens": 10**7},
    {"no_such_field": 1},
    {"stop": [""]},
)


@dataclass
class Outcome:
    """What the clients observed."""

    counts: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    first_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    greedy: list[tuple[dict, list[str]]] = field(default_factory=list)
    """Requests and the lines of their answers."""
    same: int = 0
    """Repeated requests with the same answer."""
    planned: float = 0.0
    """Planned peak of the whole process. Unit: bytes."""


def main() -> None:
    """Start the server, run the load, save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=16)
    arguments = parser.parse_args()
    command = [sys.executable, "-m", "halfbyte", "serve", arguments.model, "--port", "0"]
    command += ["--cache-gb", "0.5", "--context", "2048"]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "server.log"
        with log.open("w") as output, subprocess.Popen(command, stderr=output) as process:
            try:
                address = wait_for_address(process, log)
                found, memory = asyncio.run(load(address, process.pid, arguments))
            finally:
                process.terminate()
            code = process.wait(60)
        save(arguments, found, memory, code, log.read_text())


def wait_for_address(process: subprocess.Popen, log: Path) -> str:
    """Wait for the start message; return the server's address."""
    while process.poll() is None:
        if match := re.search(r"at (http://[\d.:]+)/v1", log.read_text()):
            return match[1]
        time.sleep(0.2)
    raise SystemExit(f"Cannot run the load test: the server did not start:\n{log.read_text()}")


async def load(address: str, pid: int, arguments: argparse.Namespace):
    """Run all clients until the time is over, recording memory meanwhile."""
    found, memory = Outcome(), []
    end = time.monotonic() + 60 * arguments.minutes
    server = psutil.Process(pid)
    async with httpx2.AsyncClient(
        base_url=address, timeout=300, limits=httpx2.Limits(max_connections=None)
    ) as http:
        model = (await http.get("/v1/models")).json()["data"][0]["id"]
        clients = [
            asyncio.create_task(run_client(http, model, random.Random(seed), end, found))
            for seed in range(arguments.clients)
        ]
        start = time.monotonic()
        while not all(client.done() for client in clients):
            memory.append((time.monotonic() - start, server.memory_info().rss))
            await asyncio.sleep(1)
        for client in clients:
            client.result()
        state = (await http.get("/metrics")).text
        for body, lines in random.Random(0).sample(
            found.greedy, min(NUM_REPEATED, len(found.greedy))
        ):
            alone = [line async for line in read_lines(http, body)]
            found.same += read_text(alone) == read_text(lines)
    planned = re.search(r'^halfbyte:memory_planned_bytes\{what="total"\} (\S+)', state, re.M)
    found.planned = float(planned[1])
    running = re.findall(r"^halfbyte:num_requests_(?:running|waiting)\S* (\S+)", state, re.M)
    if any(float(value) for value in running):
        found.failures.append(f"requests left over: {running}")
    return found, memory


async def run_client(http, model: str, draw: random.Random, end: float, found: Outcome) -> None:
    """Send requests one after the other."""
    while time.monotonic() < end:
        text = " ".join(draw.choices(STORY.split(), k=draw.choice((5, 20, 80, 300))))
        body = {
            "model": model,
            "messages": [{"role": "user", "content": text}],
            "max_tokens": draw.choice((4, 16, 64, 128)),
            "temperature": draw.choice((0, 0.8)),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        kind = draw.choices(("good", "leaves", "bad"), (0.8, 0.1, 0.1))[0]
        if kind == "bad":
            await send_invalid(http, body | draw.choice(BAD), found)
        else:
            await send(
                http, body, found, abort_after=draw.randrange(12) if kind == "leaves" else None
            )


async def send(http, body: dict, found: Outcome, *, abort_after: int | None) -> None:
    """Read an answer to its end, or abort after some lines."""
    start, lines, first = time.monotonic(), [], None
    try:
        async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
            async for line in reply.aiter_lines():
                if not line:
                    continue
                lines.append(line)
                first = first or time.monotonic() - start
                if abort_after is not None and len(lines) > abort_after:
                    found.counts["left"] += 1
                    return
        status = reply.status_code
    except httpx2.HTTPError as error:
        found.failures.append(repr(error))
        return
    usage = re.search(r'"completion_tokens":(\d+)', lines[-2] if len(lines) > 1 else "")
    if status != 200 or lines[-1] != "data: [DONE]" or usage is None:
        found.failures.append(f"{status}: {lines[-1:]}")
        return
    found.counts["good"] += 1
    found.tokens += int(usage[1])
    found.first_seconds.append(first)
    if not body["temperature"]:
        found.greedy.append((body, lines))


async def read_lines(http, body: dict) -> AsyncIterator[str]:
    """Yield an answer's lines."""
    async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
        async for line in reply.aiter_lines():
            yield line


def read_text(lines: list[str]) -> str:
    """Join the text of an answer's lines."""
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    pieces = [choice["delta"].get("content") for chunk in chunks for choice in chunk["choices"]]
    return "".join(piece or "" for piece in pieces)


async def send_invalid(http, body: dict, found: Outcome) -> None:
    """Send an invalid request, which must be refused in OpenAI's error format."""
    reply = await http.post("/v1/chat/completions", json=body)
    if not 400 <= reply.status_code < 500 or "error" not in reply.json():
        found.failures.append(f"a bad request got {reply.status_code}: {reply.text[:200]}")
    found.counts["bad"] += 1


def save(arguments: argparse.Namespace, found: Outcome, memory, code: int, log: str) -> None:
    """Save the table; exit with 1 if an expectation failed."""
    total_seconds = memory[-1][0]
    warm = [rss for seconds, rss in memory if seconds >= WARM_SHARE * total_seconds]
    half = len(warm) // 2
    growth = statistics.median(warm[half:]) / statistics.median(warm[:half]) - 1
    first = sorted(found.first_seconds)
    rows = [
        ["good requests", found.counts["good"]],
        ["of these failed", len(found.failures)],
        ["clients that left", found.counts["left"]],
        ["bad requests, all refused", found.counts["bad"]],
        ["tokens/s, all together", found.tokens / total_seconds],
        ["until the first token, median s", statistics.median(first)],
        ["p99", first[int(0.99 * (len(first) - 1))]],
        ["memory, median GB", statistics.median(warm) / 1e9],
        ["memory, largest over smallest", max(warm) / min(warm)],
        ["second half over first half, %", 100 * growth],
        ["memory, largest over planned", max(rss for _, rss in memory) / found.planned],
        [f"of {min(NUM_REPEATED, len(found.greedy))} greedy answers, the same alone", found.same],
    ]
    save_result(
        "serve-load",
        columns=["what", "value"],
        rows=rows,
        note=f"{arguments.clients} clients for {arguments.minutes:g} minutes; prompts of 5 to 300 "
        f"words, 4 to 128 tokens of answer, half of them drawn; a tenth leaves in the middle, a "
        f"tenth asks nonsense ({Path(arguments.model).name}); memory after the first fifth. Exit "
        f"code after SIGTERM {code}; {os.cpu_count()} cores.",
        data={"memory": memory, "first_seconds": first, "failures": found.failures},
    )
    for row in rows:
        print(*row)
    print(*found.failures[:10], sep="\n")
    print(log[-2000:])
    if found.failures or code or found.same < min(NUM_REPEATED, len(found.greedy)):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
