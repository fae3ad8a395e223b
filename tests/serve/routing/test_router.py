"""Which model answers, in which order, and what the client gets."""

from __future__ import annotations

import asyncio
import math

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
from halfbyte.serve.backend import Served
from halfbyte.serve.quality_config import CAUSES, QualityConfig


def test_good_answer_is_passed_through_unchanged():
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
def test_fallback_answers_if_the_primary_fails_before_the_first_token(script, reason, stream):
    router, small, large = make(
        script, BETTER, first_token_timeout=0.05, idle_timeout=0.05, hold_back=48
    )
    text, served = ask(router, make_call(stream=stream))
    assert text == "the larger model says this"
    assert (served.backend, served.model, served.reason) == ("large0", "large-model-0", reason)
    assert large.calls[0].body["model"] == "large-model-0"
    assert small.running == 0


@pytest.mark.parametrize("cause", [c for c in CAUSES if c in ("error", "timeout", "overload")])
def test_disabled_cause_returns_the_original_error(cause):
    script = {"error": [failure()], "timeout": [math.inf], "overload": [failure(429)]}[cause]
    others = tuple(c for c in CAUSES if c != cause)
    router, _, large = make(script, BETTER, fallback_on=others, first_token_timeout=0.05)
    with pytest.raises(ServeError) as found:
        ask(router)
    assert found.value.status == {"error": 500, "timeout": 504, "overload": 429}[cause]
    assert large.calls == []


def test_error_of_the_request_causes_no_fallback():
    router, _, large = make([ServeError("Too long.", status=400)], BETTER)
    for _ in range(20):
        with pytest.raises(ServeError, match=r"Too long\."):
            ask(router)
    assert large.calls == []
    assert router.routes[0].breaker.state == "closed"


def test_requested_json_is_checked():
    router, *_ = make(answer('{"a": 1'), answer('{"a": 1}'))
    text, served = ask(router, make_call(response_format={"type": "json_object"}))
    assert (text, served.reason) == ('{"a": 1}', "check:json")
    assert ask(router)[1].reason == ""


def test_critical_request_asks_the_fallback_first_and_then_the_primary():
    router, small, large = make(GOOD, BETTER)
    text, served = ask(router, make_call(tags=["critical"]))
    assert (served.backend, served.reason) == ("large0", "critical")
    assert small.calls == []
    large.script = [failure()]
    text, served = ask(router, make_call(tags=["critical"]))
    assert text == "a good answer of several words"
    assert (served.backend, served.reason) == ("small", "error")


def test_model_name_known_only_after_the_first_answer_is_reported():
    router, _, large = make(GOOD, BETTER)
    large.models = ()

    def begin(call):
        large.models = ("large-model",)
        return BETTER

    large.script = begin
    _, served = ask(router, make_call(tags=["critical"]))
    assert (served.backend, served.model) == ("large0", "large-model")


def test_answer_that_failed_a_check_is_given_if_no_other_model_can():
    for stream in (False, True):
        router, small, large = make(LOOP, [failure()], hold_back=20)
        text, served = ask(router, make_call(stream=stream))
        assert text == "".join(e.text for e in LOOP[:-2])
        assert (served.backend, served.reason) == ("small", "")
        assert small.cancelled == 0
        assert len(large.calls) == 1


def test_failing_observer_does_not_stop_the_others(caplog):
    seen = []
    router, *_ = make(GOOD, observers=[lambda _: 1 / 0, seen.append])
    ask(router)
    assert seen[0].answer.failures == ()
    assert "ZeroDivisionError" in caplog.text


def test_concurrent_requests_get_their_own_answers():
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


def test_failing_observer_does_not_fail_the_request(caplog):
    def broken(seen):
        raise RuntimeError("disk full")

    router, *_ = make(GOOD, observers=[broken])
    assert ask(router)[0] == "a good answer of several words"
    assert "disk full" in caplog.text


def test_primary_can_be_replaced_while_requests_run():
    go_on = asyncio.Event()
    router, small = make([go_on, *GOOD])
    new = ScriptedBackend("new", BETTER, version="v2")

    async def run():
        running = asyncio.ensure_future(collect(router, make_call()))
        while not small.running:
            await asyncio.sleep(0)
        route = router.set_primary(new)
        assert route.backend is small
        retiring = asyncio.ensure_future(route.retire())
        after = await collect(router, make_call())
        assert not small.closed
        go_on.set()
        before = await running
        await retiring
        assert small.closed
        return after, before

    (text, served), (old_text, old) = asyncio.run(run())
    assert (text, served.backend, served.version) == ("the larger model says this", "new", "v2")
    assert (old_text, old.backend) == ("a good answer of several words", "small")


def test_config_names_the_invalid_field():
    with pytest.raises(ValueError, match="fallback_on has 'errors'; allowed are critical, error"):
        QualityConfig(fallback_on=("errors",))
    with pytest.raises(ValueError, match=r"canary_share is 1\.0; it must be a share, above 0 and"):
        QualityConfig(canary_share=1.0)
    with pytest.raises(ValueError, match="hold_back is -1; it must be a whole number, 0 or more"):
        QualityConfig(hold_back=-1)
    with pytest.raises(ValueError, match="idle_timeout is 0; it must be a number above 0"):
        QualityConfig(idle_timeout=0)
    with pytest.raises(ValueError, match="shadow_share is 0; it must be a share, above 0"):
        QualityConfig(shadow_share=0)
    with pytest.raises(ValueError, match=r"webhook is 'http://\[::1/hook'; it must be an address"):
        QualityConfig(webhook="http://[::1/hook")
