"""What an answer costs for every token: no task, no timer, no more pieces than it has to have."""

from __future__ import annotations

import asyncio
import json

import pytest
from starlette.requests import Request
from tests.serve.helpers_engine import ask, collect, open_tiny, write_model
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_text import make_tokenizer

from halfbyte.serve.api.answers import AnswerForm
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.exchange import Call, Delta
from halfbyte.serve.keys import ApiKeys


def call_of(**body):
    body = {"model": "m", "prompt": "hello", "max_tokens": 8, **body}
    return Call(kind="completion", body=body, id="cmpl-1")


class TellingEngine(ScriptedEngine):
    """Notes in whose task it is read."""

    def generate(self, request):
        async def generate():
            async for event in ScriptedEngine.generate(self, request):
                self.readers.add(asyncio.current_task())
                yield event

        return generate()


@pytest.mark.parametrize("choices", [1, 3])
def test_a_single_choice_is_read_by_whoever_wants_it(choices):
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


def test_a_stream_is_sent_in_a_piece_for_each_token_and_one_for_its_end():
    tokenizer = make_tokenizer()
    engine = ScriptedEngine(tokenizer=tokenizer, script={"hello": "one two three"})
    backend = EmbeddedBackend(engine, tokenizer, model="m", config=ServeConfig())
    gateway = Gateway(backend=backend, config=ServeConfig(), keys=ApiKeys())
    sent = []

    async def work():
        left = asyncio.Event()

        async def receive():
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        scope = {"type": "http", "headers": [], "state": {"key": ""}}
        options = {"stream": True, "stream_options": {"include_usage": True}}
        body = dict(call_of(max_tokens=64, **options).body)
        answer = await gateway.answer(Request(scope, receive), "completion", body)
        await answer(scope, receive, send)

    asyncio.run(work())
    pieces = [m["body"].decode() for m in sent if m.get("body")]
    tokens = len(tokenizer("one two three", add_special_tokens=False)["input_ids"])
    assert len(pieces) == tokens + 1
    *_, finish, usage, done, nothing = pieces[-1].split("\n\n")
    assert json.loads(finish.removeprefix("data: "))["choices"][0]["finish_reason"] == "stop"
    assert json.loads(usage.removeprefix("data: "))["usage"]["completion_tokens"] == tokens
    assert (done, nothing) == ("data: [DONE]", "")


def test_the_engine_hands_tokens_over_when_the_next_step_is_ready_to_run(tmp_path):
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
            note(engine, "_post")
            note(engine._runner, "run")
            assert len(await collect(engine, ask([5, 6, 7], 4))) == 6

    asyncio.run(work())
    while order[0] != "plan":
        order.pop(0)
    assert order[:12] == ["plan", "_post", "run"] * 4
    # The last token, with nothing left to run, is not kept.
    assert order[12] == "_post"


@pytest.mark.parametrize("choices", [1, 2])
def test_usage_so_far_is_told_with_every_piece_where_it_is_asked_for(choices):
    tokenizer = make_tokenizer()
    backend = EmbeddedBackend(
        ScriptedEngine(tokenizer=tokenizer), tokenizer, model="m", config=ServeConfig()
    )

    async def events_of(**options):
        options = {"include_usage": True, **options}
        call = call_of(n=choices, stream=True, stream_options=options)
        form = AnswerForm(call, "m")
        events = [event async for event in backend.stream(call)]
        chunks = [chunk for event in events for chunk in form.chunks(event)]
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
