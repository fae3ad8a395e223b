"""Circuit breaker, fallback budget and retry budget."""

from __future__ import annotations

import asyncio
import math

import pytest
from tests.serve.helpers_quality import (
    Clock,
    collect,
    failure,
    make_call,
)
from tests.serve.helpers_router import BETTER, GOOD, LOOP, ask, make

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Served


def test_breaker_skips_a_dead_model_until_it_recovers():
    clock = Clock()
    router, small, _ = make([failure()], BETTER, clock=clock, breaker_seconds=5.0)
    reasons = [ask(router)[1].reason for _ in range(8)]
    assert reasons == ["error"] * 5 + ["breaker"] * 3
    assert len(small.calls) == 5
    clock.now += 5.1
    assert ask(router)[1].reason == "error"  # the one try
    assert ask(router)[1].reason == "breaker"
    clock.now += 5.1
    assert ask(router)[1].reason == "breaker"  # the pause is twice as long now
    small.script = GOOD
    clock.now += 5.0
    assert ask(router)[1].reason == ""
    assert router.routes[0].breaker.state == "closed"


def test_open_breaker_without_a_fallback_returns_retry_after():
    clock = Clock()
    router, small = make([failure()], clock=clock, breaker_seconds=8.0, breaker_failures=2)
    for _ in range(2):
        with pytest.raises(ServeError, match="engine is gone"):
            ask(router)
    clock.now += 3
    with pytest.raises(ServeError) as found:
        ask(router)
    assert (found.value.status, found.value.code) == (503, "no_model_available")
    assert found.value.retry_after == pytest.approx(5.0)
    assert len(small.calls) == 2


def test_half_open_test_is_released_when_its_client_disconnects():
    clock = Clock()
    router, small, _ = make([failure()], BETTER, clock=clock, breaker_failures=1)
    ask(router)
    clock.now += 6
    small.script = [math.inf]

    async def run():
        task = asyncio.ensure_future(collect(router, make_call()))
        await asyncio.sleep(0.01)
        # One try at a time: this one goes past it.
        assert (await collect(router, make_call()))[1].reason == "breaker"
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        small.script = GOOD
        return await collect(router, make_call())

    assert asyncio.run(run())[1].backend == "small"


def test_budget_of_requests_and_tokens_is_enforced_and_expires():
    clock = Clock()
    router, *_ = make(GOOD, BETTER, clock=clock, fallback_requests_per_minute=2)
    call = make_call(tags=["critical"])
    assert [ask(router, call)[1].reason for _ in range(3)] == ["critical", "critical", "budget"]
    clock.now += 62
    assert ask(router, call)[1].reason == "critical"
    # An answer of 5 tokens to a prompt of 5 uses up 10 of 15, the next one the rest.
    router, *_ = make(GOOD, BETTER, clock=clock, fallback_tokens_per_day=15)
    assert [ask(router, call)[1].reason for _ in range(3)] == ["critical", "critical", "budget"]
    clock.now += 3600
    assert ask(router, call)[1].reason == "budget"
    clock.now += 24 * 3600
    assert ask(router, call)[1].reason == "critical"


def test_tokens_of_a_cancelled_fallback_count():
    clock = Clock()
    router, *_ = make(
        GOOD, [*BETTER[:3], math.inf], clock=clock, fallback_tokens_per_day=103, hold_back=0
    )

    async def run():
        # The prompt counts too, by its length: its number of tokens is not known yet.
        call = make_call("x" * 400, tags=["critical"], stream=True)
        events = router.stream(call, Served())
        for _ in range(3):
            await anext(events)
        await events.aclose()

    asyncio.run(run())
    assert not router.budget.has_left
    assert all(route.running == 0 for route in router.routes)


def test_retries_are_a_share_of_requests_once_the_reserve_is_used_up():
    # The larger model answers nothing useful either, and the breakers are out of the way.
    router, small, large = make([failure()], [failure()], retry_share=0.25, breaker_failures=10**9)
    for _ in range(400):
        with pytest.raises(ServeError, match="engine is gone"):
            ask(router)
    assert len(small.calls) == 400
    assert len(large.calls) == pytest.approx(64 + 100, abs=2)


def test_failed_checks_do_not_use_up_the_retries_for_errors():
    router, small, _ = make(LOOP, BETTER, retry_share=0.25, breaker_failures=10**9)
    served = [ask(router)[1].backend for _ in range(400)]
    assert served.count("large0") == pytest.approx(64 + 100, abs=2)
    assert set(served[-4:]) == {"small", "large0"}
    small.script = [failure()]
    assert [ask(router)[1].backend for _ in range(64)] == ["large0"] * 64
