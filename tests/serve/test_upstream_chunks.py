"""What other servers send, as events and as what clients get; and who is asked next."""

from __future__ import annotations

import asyncio
import math

import httpx2
import pytest
from tests.serve.helpers_raw import chunk, raw_server, reply, stream
from tests.serve.helpers_server import serve
from tests.serve.helpers_upstream import FULL, HELLO, USAGE, make_call, refused

from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.upstream import UpstreamBackend


def test_halves_of_characters_and_endless_numbers_never_reach_a_client():
    token = {"token": "x", "bytes": None, "top_logprobs": []}
    odd = chunk("hi \ud83d", logprobs={"content": [token | {"logprob": math.inf}]})
    with raw_server(stream(odd, chunk(finish="stop"), USAGE, "[DONE]")) as server:
        upstream = UpstreamBackend.open([server.address])
        with serve(Gateway(backend=upstream, config=ServeConfig())) as running:
            running.call(upstream.start())
            body = {"model": "big", "messages": HELLO, "logprobs": True}
            told = httpx2.post(f"{running.v1}/chat/completions", json=body).json()["choices"][0]
    assert told["message"]["content"] == "hi ?"
    assert told["logprobs"]["content"][0]["logprob"] is None
    endless = {"choices": [], "usage": {"prompt_tokens": 2**70, "completion_tokens": 1}}
    with raw_server(stream(chunk("Hel"), chunk(finish="stop"), endless, "[DONE]")) as server:
        assert refused([server.address]).code == "upstream_broken"


def test_host_that_has_no_time_is_left_alone_for_as_long_as_it_says_and_the_next_one_asked():
    async def run(addresses):
        backend = UpstreamBackend.open(addresses)
        answers = [[event async for event in backend.stream(make_call())] for _ in range(4)]
        assert all(events[-1].prompt_tokens == 3 for events in answers)
        assert await backend.is_ready()
        await backend.close()

    for status in ("429 Many", "502 Bad Gateway", "503 Draining"):
        busy = reply(b"{}", status=status, more="Retry-After: 60\r\n")
        with raw_server(busy) as one, raw_server(FULL) as two:
            asyncio.run(run([one.address, two.address]))
            assert (len(one.seen), len(two.seen)) == (1, 4), status
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
def test_retry_after_is_seconds_or_a_date_and_never_for_ever(header, seconds):
    with raw_server(reply(b"{}", status="429 Many", more=f"Retry-After: {header}\r\n")) as server:
        assert refused([server.address]).retry_after == seconds
