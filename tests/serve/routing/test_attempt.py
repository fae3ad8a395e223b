"""One attempt: buffering, confidence, timeouts, client disconnects."""

from __future__ import annotations

import asyncio
import math
import time

import pytest
from tests.serve.helpers_quality import (
    ScriptedBackend,
    answer,
    collect,
    failure,
    make_call,
)
from tests.serve.helpers_router import BETTER, GOOD, LOOP, ask, make

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Delta, Finish, Served, Usage
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.routing.router import Router


def test_failure_after_the_first_tokens_is_an_error_in_the_stream():
    script = [*GOOD[:4], failure()]
    seen = []
    router, _, large = make(script, BETTER, hold_back=2, observers=[seen.append])

    async def run():
        got = []
        try:
            async for event in router.stream(make_call(stream=True), Served()):
                got.append(event)
        except ServeError as error:
            return got, error
        pytest.fail("the failure was not told")

    got, error = asyncio.run(run())
    assert "".join(e.text for e in got) == "a good answer of"
    assert error.status == 500
    assert large.calls == []
    assert (seen[0].status, seen[0].answer, seen[0].attempts[0].cause) == (500, None, "error")


def test_only_the_configured_number_of_tokens_is_buffered():
    async def run(hold_back):
        gate = asyncio.Event()
        small = ScriptedBackend("small", [])

        async def stream(call):
            for event in GOOD[:4]:
                yield event
            await gate.wait()
            for event in GOOD[4:]:
                yield event

        small.stream = stream
        router = Router(
            small,
            fallbacks=[ScriptedBackend("large", BETTER)],
            config=QualityConfig(hold_back=hold_back),
        )
        events = router.stream(make_call(stream=True), Served())
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0.01)
        early = first.done()
        gate.set()
        await first
        await events.aclose()
        return early

    assert asyncio.run(run(3))
    assert asyncio.run(run(4))
    assert not asyncio.run(run(5))


def test_nothing_is_buffered_without_a_fallback():
    router, _ = make([GOOD[0], math.inf], idle_timeout=0.05)

    async def run():
        events = router.stream(make_call(), Served())
        first = await anext(events)
        with pytest.raises(ServeError) as found:
            await anext(events)
        return first, found.value

    first, error = asyncio.run(run())
    assert first.text == "a"
    assert (error.status, error.code) == (504, "timeout")
    assert "0.05 s, after 1 tokens" in str(error)


def test_rejected_attempt_is_cancelled_when_another_has_started():
    seen = []
    script = [*LOOP[:30], 0.05, *LOOP[30:]]
    router, small, _ = make(script, BETTER, hold_back=24, observers=[seen.append])
    text, _ = ask(router, make_call(stream=True))
    assert text == "the larger model says this"
    assert (small.running, small.cancelled) == (0, 1)
    assert [(a.role, a.cause) for a in seen[0].attempts] == [
        ("primary", "check:repetition"),
        ("fallback", ""),
    ]
    assert seen[0].answer.backend == "large0"


def test_two_choices_are_both_buffered_and_checked():
    events = []
    for word_good, word_bad in zip("abcdefghijkl", ["x "] * 12, strict=True):
        events += [Delta(choice=0, text=word_good), Delta(choice=1, text=word_bad)]
    events += [Finish(choice=0), Finish(choice=1), Usage(prompt_tokens=1, completion_tokens=24)]
    router, *_ = make(events, BETTER, hold_back=10)
    assert ask(router, make_call(stream=True, n=2))[1].reason == "check:repetition"


def test_low_confidence_falls_back_and_logprobs_are_hidden():
    confidence = Confidence(statistic="mean_logprob", threshold=-1.0, first_tokens=3)

    async def events(router, **body):
        return [e async for e in router.stream(make_call(stream=True, **body), Served())]

    sure = answer("one two three four five", logprob=-0.5)
    router, small, _ = make(sure, BETTER, confidence=confidence, hold_back=0)
    got = asyncio.run(events(router))
    assert small.calls[0].body["logprobs"] is True
    assert all(e.logprobs is None for e in got if isinstance(e, Delta))
    got = asyncio.run(events(router, logprobs=True))
    assert all(e.logprobs for e in got if isinstance(e, Delta))
    unsure = answer("one two three four five", logprob=-1.5)
    router, *_ = make(unsure, BETTER, confidence=confidence, hold_back=0)
    _, served = ask(router, make_call(stream=True))
    assert (served.backend, served.reason) == ("large0", "confidence")


def test_logprobs_0_of_the_client_is_not_overwritten():
    confidence = Confidence(statistic="mean_logprob", threshold=-1.0)
    router, small, _ = make(GOOD, BETTER, confidence=confidence)
    ask(router, make_call(logprobs=0))
    ask(router, make_call(logprobs=False))
    assert [call.body["logprobs"] for call in small.calls] == [0, True]


def test_entropy_needs_no_logprobs_and_a_missing_one_is_not_unsure():
    confidence = Confidence(statistic="mean_entropy", threshold=2.0)
    router, small, _ = make(answer("a b c", entropy=3.0), BETTER, confidence=confidence)
    assert ask(router)[1].reason == "confidence"
    assert "logprobs" not in small.calls[0].body
    router, *_ = make(answer("a b c"), BETTER, confidence=confidence)
    assert ask(router)[1].reason == ""


def test_deadline_ends_the_request_with_408_and_without_a_fallback():
    router, small, large = make([GOOD[0], math.inf], BETTER)
    for _ in range(8):
        with pytest.raises(ServeError) as found:
            ask(router, make_call(deadline=time.monotonic() + 0.02))
        assert (found.value.status, found.value.code) == (408, "deadline_exceeded")
    assert large.calls == []
    assert (small.running, small.cancelled) == (0, 8)
    # Short deadlines of one client are no failure of the model for the others.
    assert router.routes[0].breaker.state == "closed"


def test_client_disconnect_cancels_the_request_and_is_no_failure():
    seen = []
    router, small, _ = make([*GOOD[:3], math.inf], BETTER, observers=[seen.append], hold_back=2)

    async def run():
        events = router.stream(make_call(stream=True), Served())
        await anext(events)
        await events.aclose()

        # The same while it waits for the first token.
        small.script = [math.inf]
        task = asyncio.ensure_future(collect(router, make_call()))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert [s.status for s in seen] == [499, 499]
    assert (small.running, small.cancelled) == (0, 2)
    assert router.routes[0].breaker.state == "closed"
