"""Measure the router's CPU time per request, without the model's.

    python bench/measure_router.py [--rounds 9]

A backend whose events are ready immediately is read directly and through the router, with more and
more features enabled, in turn in one process. The difference is the cost of the router.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from halfbyte.serve.backend import Call, Delta, Event, Finish, Load, Served, Usage
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig
from record import save_result

TOKENS = 128
REQUESTS = 40
WORDS = "the answer to this question is not as simple as it may seem at first because there are "


class ReadyBackend:
    """Has all events ready, and yields to the event loop between them like a network backend."""

    name = "ready"
    models = ("ready",)

    def __init__(self) -> None:
        words = (WORDS * (TOKENS // 10)).split()[:TOKENS]
        self.events: list[Event] = [
            *(Delta(text=f" {word}{n}", entropies=(1.5,)) for n, word in enumerate(words)),
            Finish(reason="stop"),
            Usage(prompt_tokens=20, completion_tokens=TOKENS),
        ]

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Yield the events."""
        for event in self.events:
            await asyncio.sleep(0)
            yield event

    async def is_ready(self) -> bool:
        """Return True."""
        return True

    def load(self) -> Load:
        """Return an empty load."""
        return Load()

    async def close(self) -> None:
        """Do nothing."""


def make_call(number: int, stream: bool) -> Call:
    """Make a chat request."""
    messages = [{"role": "user", "content": "What is the answer to this question, and why?"}]
    body = {"model": "ready", "messages": messages, "stream": stream}
    return Call(kind="chat", body=body, id=f"chatcmpl-{number}")


async def read_directly(backend: ReadyBackend) -> float:
    """Return the CPU seconds per request of the backend alone."""
    start = time.process_time()
    for number in range(REQUESTS):
        async for _ in backend.stream(make_call(number, True)):
            pass
    return (time.process_time() - start) / REQUESTS


async def read_routed(quality: Quality, stream: bool) -> float:
    """Return the CPU seconds per request through the router."""
    start = time.process_time()
    for number in range(REQUESTS):
        async for _ in quality.router.stream(make_call(number, stream), Served()):
            pass
    return (time.process_time() - start) / REQUESTS


async def measure(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Return the CPU seconds per request added to the backend's, by arm, one value per round."""
    backend = ReadyBackend()
    settings: dict[str, tuple[dict[str, Any], bool]] = {
        "nothing switched on": ({}, True),
        "fallback, 16 tokens held back": ({"fallback": ("x",)}, True),
        "fallback, not streamed": ({"fallback": ("x",)}, False),
        "and a canary": ({"fallback": ("x",), "canary": "y"}, True),
        "and the request log": (
            {"fallback": ("x",), "canary": "y", "request_log": str(folder / "log.sqlite")},
            True,
        ),
    }
    arms = {
        name: (Quality(backend, QualityConfig(**values), lambda _: ReadyBackend()), stream)
        for name, (values, stream) in settings.items()
    }
    found: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(rounds + 1):
        for name, (quality, stream) in arms.items():
            alone = await read_directly(backend)
            found[name].append(await read_routed(quality, stream) - alone)
    for quality, _ in arms.values():
        await quality.close()
    return {name: values[1:] for name, values in found.items()}


def main() -> None:
    """Measure and save the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(measure(args.rounds, Path(folder)))
    rows = [
        [name, statistics.median(values) * 1e3, min(values) * 1e3,
         statistics.median(values) / TOKENS * 1e6]
        for name, values in found.items()
    ]  # fmt: skip
    for row in rows:
        print(row)
    path = save_result(
        "router",
        columns=["switched on", "ms a request, median", "least", "µs a token"],
        rows=rows,
        note=(
            f"Processor time over the same backend read directly; answers of {TOKENS} tokens, one "
            f"after the other, {REQUESTS} requests a round, {args.rounds} rounds, arms in turn. "
            "Monitors, metrics, drift and history are always on."
        ),
        data={"seconds": found},
    )
    print(path)


if __name__ == "__main__":
    main()
