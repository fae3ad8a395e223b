"""Parsing of upstream streams, and the order of hosts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from dataclasses import replace
from pathlib import Path

import httpx2
import openai
import pytest
from tests.serve.helpers_raw import MODELS, chunk, raw_server, reply, stream
from tests.serve.helpers_server import serve
from tests.serve.helpers_upstream import FULL, HELLO, NOBODY, USAGE, make_call, refused

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.assembly import open_service
from halfbyte.serve.backend import Delta
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.router import Router
from halfbyte.serve.upstream import UpstreamBackend
from halfbyte.serve.upstream_chunks import ChunkReader


def test_unpaired_surrogates_and_infinite_numbers_never_reach_a_client():
    token = {"token": "x", "bytes": None, "top_logprobs": []}
    odd = chunk("hi \ud83d", logprobs={"content": [token | {"logprob": math.inf}]})
    with raw_server(stream(odd, chunk(finish="stop"), USAGE, "[DONE]")) as server:
        upstream = UpstreamBackend.open([server.address])
        with serve(
            Gateway(backend=upstream, router=Router(upstream), config=ServeConfig())
        ) as running:
            running.call(upstream.start())
            body = {"model": "big", "messages": HELLO, "logprobs": True}
            told = httpx2.post(f"{running.v1}/chat/completions", json=body).json()["choices"][0]
    assert told["message"]["content"] == "hi ?"
    assert told["logprobs"]["content"][0]["logprob"] is None
    endless = {"choices": [], "usage": {"prompt_tokens": 2**70, "completion_tokens": 1}}
    with raw_server(stream(chunk("Hel"), chunk(finish="stop"), endless, "[DONE]")) as server:
        assert refused([server.address]).code == "upstream_broken"


def test_busy_host_is_skipped_until_its_retry_after():
    async def run(addresses):
        backend = UpstreamBackend.open(addresses)
        answers = [[event async for event in backend.stream(make_call())] for _ in range(4)]
        assert all(events[-1].prompt_tokens == 3 for events in answers)
        assert await backend.is_ready()
        await backend.close()

    async def tokenize(addresses):
        backend = UpstreamBackend.open(addresses)
        told = await backend.tokenize({"prompt": "x"})
        await backend.close()
        return told

    for status in ("429 Many", "502 Bad Gateway", "503 Draining"):
        busy = reply(b"{}", status=status, more="Retry-After: 60\r\n")
        with raw_server(busy) as one, raw_server(FULL) as two:
            asyncio.run(run([one.address, two.address]))
            assert (len(one.seen), len(two.seen)) == (1, 4), status
    with raw_server(busy) as one, raw_server(reply(b'{"tokens": [1]}')) as two:
        assert asyncio.run(tokenize([one.address, two.address])) == {"tokens": [1]}
    with raw_server(busy) as one, raw_server(busy) as two:
        assert refused([one.address, two.address]).retry_after == 60


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("9" * 400, 3600.0),
        ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0),
        ("Wed, 21 Oct 2099 07:28:00 GMT", 3600.0),
        ("soon", None),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_limited(header, seconds):
    with raw_server(reply(b"{}", status="429 Many", more=f"Retry-After: {header}\r\n")) as server:
        assert refused([server.address]).retry_after == seconds


def say(**delta):
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]}


THOUGHT = {**USAGE["usage"], "completion_tokens_details": {"reasoning_tokens": 1}}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_reasoning_and_refusal_reach_the_client(name):
    chunks = (say(**{name: "Hm. "}), say(**{name: "No."}), say(refusal="I will not."))
    usage = {"choices": [], "usage": THOUGHT}
    with raw_server(stream(*chunks, chunk(finish="stop"), usage, "[DONE]")) as server:
        upstream = UpstreamBackend.open([server.address])
        with serve(
            Gateway(backend=upstream, router=Router(upstream), config=ServeConfig())
        ) as running:
            running.call(upstream.start())
            client = openai.OpenAI(base_url=running.v1, api_key="x", max_retries=0)
            whole = client.chat.completions.create(model="big", messages=HELLO)
            pieces = list(client.chat.completions.create(model="big", messages=HELLO, stream=True))
    message = whole.choices[0].message
    assert (message.content, message.refusal) == (None, "I will not.")
    assert message.reasoning_content == "Hm. No."
    assert whole.usage.completion_tokens_details.reasoning_tokens == 1
    deltas = [piece.choices[0].delta for piece in pieces]
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "Hm. No."
    assert "".join(d.refusal or "" for d in deltas) == "I will not."


def test_reasoning_and_tool_call_parts_give_events():
    part = {"index": 0, "function": {"name": "f", "arguments": "{}"}}
    reader = ChunkReader("chat", "h", 1)
    for delta in ({"reasoning_content": "Hm."}, {"tool_calls": [part]}):
        (event,) = reader.read(json.dumps(say(**delta)))
        assert isinstance(event, Delta)
        assert (event.text, event.tool_calls) == ("", ())
    assert reader.read(json.dumps(say(role="assistant"))) == []


def test_answer_limits_apply_to_upstreams():
    def sent(config, **body):
        with raw_server(FULL) as server:
            upstream = replace(config, upstreams=(server.address,))
            service = open_service(None, upstream, EngineConfig(), QualityConfig(), ApiKeys())
            with serve(service.gateway) as running:
                running.call(service.start())
                told = httpx2.post(
                    f"{running.v1}/chat/completions",
                    json={"model": "big", "messages": HELLO, **body},
                )
                running.call(service.quality.close())
            asked = json.loads(server.seen[-1][1]) if told.status_code == 200 else told.json()
            return asked.get("max_tokens"), asked.get("error", {}).get("message")

    limited = ServeConfig(max_tokens=10, default_max_tokens=7)
    assert sent(ServeConfig()) == (None, None)
    assert sent(limited) == (7, None)
    assert sent(ServeConfig(max_tokens=10)) == (10, None)
    assert sent(limited, max_tokens=9) == (9, None)
    refused = "max_completion_tokens is 11; this server allows at most 10."
    assert sent(limited, max_completion_tokens=11) == (None, refused)


def test_upstream_that_starts_late_is_used_once_it_is_up():
    with raw_server(FULL) as late, raw_server(FULL) as other:
        config = ServeConfig(upstreams=(late.address,))
        quality = QualityConfig(fallback=(other.address,))
        service = open_service(None, config, EngineConfig(), quality, ApiKeys())
        host = service.gateway.backend.hosts[0]
        host.address = NOBODY
        with serve(service.gateway) as running:

            def post(model="big"):
                url, body = f"{running.v1}/chat/completions", {"model": model, "messages": HELLO}
                return httpx2.post(url, json=body).status_code, len(late.seen), len(other.seen)

            running.call(service.start())
            assert post() == (200, 0, 1)
            host.address = late.address
            assert post() == (200, 1, 1)
            assert post("other") == (404, 1, 1)
            running.call(service.stop())


def test_models_are_read_again_from_a_restarted_host(monkeypatch):
    async def ask(backend, address):
        backend.hosts[0].address = address
        with contextlib.suppress(ServeError):
            _ = [event async for event in backend.stream(make_call(model="big"))]
        return backend.models

    async def run(address):
        backend = UpstreamBackend.open([address])
        found = [await ask(backend, address), await ask(backend, NOBODY)]
        other = MODELS.replace(b"big", b"new")
        monkeypatch.setattr("tests.serve.helpers_raw.MODELS", other)
        found.append(await ask(backend, address))
        await backend.close()
        return found

    with raw_server(FULL) as server:
        assert asyncio.run(run(server.address)) == [("big",), (), ("new",)]
    assert [json.loads(body)["model"] for _, body in server.seen] == ["big", "new"]


@pytest.mark.parametrize("option", ["served_name", "chat_template"])
def test_model_options_are_refused_for_upstreams(option):
    config = ServeConfig(upstreams=("http://h:1/v1",), **{option: Path("x")})
    with pytest.raises(ConfigError, match=f"--{option.replace('_', '-')} needs a MODEL"):
        open_service(None, config, EngineConfig(), QualityConfig(), ApiKeys())
