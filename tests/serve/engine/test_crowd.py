"""A mix of valid, invalid, abandoned and late requests, with steps that fail."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from dataclasses import replace

import pytest
from tests.serve.helpers_engine import (
    ask,
    collect,
    generate_greedily,
    load_float32,
    mixed_requests,
    open_tiny,
    runners,
    tokens_of,
    write_model,
)

from halfbyte.errors import ServeError
from halfbyte.serve.engine.contract import Generated, Grammar

KILLED = (5, 12, 30, 45)
"""Failing steps; never two in a row, which would blame the request that ran alone in both."""


@pytest.mark.parametrize("runner", runners())
def test_valid_requests_are_unaffected_by_bad_ones_and_failures(tmp_path, runner, caplog):
    caplog.set_level(logging.CRITICAL, logger="halfbyte.serve.engine")
    folder = write_model(tmp_path)
    model = load_float32(folder)
    shared = list(range(40, 60))
    requests = [
        replace(r, prompt=(*(shared if i % 3 == 0 else ()), *r.prompt), key=f"key {i % 4}")
        for i, r in enumerate(mixed_requests(24, seed=9, longest=30))
    ]
    expected = [generate_greedily(model, request) for request in requests]
    dice = random.Random(3)

    async def leave(engine, after):
        answer = engine.generate(ask(shared, 200))
        seen = 0
        try:
            async for events in answer:
                seen += sum(isinstance(event, Generated) for event in events)
                if seen >= after:
                    break
        finally:
            await answer.aclose()

    async def fail(engine, request, code):
        with pytest.raises(ServeError) as caught:
            await tokens_of(engine, request)
        assert caught.value.code == code

    async def run():
        async with open_tiny(
            folder, runner, cache_gb=1024 * 512 / 1e9, max_batched_tokens=32, max_sequences=8
        ) as engine:
            run_pieces, steps = engine._runner.run, iter(range(10**6))

            def broken(pieces):
                if next(steps) in KILLED:
                    raise RuntimeError("killed")
                return run_pieces(pieces)

            engine._runner.run = broken
            good = [asyncio.create_task(collect(engine, request)) for request in requests]
            late = time.monotonic() + 0.05
            others = [
                *(leave(engine, dice.randrange(0, 20)) for _ in range(12)),
                *(fail(engine, ask(range(3, 250), 99), "context_length_exceeded") for _ in "abc"),
                *(fail(engine, ask([5], 250, deadline=late), "deadline_exceeded") for _ in "abc"),
                fail(
                    engine, ask([5], 9, grammar=Grammar(kind="regex", text="(")), "invalid_grammar"
                ),
            ]
            await asyncio.gather(*others)
            found = await asyncio.gather(*good)
            start = time.monotonic()
            while engine.load().cache_used_bytes and time.monotonic() - start < 5:
                await asyncio.sleep(0.001)
            return found, engine.load(), len(engine._consumers), engine._scheduler._key_queues

    found, load, addresses, turns = asyncio.run(run())
    assert [[event.scored.token for event in events[1:-1]] for events in found] == expected
    assert any(events[0].cached_tokens for events in found)
    assert (load.running, load.waiting, load.cache_used_bytes) == (0, 0, 0)
    assert load.restarts >= 1
    assert (addresses, turns) == (0, {})
