"""What other servers send, as events and as what clients get."""

from __future__ import annotations

import math

import httpx2
from tests.serve.helpers_raw import chunk, raw_server, stream
from tests.serve.helpers_server import serve
from tests.serve.helpers_upstream import HELLO, USAGE, refused

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
