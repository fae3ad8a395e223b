"""Upstream servers: real ones, and some with invalid, slow or incomplete answers."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import time
from contextlib import aclosing
from dataclasses import replace

import httpx2
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.helpers_raw import chunk, raw_server, reply, stream
from tests.serve.helpers_scripted import DEFAULT_ANSWER, ScriptedEngine
from tests.serve.helpers_server import serve
from tests.serve.helpers_text import make_tokenizer
from tests.serve.helpers_upstream import FULL, HELLO, NOBODY, ask, make_call, refused

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.assembly import open_service
from halfbyte.serve.backend import Delta, Finish, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.router import Router
from halfbyte.serve.server_sent_events import EventParser
from halfbyte.serve.upstream import UpstreamBackend


@given(
    texts=st.lists(st.text(st.characters(exclude_characters="\r\n", codec="utf-8")), max_size=5),
    ends=st.sampled_from(["\n", "\r\n", "\r"]),
    places=st.lists(st.integers(0, 500), max_size=8),
)
def test_events_do_not_depend_on_how_bytes_are_split(texts, ends, places):
    lines = [f": note{ends}event: x{ends}data: {text}{ends}{ends}" for text in texts]
    # Something has to follow a last \r, or it could be half of \r\n.
    raw = ("".join(lines) + ":").encode()
    edges = sorted({0, len(raw), *(place % (len(raw) + 1) for place in places)})
    parser = EventParser()
    found = [e for a, b in itertools.pairwise(edges) for e in parser.feed(raw[a:b])]
    assert found == texts


def test_event_without_an_end_is_refused(monkeypatch):
    monkeypatch.setattr("halfbyte.serve.server_sent_events.MAX_EVENT_BYTES", 100)
    parser = EventParser()
    with pytest.raises(ValueError, match="more than 100 bytes"):
        parser.feed(b"data: " + b"x" * 200)
    with pytest.raises(UnicodeDecodeError):
        EventParser().feed(b"data: \xff\n")


def test_answer_is_streamed_and_counted():
    with raw_server(FULL) as server:
        events = ask([server.address], make_call(temperature=0.5, metadata={"tags": "critical"}))
        head, body = server.seen[0]
    assert events == [
        Delta(text="Hel"),
        Delta(text="lo"),
        Finish(reason="stop"),
        Usage(prompt_tokens=3, completion_tokens=2),
    ]
    sent = json.loads(body)
    # Its own name for the model, and always a stream with usage.
    assert sent == {
        "model": "big",
        "messages": HELLO,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert head.startswith("POST /v1/chat/completions ")
    assert "authorization" not in head.lower()


@pytest.mark.parametrize(("isolates", "salt"), [(False, None), (True, "ann")])
def test_only_vllm_is_told_the_keys_name_to_isolate_its_cache(isolates, salt):
    async def run(address):
        backend = UpstreamBackend.open([address])
        backend.isolates_keys = isolates
        async with aclosing(backend.stream(replace(make_call(), key="ann"))) as events:
            [event async for event in events]
        await backend.close()

    with raw_server(FULL) as server:
        asyncio.run(run(server.address))
        sent = json.loads(server.seen[0][1])
    assert sent.get("cache_salt") == salt


def test_missing_usage_is_omitted():
    untold = stream(chunk("Hel"), chunk("lo"), chunk(finish="stop"), "[DONE]")
    with raw_server(untold) as server:
        assert ask([server.address])[-1] == Usage(
            prompt_tokens=0, completion_tokens=2, is_reported=False
        )
        upstream = UpstreamBackend.open([server.address])
        with serve(
            Gateway(backend=upstream, router=Router(upstream), config=ServeConfig())
        ) as running:
            running.call(upstream.start())
            client = openai.OpenAI(base_url=running.v1, api_key="x", max_retries=0)
            request = {"model": "big", "messages": HELLO}
            whole = client.chat.completions.create(**request)
            assert (whole.choices[0].message.content, whole.usage) == ("Hello", None)
            options = {"include_usage": True}
            chunks = list(
                client.chat.completions.create(**request, stream=True, stream_options=options)
            )
    assert all(chunk.choices for chunk in chunks)


def test_tokenize_is_forwarded():
    engine = ScriptedEngine(tokenizer=make_tokenizer())
    config = ServeConfig()
    back = EmbeddedBackend(engine, engine.tokenizer, model="tiny", config=config)
    with serve(Gateway(backend=back, router=Router(back), config=config)) as inner:
        upstream = UpstreamBackend.open([NOBODY, inner.v1])
        front = Gateway(backend=upstream, router=Router(upstream), config=config)
        with serve(front) as outer, httpx2.Client() as client:
            for path, body in (
                ("/tokenize", {"prompt": "hello you", "return_token_strs": True}),
                ("/tokenize", {"messages": HELLO, "model": "tiny"}),
                ("/detokenize", {"tokens": [300, 301]}),
            ):
                replies = [client.post(s.address + path, json=body) for s in (inner, outer)]
                assert replies[0].json() == replies[1].json()
                assert [reply.status_code for reply in replies] == [200, 200]
            refused = client.post(outer.address + "/detokenize", json={"tokens": [10**6]})
            assert refused.status_code == 400
            assert "1000000 is outside the model's vocabulary" in refused.json()["error"]["message"]
            outer.call(upstream.close())
    with raw_server(reply(b"{}", status="404 Not Found")) as server:
        upstream = UpstreamBackend.open([server.address])

        async def tokenize():
            try:
                await upstream.tokenize({"prompt": "x"})
            finally:
                await upstream.close()

        with pytest.raises(ServeError, match="does not support /tokenize") as caught:
            asyncio.run(tokenize())
    assert (caught.value.status, caught.value.code) == (404, "not_supported")


def test_upstream_gets_the_servers_key_and_not_the_clients():
    with raw_server(FULL) as server:
        ask([server.address], key="key-of-the-gateway")
        upstream = UpstreamBackend.open([server.address], key="key-of-the-gateway")
        gateway = Gateway(
            backend=upstream,
            router=Router(upstream),
            config=ServeConfig(),
            keys=ApiKeys.parse(["ann:secret-of-ann"]),
        )
        with serve(gateway) as front:
            front.call(gateway.backend.start())
            client = openai.OpenAI(
                base_url=front.v1, api_key="secret-of-ann", max_retries=0, timeout=10
            )
            client.chat.completions.create(model="big", messages=HELLO)
        heads = [head for head, _ in server.seen]
    assert all("bearer key-of-the-gateway" in head.lower() for head in heads)
    assert "secret-of-ann" not in "".join(heads)
    assert "key-of-the-gateway" not in repr(gateway)


def test_tool_call_parts_are_joined():
    pieces = [
        {
            "index": 0,
            "id": "call_1",
            "type": "function",
            "function": {"name": "add", "arguments": ""},
        },
        {"index": 0, "function": {"arguments": '{"a":'}},
        {"index": 1, "id": "call_2", "function": {"name": "add", "arguments": "{}"}},
        {"index": 0, "function": {"arguments": " 1}"}},
    ]
    chunks = [{"choices": [{"index": 0, "delta": {"tool_calls": [piece]}}]} for piece in pieces]
    with raw_server(stream(*chunks, chunk(finish="tool_calls"), "[DONE]")) as server:
        events = ask([server.address])
    calls = [call for event in events if isinstance(event, Delta) for call in event.tool_calls]
    assert [(c.index, c.id, c.name, c.arguments) for c in calls] == [
        (0, "call_1", "add", '{"a": 1}'),
        (1, "call_2", "add", "{}"),
    ]
    assert Finish(reason="tool_calls") in events


def test_chat_and_completion_logprobs_are_parsed():
    top = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105]}]
    content = [{"token": "Hi", "logprob": -0.5, "bytes": [72, 105], "top_logprobs": top}]
    chat = chunk("Hi", logprobs={"content": content})
    with raw_server(stream(chat, chunk(finish="stop"), "[DONE]")) as server:
        (delta, *_) = ask([server.address])
    assert (delta.logprobs[0].logprob, delta.logprobs[0].top[0].bytes) == (-0.5, (72, 105))
    logprobs = {
        "tokens": ["A", "B"],
        "token_logprobs": [None, -1.0],
        "top_logprobs": [None, {"B": -1.0, "C": -0.5}],
        "text_offset": [0, 1],
    }
    choice = {"index": 0, "text": "AB", "logprobs": logprobs, "finish_reason": "length"}
    with raw_server(stream({"choices": [choice]}, "[DONE]")) as server:
        delta, finish, _ = ask([server.address], make_call("completion"))
    assert finish.reason == "length"
    assert math.isnan(delta.logprobs[0].logprob)
    assert [token.token for token in delta.logprobs[1].top] == ["C", "B"]


@pytest.mark.parametrize(
    ("play", "status", "code", "said"),
    [
        (stream(chunk("Hel")), 502, "upstream_broken", "0 of 1 choices were finished"),
        (stream(chunk("Hel"), "[DONE]"), 502, "upstream_broken", "is incomplete"),
        (stream(), 502, "upstream_broken", "is incomplete"),
        (stream("no json"), 502, "upstream_broken", "cannot be parsed: 'no json'"),
        (stream("[1, 2]"), 502, "upstream_broken", "cannot be parsed"),
        (stream({"choices": [{"delta": {"content": 5}}]}), 502, "upstream_broken", "parsed"),
        (stream({"choices": "x"}), 502, "upstream_broken", "cannot be parsed"),
        (stream({"error": {"message": "no memory", "code": 500}}), 502, "upstream_error", "memory"),
        (reply(b"<html>"), 502, "upstream_broken", "not text/event-stream"),
        (reply(b"{}", media="text/html"), 502, "upstream_broken", "'text/html'"),
        (b"this is not HTTP\r\n\r\n", 502, "upstream_broken", ""),
        (b"", 502, "upstream_broken", ""),
        (reply(b"oops", status="500 Internal"), 502, "upstream_error", "oops"),
        (reply(b"", status="503 Busy"), 503, "upstream_error", ""),
        (reply(b"", status="302 Found", more="Location: http://x\r\n"), 502, "upstream_error", ""),
        (reply(b"{}", status="401 No"), 502, "upstream_key_refused", "rejected the API key"),
        (
            reply(
                b'{"error": {"message": "too long", "code": 400, "param": "n"}}', status="400 Bad"
            ),
            400,
            "400",
            "too long",
        ),
    ],
)
def test_invalid_response_is_an_error(play, status, code, said):
    with raw_server(play) as server:
        error = refused([server.address])
    assert (error.status, error.code) == (status, code)
    assert said in str(error)


def test_rate_limit_of_the_upstream_is_passed_on():
    body = json.dumps({"error": {"message": "slow down", "type": "x", "code": "rate"}}).encode()
    with raw_server(reply(body, status="429 Many", more="Retry-After: 9\r\n")) as server:
        error = refused([server.address])
    assert (error.status, error.code, error.retry_after) == (429, "rate", 9.0)


def test_hung_and_slow_servers_time_out():
    with raw_server((30,)) as server:
        start = time.monotonic()
        error = refused([server.address], first=0.3)
        assert (error.status, error.code) == (504, "upstream_timeout")
        assert time.monotonic() - start < 3
    with raw_server((stream(chunk("Hel")), 30)) as server:
        error = refused([server.address], first=5, between=0.3)
        assert (error.status, error.code) == (504, "upstream_timeout")
    with raw_server((stream(chunk("Hel")), 30)) as server:
        error = refused([server.address], make_call(seconds=0.3))
        assert (error.status, error.code) == (408, "request_timeout")


def test_closing_the_stream_closes_the_connection():
    async def run(address):
        backend = UpstreamBackend.open([address])
        async with aclosing(backend.stream(make_call())) as events:
            assert await anext(events) == Delta(text="Hel")
            assert backend.load().running == 1
        assert backend.load().running == 0
        await backend.close()

    with raw_server((stream(chunk("Hel")), 20)) as server:
        asyncio.run(run(server.address))
        end = time.monotonic() + 5
        while not server.left and time.monotonic() < end:
            time.sleep(0.01)
        assert server.left == 1


def test_hosts_are_used_round_robin_without_one_that_is_down():
    async def run(addresses):
        backend = UpstreamBackend.open(addresses)
        for _ in range(4):
            assert [event async for event in backend.stream(make_call())][-1].prompt_tokens == 3
        assert await backend.is_ready()
        down = [host for host in backend.hosts if not host.is_up]
        assert [host.address for host in down] == [NOBODY]
        await backend.close()
        assert not await backend.is_ready()

    with raw_server(FULL) as one, raw_server(FULL) as two:
        asyncio.run(run([one.address, NOBODY, two.address]))
        assert len(one.seen) == len(two.seen) == 2
    error = refused([NOBODY])
    assert (error.status, error.code) == (503, "upstream_unreachable")


def test_host_that_comes_back_is_asked_again(monkeypatch):
    monkeypatch.setattr("halfbyte.serve.upstream_hosts.FIRST_PAUSE_SECONDS", 0.2)

    async def run(address):
        backend = UpstreamBackend.open([address])
        host = backend.hosts[0]
        host.address = NOBODY
        assert not await backend.is_ready()
        host.address = address
        assert not host.is_up
        await asyncio.sleep(0.25)
        assert await backend.is_ready()
        assert backend.models == ("big",)
        await backend.close()

    with raw_server(FULL) as server:
        asyncio.run(run(server.address))


def test_unreachable_upstream_is_logged_at_the_start(caplog):
    with raw_server(FULL) as other:
        config = QualityConfig(fallback=(NOBODY, other.address))
        upstream = ServeConfig(upstreams=(other.address,))
        service = open_service(None, upstream, EngineConfig(), config, ApiKeys())

        async def run():
            await service.start()
            names = [route.backend.models for route in service.quality.router.routes]
            await service.stop()
            return names

        assert asyncio.run(run()) == [("big",), (), ("big",)]
    warned = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warned) == 1
    assert "127.0.0.1:9" in warned[0]


def test_addresses_are_checked():
    for address in ("localhost:8000", "http://", "http://[::1/v1", "http://h:x/v1", "http://h:0"):
        with pytest.raises(ConfigError, match=rf"'{re.escape(address)}' is not the address"):
            UpstreamBackend.open([address])
    assert UpstreamBackend.open(["http://[::1]:8000/v1"]).name == "[::1]:8000"
    with pytest.raises(ConfigError, match="No upstream"):
        UpstreamBackend.open([])
    assert UpstreamBackend.open(["http://h:1/v1/#name"]).models == ("name",)
    config = ServeConfig(upstreams=("http://a/v1, http://b/v1/", "http://c/v1"))
    assert config.upstream_addresses == ("http://a/v1", "http://b/v1", "http://c/v1")


def test_gateway_before_a_gateway_gives_the_same_answers():
    engine = ScriptedEngine(tokenizer=make_tokenizer())
    config = ServeConfig()
    back = EmbeddedBackend(engine, engine.tokenizer, model="tiny", config=config)
    with serve(Gateway(backend=back, router=Router(back), config=config)) as inner:
        upstream = UpstreamBackend.open([inner.v1])
        with serve(Gateway(backend=upstream, router=Router(upstream), config=config)) as outer:
            outer.call(upstream.start())
            near, far = (
                openai.OpenAI(base_url=s.v1, api_key="x", max_retries=0) for s in (inner, outer)
            )

            def both(ask):
                answers = [
                    ask(client).model_dump(exclude={"id", "created"}) for client in (near, far)
                ]
                assert answers[0] == answers[1]

            both(
                lambda c: c.chat.completions.create(
                    model="tiny", messages=HELLO, logprobs=True, top_logprobs=2, n=2
                )
            )
            both(
                lambda c: c.completions.create(
                    model="tiny", prompt=["a", "b c"], logprobs=2, echo=True, max_tokens=4
                )
            )
            with pytest.raises(openai.BadRequestError, match="'audio' is not supported"):
                far.chat.completions.create(model="tiny", messages=HELLO, audio={"voice": "x"})
            text = "".join(
                chunk.choices[0].delta.content or ""
                for chunk in far.chat.completions.create(model="tiny", messages=HELLO, stream=True)
            )
            assert text == DEFAULT_ANSWER
