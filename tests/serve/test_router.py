from __future__ import annotations

import asyncio
import math
import time

import pytest
from tests.serve.helpers_quality import (
    Clock,
    ScriptedBackend,
    answer,
    collect,
    failure,
    make_call,
)

from halfbyte.errors import ServeError
from halfbyte.serve.exchange import Delta, Finish, Served, Usage
from halfbyte.serve.quality_config import CAUSES, QualityConfig
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.routing.router import Router

GOOD = answer("a good answer of several words")
BETTER = answer("the larger model says this")
LOOP = answer("again and again " + "so it goes " * 12)


def make(primary, *fallbacks, observers=(), confidence=None, clock=time.monotonic, **config):
    backends = [ScriptedBackend("small", primary)]
    backends += [
        ScriptedBackend(f"large{n}", script, models=(f"large-model-{n}",))
        for n, script in enumerate(fallbacks)
    ]
    router = Router(
        backends[0],
        fallbacks=backends[1:],
        config=QualityConfig(**config),
        observers=observers,
        confidence=confidence,
        clock=clock,
    )
    return router, *backends


def ask(router, call=None):
    return asyncio.run(collect(router, call or make_call()))


def test_good_answer_passes_through_untouched_and_unnamed():
    seen = []
    router, small, large = make(GOOD, BETTER, observers=[seen.append])

    async def events():
        served = Served()
        return [e async for e in router.stream(make_call(logprobs=True), served)], served

    got, served = asyncio.run(events())
    assert got == GOOD
    assert (served.backend, served.model, served.reason) == ("small", "small", "")
    assert large.calls == []
    assert [(s.status, len(s.attempts), s.answer.num_tokens) for s in seen] == [(200, 1, 6)]
    assert small.cancelled == 0


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ([failure()], "error"),
        ([failure(502)], "error"),
        ([failure(429)], "overload"),
        ([ValueError("garbage")], "error"),
        ([*GOOD[:3], failure()], "error"),
        (GOOD[:3], "error"),
        ([], "error"),
        ([math.inf], "timeout"),
        ([*GOOD[:3], math.inf], "timeout"),
        (LOOP, "check:repetition"),
        (answer(""), "check:empty"),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_larger_model_takes_over_before_anything_is_out(script, reason, stream):
    router, small, large = make(
        script, BETTER, first_token_timeout=0.05, idle_timeout=0.05, hold_back=48
    )
    text, served = ask(router, make_call(stream=stream))
    assert text == "the larger model says this"
    assert (served.backend, served.model, served.reason) == ("large0", "large-model-0", reason)
    assert large.calls[0].body["model"] == "large-model-0"
    assert small.running == 0


@pytest.mark.parametrize("cause", [c for c in CAUSES if c in ("error", "timeout", "overload")])
def test_cause_that_is_not_asked_for_is_an_error_as_it_came(cause):
    script = {"error": [failure()], "timeout": [math.inf], "overload": [failure(429)]}[cause]
    others = tuple(c for c in CAUSES if c != cause)
    router, _, large = make(script, BETTER, fallback_on=others, first_token_timeout=0.05)
    with pytest.raises(ServeError) as found:
        ask(router)
    assert found.value.status == {"error": 500, "timeout": 504, "overload": 429}[cause]
    assert large.calls == []


def test_what_the_request_is_to_blame_for_goes_to_nobody_else():
    router, _, large = make([ServeError("Too long.", status=400)], BETTER)
    for _ in range(20):
        with pytest.raises(ServeError, match=r"Too long\."):
            ask(router)
    assert large.calls == []
    assert router.routes[0].breaker.state == "closed"


def test_json_that_was_asked_for_is_checked():
    router, *_ = make(answer('{"a": 1'), answer('{"a": 1}'))
    text, served = ask(router, make_call(response_format={"type": "json_object"}))
    assert (text, served.reason) == ('{"a": 1}', "check:json")
    assert ask(router)[1].reason == ""


def test_failure_after_the_first_tokens_are_out_is_told_in_the_stream():
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


def test_tokens_are_held_back_and_no_longer():
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


def test_with_nobody_to_switch_to_nothing_is_held_back():
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


def test_critical_request_goes_to_the_larger_model_at_once_and_back_where_that_fails():
    router, small, large = make(GOOD, BETTER)
    text, served = ask(router, make_call(tags=["critical"]))
    assert (served.backend, served.reason) == ("large0", "critical")
    assert small.calls == []
    large.script = [failure()]
    text, served = ask(router, make_call(tags=["critical"]))
    assert text == "a good answer of several words"
    assert (served.backend, served.reason) == ("small", "error")


def test_answer_that_failed_a_check_is_given_where_no_other_model_can():
    for stream in (False, True):
        router, small, large = make(LOOP, [failure()], hold_back=20)
        text, served = ask(router, make_call(stream=stream))
        assert text == "".join(e.text for e in LOOP[:-2])
        assert (served.backend, served.reason) == ("small", "")
        assert served.notes
        assert "error, and no other model could answer" in served.notes[-1]
        assert small.cancelled == 0
        assert len(large.calls) == 1


def test_rejected_attempt_is_cancelled_when_another_has_begun():
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


def test_low_confidence_asks_the_larger_model_and_hides_the_logprobs():
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


def test_logprobs_that_the_client_asked_for_as_0_stay_its_own():
    confidence = Confidence(statistic="mean_logprob", threshold=-1.0)
    router, small, _ = make(GOOD, BETTER, confidence=confidence)
    ask(router, make_call(logprobs=0))
    ask(router, make_call(logprobs=False))
    assert [call.body["logprobs"] for call in small.calls] == [0, True]


def test_one_observer_that_fails_does_not_blind_the_others(caplog):
    seen = []
    router, *_ = make(GOOD, observers=[lambda _: 1 / 0, seen.append])
    ask(router)
    assert seen[0].answer.failures == ()
    assert "ZeroDivisionError" in caplog.text


def test_tokens_of_a_fallback_that_its_client_left_count_too():
    clock = Clock()
    router, *_ = make(
        GOOD, [*BETTER[:3], math.inf], clock=clock, fallback_tokens_per_day=3, hold_back=0
    )

    async def run():
        events = router.stream(make_call(tags=["critical"], stream=True), Served())
        for _ in range(3):
            await anext(events)
        await events.aclose()

    asyncio.run(run())
    assert not router.budget.has_left
    assert all(route.running == 0 for route in router.routes)


def test_entropy_needs_no_logprobs_and_a_model_that_tells_none_is_not_doubted():
    confidence = Confidence(statistic="mean_entropy", threshold=2.0)
    router, small, _ = make(answer("a b c", entropy=3.0), BETTER, confidence=confidence)
    assert ask(router)[1].reason == "confidence"
    assert "logprobs" not in small.calls[0].body
    router, *_ = make(answer("a b c"), BETTER, confidence=confidence)
    assert ask(router)[1].reason == ""


def test_deadline_ends_the_request_with_408_and_asks_nobody_else():
    router, small, large = make([GOOD[0], math.inf], BETTER)
    for _ in range(8):
        with pytest.raises(ServeError) as found:
            ask(router, make_call(deadline=time.monotonic() + 0.02))
        assert (found.value.status, found.value.code) == (408, "deadline_exceeded")
    assert large.calls == []
    assert (small.running, small.cancelled) == (0, 8)
    # Short deadlines of one client are no failure of the model for the others.
    assert router.routes[0].breaker.state == "closed"


def test_breaker_sends_requests_past_a_dead_model_and_finds_it_again():
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


def test_open_breaker_without_another_model_says_when_to_come_back():
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


def test_budget_of_requests_and_tokens_is_kept_and_comes_back():
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


def test_second_tries_are_a_share_of_requests_once_the_reserve_is_used_up():
    # The larger model answers nothing useful either, and the breakers are out of the way.
    router, small, large = make([failure()], [failure()], retry_share=0.25, breaker_failures=10**9)
    for _ in range(400):
        with pytest.raises(ServeError, match="engine is gone"):
            ask(router)
    assert len(small.calls) == 400
    assert len(large.calls) == pytest.approx(64 + 100, abs=2)


def test_answers_that_fail_checks_do_not_use_up_what_saves_requests_from_an_outage():
    router, small, _ = make(LOOP, BETTER, retry_share=0.25, breaker_failures=10**9)
    served = [ask(router)[1].backend for _ in range(400)]
    assert served.count("large0") == pytest.approx(64 + 100, abs=2)
    assert set(served[-4:]) == {"small", "large0"}
    small.script = [failure()]
    assert [ask(router)[1].backend for _ in range(64)] == ["large0"] * 64


def test_client_that_leaves_cancels_the_model_and_blames_nobody():
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


def test_half_open_try_that_its_client_leaves_lets_the_next_one_try():
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


def test_bystanders_of_failing_requests_get_their_own_answers():
    def script(call):
        number = int(call.body["messages"][0]["content"])
        words = answer(" ".join(f"{number}-{i}" for i in range(20)))
        spaced = [step for event in words for step in (0, event)]
        return [failure()] if number % 3 == 0 else spaced

    router, _, large = make(script, script, breaker_failures=10**9, hold_back=4)
    large.script = lambda call: answer(f"large {call.body['messages'][0]['content']}")

    async def run():
        calls = [make_call(str(n), stream=n % 2 == 0) for n in range(60)]
        return await asyncio.gather(*(collect(router, call) for call in calls))

    for number, (text, served) in enumerate(asyncio.run(run())):
        if number % 3 == 0:
            assert (text, served.reason) == (f"large {number}", "error")
        else:
            assert text == " ".join(f"{number}-{i}" for i in range(20))


def test_observer_that_fails_costs_no_request(caplog):
    def broken(seen):
        raise RuntimeError("disk full")

    router, *_ = make(GOOD, observers=[broken])
    assert ask(router)[0] == "a good answer of several words"
    assert "disk full" in caplog.text


def test_primary_can_be_exchanged_while_requests_run():
    router, small = make([0.02, *GOOD])
    new = ScriptedBackend("new", BETTER, version="v2")

    async def run():
        running = asyncio.ensure_future(collect(router, make_call()))
        await asyncio.sleep(0.005)
        route = router.set_primary(new)
        assert route.backend is small
        retiring = asyncio.ensure_future(route.retire())
        after = await collect(router, make_call())
        assert not small.closed
        before = await running
        await retiring
        assert small.closed
        return after, before

    (text, served), (old_text, old) = asyncio.run(run())
    assert (text, served.backend, served.version) == ("the larger model says this", "new", "v2")
    assert (old_text, old.backend) == ("a good answer of several words", "small")


def test_two_choices_are_both_held_back_and_checked():
    events = []
    for word_good, word_bad in zip("abcdefghijkl", ["x "] * 12, strict=True):
        events += [Delta(choice=0, text=word_good), Delta(choice=1, text=word_bad)]
    events += [Finish(choice=0), Finish(choice=1), Usage(prompt_tokens=1, completion_tokens=24)]
    router, *_ = make(events, BETTER, hold_back=10)
    assert ask(router, make_call(stream=True, n=2))[1].reason == "check:repetition"


def test_config_names_what_is_wrong():
    with pytest.raises(ValueError, match="fallback_on has 'errors'; allowed are critical, error"):
        QualityConfig(fallback_on=("errors",))
    with pytest.raises(ValueError, match=r"canary_share is 1\.0; it must be below 1"):
        QualityConfig(canary_share=1.0)
    with pytest.raises(ValueError, match="hold_back is -1; it must be a whole number, 0 or more"):
        QualityConfig(hold_back=-1)
    with pytest.raises(ValueError, match="idle_timeout is 0; it must be a number above 0"):
        QualityConfig(idle_timeout=0)
    with pytest.raises(ValueError, match="shadow_share is 0; it must be a share, above 0"):
        QualityConfig(shadow_share=0)
