"""The cost of an answer per token: no task, no timer, no unnecessary pieces.

And that an answer says the same, in however few pieces its tokens come.
"""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.requests import Request
from tests.serve.helpers_engine import ask, collect, open_tiny, write_model
from tests.serve.helpers_quality import ScriptedBackend, answer, make_call
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_text import make_tokenizer

from halfbyte.errors import ServeError
from halfbyte.serve.api.answers import AnswerFormatter, collect_answer
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.backend import Call, Delta, Finish, Served, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.engine.contract import Ended, Generated, Prefilled
from halfbyte.serve.routing.router import Router


def call_of(**body):
    body = {"model": "m", "prompt": "hello", "max_tokens": 8, **body}
    return Call(kind="completion", body=body, id="cmpl-1")


class TellingEngine(ScriptedEngine):
    """Records in which task it is read."""

    def generate(self, request):
        async def generate():
            async for event in ScriptedEngine.generate(self, request):
                self.readers.add(asyncio.current_task())
                yield event

        return generate()


@pytest.mark.parametrize("choices", [1, 3])
def test_single_choice_runs_in_the_callers_task(choices):
    tokenizer = make_tokenizer()
    engine = TellingEngine(tokenizer=tokenizer)
    engine.readers = set()
    backend = EmbeddedBackend(engine, tokenizer, model="m", config=ServeConfig())

    async def work():
        events = [event async for event in backend.stream(call_of(n=choices))]
        assert {e.choice for e in events if isinstance(e, Delta)} == set(range(choices))
        assert events[-1].completion_tokens == 8 * choices
        own = {asyncio.current_task()}
        assert (engine.readers == own) if choices == 1 else not (engine.readers & own)

    asyncio.run(work())


async def stream_to(gateway, send):
    """Request a completion from a gateway, streamed with usage."""
    left = asyncio.Event()

    async def receive():
        await left.wait()
        return {"type": "http.disconnect"}

    async def note(message):
        if message.get("body"):
            send(message["body"].decode())

    scope = {"type": "http", "headers": [], "state": {"key": ""}}
    options = {"stream": True, "stream_options": {"include_usage": True}}
    body = dict(call_of(max_tokens=64, **options).body)
    answer = await gateway.answer(Request(scope, receive), "completion", body)
    await answer(scope, receive, note)


@pytest.mark.parametrize("together", [1, 4, 99])
def test_simultaneous_events_are_sent_as_one_piece(together):
    tokenizer = make_tokenizer()
    script = {"hello": "one two three"}
    engine = ScriptedEngine(tokenizer=tokenizer, script=script, together=together)
    backend = EmbeddedBackend(engine, tokenizer, model="m", config=ServeConfig())
    pieces = []
    asyncio.run(
        stream_to(
            Gateway(backend=backend, router=Router(backend), config=ServeConfig()), pieces.append
        )
    )
    tokens = len(tokenizer("one two three", add_special_tokens=False)["input_ids"])
    # The prompt that has been read comes first, and says nothing alone; the end goes with the last.
    assert len(pieces) == {1: tokens + 1, 4: -(-(tokens + 2) // 4), 99: 1}[together]
    text = "".join(
        choice["text"]
        for line in "".join(pieces).split("\n\n")
        if line and not line.endswith("[DONE]")
        for choice in json.loads(line.removeprefix("data: "))["choices"]
    )
    assert text == "one two three"
    *_, finish, usage, done, nothing = pieces[-1].split("\n\n")
    assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == tokens
    assert (done, nothing) == ("data: [DONE]", "")


def test_engine_delivers_tokens_when_the_next_step_is_planned(tmp_path):
    folder = write_model(tmp_path)
    order = []

    def note(owner, name):
        method = getattr(owner, name)

        def noted(*arguments):
            order.append(name)
            return method(*arguments)

        setattr(owner, name, noted)

    async def work():
        async with open_tiny(folder) as engine:
            note(engine._scheduler, "plan")
            note(engine, "_deliver_due")
            note(engine._runner, "run")
            assert len(await collect(engine, ask([5, 6, 7], 4))) == 6

    asyncio.run(work())
    while order[0] != "plan":
        order.pop(0)
    assert order[:12] == ["plan", "_deliver_due", "run"] * 4
    # The last token, with nothing left to run, is not kept.
    assert order[12] == "_deliver_due"


@pytest.mark.parametrize("choices", [1, 2])
def test_continuous_usage_is_sent_with_every_piece(choices):
    tokenizer = make_tokenizer()
    backend = EmbeddedBackend(
        ScriptedEngine(tokenizer=tokenizer), tokenizer, model="m", config=ServeConfig()
    )

    async def events_of(**options):
        options = {"include_usage": True, **options}
        call = call_of(n=choices, stream=True, stream_options=options)
        formatter = AnswerFormatter(call, "m")
        events = [event async for event in backend.stream(call)]
        chunks = [chunk for event in events for chunk in formatter.format_chunks(event)]
        return [json.loads(chunk.removeprefix(b"data: ")) for chunk in chunks]

    usual = asyncio.run(events_of())
    assert {chunk["usage"] is None for chunk in usual[:-1]} == {True}
    told = [c["usage"] for c in asyncio.run(events_of(continuous_usage_stats=True))]
    counts = [usage["completion_tokens"] for usage in told if usage]
    assert counts == sorted(counts)
    assert counts[-1] == 8 * choices
    # The last token of a choice may come with nothing but its end.
    assert len(counts) > 6 * choices
    assert {usage["prompt_tokens"] for usage in told if usage} == {
        len(tokenizer("hello")["input_ids"])
    }


@pytest.mark.parametrize("stop", ["wo", "three", None])
def test_answer_does_not_depend_on_its_pieces(stop):
    tokenizer = make_tokenizer()

    def told(together):
        engine = ScriptedEngine(tokenizer=tokenizer, together=together)
        engine.script = {"hello": "one two naïve 日本 three four"}
        backend = EmbeddedBackend(engine, tokenizer, model="m", config=ServeConfig())
        body = {"max_tokens": 64, "logprobs": 2} | ({"stop": stop} if stop else {})

        async def work():
            return await collect_answer(backend.stream(call_of(**body)))

        return asyncio.run(work())

    one_by_one = told(1)
    assert stop is None or stop not in one_by_one[0][0].text
    for together in (2, 3, 7, 99):
        choices, usage = told(together)
        assert choices[0].text == one_by_one[0][0].text
        assert choices[0].logprobs == one_by_one[0][0].logprobs
        assert choices[0].finish == one_by_one[0][0].finish
        # What comes after a stop string in the same piece was never asked for.
        assert usage == one_by_one[1]


def test_fast_tokens_are_delivered_together(tmp_path):
    folder = write_model(tmp_path)

    async def pieces(seconds):
        async with open_tiny(folder, chunk_interval=seconds) as engine:
            return [list(events) async for events in engine.generate(ask([5, 6, 7], 9))]

    # The first token waits for nobody, and nothing waits once the answer is over.
    first, rest = asyncio.run(pieces(10))
    assert [type(event) for event in first] == [Prefilled, Generated]
    assert [type(event) for event in rest] == [Generated] * 8 + [Ended]
    each = asyncio.run(pieces(0))
    assert [sum(isinstance(e, Generated) for e in events) for events in each] == [1] * 9
    assert [e for events in each for e in events] == [*first, *rest]


def test_pending_tokens_are_delivered_before_an_error(tmp_path):
    folder = write_model(tmp_path)

    async def work():
        async with open_tiny(folder, chunk_interval=10) as engine:
            seen = []
            steps, draw = engine._steps, engine._steps._add_token

            def break_after_five(job, *arguments):
                if job.num_new_tokens == 5:
                    raise ServeError("It broke.", status=500)
                return draw(job, *arguments)

            steps._add_token = break_after_five

            async def read():
                async for events in engine.generate(ask([5, 6, 7], 9)):
                    seen.extend(events)

            with pytest.raises(ServeError, match="It broke"):
                await read()
            return seen

    assert [type(event) for event in asyncio.run(work())] == [Prefilled, *[Generated] * 5]


def test_monitors_run_after_the_client_has_the_answer():
    tokenizer = make_tokenizer()
    backend = EmbeddedBackend(
        ScriptedEngine(tokenizer=tokenizer), tokenizer, model="m", config=ServeConfig()
    )
    order = []
    router = Router(backend, observers=[lambda seen: order.append(seen.status)])
    gateway = Gateway(backend=backend, config=ServeConfig(), router=router)
    asyncio.run(stream_to(gateway, order.append))
    assert "data: [DONE]" in order[-2]
    assert order[-1] == 200


def test_disconnect_after_the_whole_answer_is_not_an_abort():
    seen = []
    router = Router(ScriptedBackend("small", answer("one two")), observers=[seen.append])

    async def work():
        events = router.stream(make_call(stream=True), Served())
        while not isinstance(await anext(events), Usage):
            pass
        await events.aclose()

    asyncio.run(work())
    assert [one.status for one in seen] == [200]


def test_incomplete_answer_is_an_error():
    seen = []
    events = [event for event in answer("one two") if not isinstance(event, Finish)]
    backend = ScriptedBackend("small", events, models=("m",))
    router = Router(backend, observers=[seen.append])
    gateway = Gateway(backend=backend, config=ServeConfig(), router=router)
    pieces = []
    asyncio.run(stream_to(gateway, pieces.append))
    assert "stopped after 2 tokens without finishing" in pieces[-1]
    assert "[DONE]" not in "".join(pieces)
    assert seen[0].status == 502
