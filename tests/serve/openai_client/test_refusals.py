"""Invalid requests, failures and disconnects, through OpenAI's own client."""

from __future__ import annotations

import time

import httpx2
import openai
import pytest
from tests.serve.helpers_openai import HELLO, ask


@pytest.mark.parametrize(
    ("more", "code", "param", "said"),
    [
        ({"temperature": 3}, "invalid_value", "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, "invalid_type", "temperature", "valid number"),
        ({"n": 0}, "invalid_value", "n", "greater than or equal to 1"),
        ({"extra_body": {"typo": 1}}, "unknown_parameter", "typo", "Unrecognized"),
        (
            {"extra_body": {"messages": [{"role": "user", "content": [{"type": "text", "x": 1}]}]}},
            "missing_required_parameter",
            "messages.0.content.0.text",
            "is missing",
        ),
        (
            {"extra_body": {"messages": [{"role": "king", "content": "x"}]}},
            "invalid_value",
            "messages.0",
            "'role' should be system, developer, user",
        ),
        (
            {"extra_body": {"tools": [{"type": "function", "function": {"name": "a b"}}]}},
            "invalid_value",
            "tools.0.function.name",
            "should match pattern",
        ),
        ({"extra_body": {"messages": []}}, "invalid_value", "messages", "at least 1 item"),
        ({"stop": [""]}, "invalid_value", "stop.0", "at least 1 character"),
        ({"logit_bias": {"99999999": 1}}, "invalid_value", "logit_bias", "vocabulary of 0 to"),
        ({"top_logprobs": 3}, "invalid_value", None, "requires logprobs to be true"),
        ({"audio": {"voice": "x", "format": "wav"}}, "unsupported_parameter", "audio", "text only"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities", 'not ["text"]'),
        ({"store": True}, "unsupported_parameter", "store", "true, not false"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort", "template"),
        ({"service_tier": "flex"}, "unsupported_parameter", "service_tier", "flex"),
        ({"max_tokens": 10_000}, "context_length_exceeded", "messages", "512 tokens"),
        (
            {"tool_choice": "required"},
            "invalid_value",
            None,
            "tool_choice requires tools",
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}},
            "invalid_value",
            "chat_template_kwargs.chat_template",
            "the name is reserved",
        ),
    ],
)
def test_invalid_requests_name_the_field(client, more, code, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert said in error.message


def test_images_are_rejected_by_name(client):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    with pytest.raises(openai.BadRequestError, match="'image_url' is not supported") as caught:
        ask(client, content)
    assert caught.value.param == "messages.0.content.0"


def test_template_can_reject_messages(client):
    with pytest.raises(openai.BadRequestError, match="a forbidden word") as caught:
        ask(client, "this is forbidden")
    assert caught.value.code == "chat_template_error"


def test_unknown_model_and_path(client, server):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    for method, path, status in (
        ("GET", "/docs", 404),
        ("GET", "/openapi.json", 404),
        ("POST", "/shutdown", 404),
        ("POST", "/v1/load_lora_adapter", 404),
        ("GET", "/v1/chat/completions", 405),
        ("GET", "/v1/models/", 404),
    ):
        reply = httpx2.request(method, server.address + path)
        assert reply.status_code == status, path
        assert set(reply.json()["error"]) == {"message", "type", "param", "code"}


def test_busy_engine_is_a_rate_limit_error_with_retry_after(client):
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, "busy", stream=stream)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "7"
        # It is also the row's id in the request log.
        assert caught.value.request_id.startswith("chatcmpl-")


def test_error_within_a_stream_is_raised_by_the_client(client, engine):
    engine.fail_after = 3
    try:
        with pytest.raises(openai.APIError, match="The engine broke") as caught:
            list(ask(client, stream=True))
        with pytest.raises(openai.InternalServerError, match="The engine broke"):
            ask(client)
    finally:
        engine.fail_after = None
    assert caught.value.type == "server_error"


def wait_until(condition, seconds=5):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [False, True])
def test_disconnect_frees_the_engine(server, engine, stream):
    engine.delay = 0.02
    before = engine.closed_early
    body = {"model": "tiny", "stream": stream, "messages": [{"role": "user", "content": "long"}]}
    try:
        with httpx2.Client() as http:
            if stream:
                with http.stream("POST", f"{server.v1}/chat/completions", json=body) as reply:
                    assert next(reply.iter_lines()).startswith("data: ")
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    http.post(f"{server.v1}/chat/completions", json=body, timeout=0.3)
        wait_until(lambda: engine.running == 0)
    finally:
        engine.delay = 0.0
    assert engine.closed_early == before + 1
    wait_until(lambda: server.gateway.limits.running == 0)


def test_sdk_closes_a_stream_early(client, engine, server):
    engine.delay = 0.01
    try:
        with ask(client, "long", stream=True) as stream:
            next(iter(stream))
        wait_until(lambda: engine.running == 0)
    finally:
        engine.delay = 0.0
    wait_until(lambda: server.gateway.limits.running == 0)
