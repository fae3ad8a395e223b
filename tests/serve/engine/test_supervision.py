"""Failing steps: only the request that causes them gets an error, no other is lost."""

from __future__ import annotations

import asyncio
import itertools
import logging
import random

import pytest
import torch
from tests.serve.helpers_engine import (
    all_tokens,
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

pytestmark = pytest.mark.parametrize("runner", runners())

POISON = 77


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level(logging.CRITICAL, logger="halfbyte.serve.engine")


def break_steps(engine, should_fail, *, after=False):
    """Make steps fail, before or after they write to the cache."""
    run = engine._runner.run

    def broken(pieces):
        fails = should_fail(pieces)
        if fails and not after:
            raise RuntimeError("killed before")
        results = run(pieces)
        if fails:
            raise MemoryError("killed after")
        return results

    engine._runner.run = broken


@pytest.mark.parametrize("after", [False, True])
def test_random_step_failures_change_no_answer(folder, runner, after):
    requests = mixed_requests(12, seed=2)
    model = load_float32(folder)
    expected = [generate_greedily(model, request) for request in requests]
    dice = random.Random(5)
    # Never so close together that a request could fail three times before its next token: whoever
    # does that is to blame, and refused.
    steps = iter(range(10**6))
    deaths = set(itertools.accumulate(dice.randint(10, 16) for _ in range(10**4)))

    async def run():
        async with open_tiny(folder, runner, step_tokens=24, sequences=6) as engine:
            break_steps(engine, lambda _: next(steps) in deaths, after=after)
            return await all_tokens(engine, requests), engine.load()

    found, load = asyncio.run(run())
    assert found == expected
    assert load.restarts >= 3
    assert (load.running, load.waiting, load.cache_used_bytes) == (0, 0, 0)


def test_sampled_answers_continue_after_failures(folder, runner):
    async def run(kills):
        async with open_tiny(folder, runner) as engine:
            steps = iter(range(10**6))
            break_steps(engine, lambda _: next(steps) in kills)
            requests = [ask([9, 10 + i], 30, temperature=1.0, seed=i) for i in range(4)]
            return await all_tokens(engine, requests), engine.load().restarts

    expected, none = asyncio.run(run(()))
    found, restarts = asyncio.run(run((5, 6, 20)))
    assert (none, restarts) == (0, 3)
    assert found == expected


def test_request_that_fails_alone_gets_the_error(folder, runner):
    requests = mixed_requests(6, seed=8)
    requests = [ask([t if t != POISON else 5 for t in r.prompt], 20) for r in requests]

    async def run():
        async with open_tiny(folder, runner) as engine:
            healthy = await all_tokens(engine, requests)
            break_steps(engine, lambda pieces: any(POISON in piece.tokens for piece in pieces))
            bad = asyncio.create_task(collect(engine, ask([5, POISON, 6], 20)))
            found = await all_tokens(engine, requests)
            with pytest.raises(ServeError) as caught:
                await bad
            return healthy, found, caught.value, engine.load()

    healthy, found, error, load = asyncio.run(run())
    assert found == healthy
    assert (error.status, error.code, error.kind) == (503, "engine_failed", "server_error")
    assert "failed 3 times alone" in str(error)
    assert 3 <= load.restarts <= 4
    assert load.cache_used_bytes == 0


def test_temporary_engine_failure_is_attributed_to_no_request(folder, runner):
    requests = mixed_requests(4, seed=9)

    async def run(failing):
        async with open_tiny(folder, runner) as engine:
            steps = iter(range(10**6))
            break_steps(engine, lambda _: next(steps) in failing)
            # One after the other as well: whoever runs alone is not guilty by that.
            alone = await tokens_of(engine, requests[0])
            return [alone, *await all_tokens(engine, requests)], engine.load()

    expected, _ = asyncio.run(run(()))
    # Each failure of a request alone is followed by a step that is nobody's.
    found, load = asyncio.run(run({3, 4, 5, 6, 7, 8, 9, 10, *range(40, 48)}))
    assert found == expected
    assert load.restarts >= 6
    assert load.cache_used_bytes == 0


def test_faulty_request_is_found_during_a_temporary_engine_failure(folder, runner):
    requests = [ask([20 + i, 6, 7], 12) for i in range(3)]

    async def run():
        async with open_tiny(folder, runner) as engine:
            healthy = await all_tokens(engine, requests)
            steps = iter(range(10**6))
            break_steps(
                engine,
                lambda pieces: (
                    next(steps) in {2, 3, 4, 5, 9, 10}
                    or any(POISON in piece.tokens for piece in pieces)
                ),
            )
            bad = asyncio.create_task(collect(engine, ask([5, POISON, 6], 20)))
            found = await all_tokens(engine, requests)
            with pytest.raises(ServeError, match="failed 3 times alone"):
                await bad
            return healthy, found

    healthy, found = asyncio.run(run())
    assert found == healthy


def test_non_finite_logits_fail_only_their_request(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            run_pieces = engine._runner.run

            def spoil(pieces):
                results = run_pieces(pieces)
                for piece, logits in zip(pieces, results, strict=True):
                    if POISON in piece.tokens:
                        logits[..., 3].fill_(torch.nan)
                return results

            engine._runner.run = spoil
            good = asyncio.create_task(tokens_of(engine, ask([5, 6], 20)))
            errors = []
            for settings in ({}, {"prompt_logprobs": 1}):
                with pytest.raises(ServeError) as caught:
                    await collect(engine, ask([5, POISON], 20, **settings))
                errors.append(caught.value)
            return errors, await good, engine.load()

    errors, good, load = asyncio.run(run())
    assert [(e.status, e.code) for e in errors] == [(500, "not_finite")] * 2
    assert "after 2 tokens" in str(errors[0])
    assert len(good) == 20
    assert load.restarts == 0


def test_permanent_runner_failure_fails_all_requests(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            break_steps(engine, lambda _: True)
            return await asyncio.gather(
                *(tokens_of(engine, ask([i], 5)) for i in range(3, 8)), return_exceptions=True
            )

    found = asyncio.run(run())
    assert all(isinstance(error, ServeError) and error.status == 503 for error in found)
