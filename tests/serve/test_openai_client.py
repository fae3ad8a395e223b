"""OpenAI's own client against a gateway on a real port; the engine under it says fixed things."""

from __future__ import annotations

import json
import time
from itertools import pairwise

import httpx2
import openai
import pytest
from pydantic import BaseModel
from tests.serve.helpers_scripted import DEFAULT_ANSWER, ScriptedEngine
from tests.serve.helpers_server import serve
from tests.serve.helpers_text import make_tokenizer

from halfbyte.errors import ServeError
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a place.",
        "parameters": {
            "type": "object",
            "properties": {"place": {"type": "string"}},
            "required": ["place"],
        },
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"place": "Köln"}}\n</tool_call>'


@pytest.fixture(scope="module")
def engine():
    return ScriptedEngine(
        tokenizer=make_tokenizer(),
        script={
            "weather": f"Let me look.\n{CALL}",
            "twice": f"{CALL}\n{CALL}",
            "forced": '[{"name": "get_weather", "arguments": {"place": "Rome"}}]',
            "as json": '{"place": "Rome", "degrees": 21}',
            "say nothing": [],
            "busy": ServeError(
                "Full.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                retry_after=7,
            ),
            "long": "word " * 300,
        },
    )


@pytest.fixture(scope="module")
def server(engine):
    config = ServeConfig(default_tokens=200)
    backend = EmbeddedBackend(engine, engine.tokenizer, model="tiny", config=config)
    with serve(Gateway(backend=backend, config=config, text_tools=backend)) as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.v1, api_key="none", max_retries=0, timeout=20)


def ask(client, content="hello", **more):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(model="tiny", messages=messages, **more)


def test_models_are_listed_and_found(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "halfbyte"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_chat_answers_with_text_and_counts(client, engine):
    answer = ask(client)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == (DEFAULT_ANSWER, "stop")
    assert choice.message.role == "assistant"
    assert choice.message.refusal is None
    assert choice.logprobs is None
    written = len(engine.tokenizer(DEFAULT_ANSWER)["input_ids"])
    asked = engine.tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    assert answer.usage.completion_tokens == written
    assert answer.usage.prompt_tokens == len(asked)
    assert answer.usage.total_tokens == written + len(asked)
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert engine.requests[-1].prompt == tuple(asked)


def test_streamed_chunks_come_as_openai_sends_them(client, engine):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    first, *middle, finish, usage = chunks
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [chunk.choices[0].delta.role for chunk in middle] == [None] * len(middle)
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == DEFAULT_ANSWER
    assert len(middle) > 10
    assert {chunk.choices[0].finish_reason for chunk in (first, *middle)} == {None}
    assert finish.choices[0].finish_reason == "stop"
    assert not finish.choices[0].delta.content
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(engine.tokenizer(DEFAULT_ANSWER)["input_ids"])
    assert {chunk.usage for chunk in (first, *middle, finish)} == {None}


def test_stream_without_usage_has_none_and_ends_with_done(server):
    body = {"model": "tiny", "messages": HELLO, "stream": True}
    reply = httpx2.post(f"{server.v1}/chat/completions", json=body)
    assert reply.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in reply.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
    assert all("usage" not in chunk and len(chunk["choices"]) == 1 for chunk in chunks)
    # Required by OpenAI's schema, though null.
    assert all("logprobs" in chunk["choices"][0] for chunk in chunks)


def test_headers_tell_who_answered(server):
    body = {"model": "tiny", "messages": HELLO}
    reply = httpx2.post(f"{server.v1}/chat/completions", json=body)
    assert reply.headers["x-halfbyte-model"] == "tiny"
    assert reply.headers["x-halfbyte-backend"] == "embedded"
    assert reply.headers["x-request-id"] == reply.json()["id"]
    assert "x-halfbyte-reason" not in reply.headers


def test_answer_without_text_is_an_empty_string(client):
    answer = ask(client, "say nothing")
    assert answer.choices[0].message.content == ""
    assert answer.usage.completion_tokens == 0
    chunks = list(ask(client, "say nothing", stream=True))
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_length_limit_is_told(client):
    answer = ask(client, max_completion_tokens=5)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 5
    assert DEFAULT_ANSWER.startswith(answer.choices[0].message.content)


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_across_tokens_never_shows(client, stream):
    stop = ["wer, with", "never"]
    answer = ask(client, stop=stop, stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert (text, finish) == ("Hello! This is an ans", "stop")


def test_stop_string_ends_the_engines_work(client, engine):
    before = engine.closed_early
    ask(client, "long", stop="word")
    assert engine.closed_early == before + 1


def test_several_choices_have_their_own_seeds(client, engine):
    answer = ask(client, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.message.content for choice in answer.choices} == {DEFAULT_ANSWER}
    assert sorted(request.seed for request in engine.requests[-3:]) == [7, 8, 9]
    written = len(engine.tokenizer(DEFAULT_ANSWER)["input_ids"])
    assert answer.usage.completion_tokens == 3 * written
    one = ask(client).usage.prompt_tokens
    assert answer.usage.prompt_tokens == one


def test_streamed_choices_each_open_and_finish(client):
    texts, roles, finishes = {}, [], []
    for chunk in ask(client, n=2, stream=True):
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        roles += [choice.index] if choice.delta.role else []
        finishes += [choice.index] if choice.finish_reason else []
    assert texts == {0: DEFAULT_ANSWER, 1: DEFAULT_ANSWER}
    assert sorted(roles) == sorted(finishes) == [0, 1]


def test_sampling_fields_reach_the_engine(client, engine):
    ask(
        client,
        temperature=0.5,
        top_p=0.9,
        frequency_penalty=0.1,
        presence_penalty=-0.2,
        logit_bias={"5": -100},
        seed=-3,
        extra_body={"top_k": 20, "min_p": 0.05, "repetition_penalty": 1.2, "ignore_eos": True},
    )
    request = engine.requests[-1]
    assert (request.temperature, request.top_p, request.top_k) == (0.5, 0.9, 20)
    assert (request.frequency_penalty, request.presence_penalty) == (0.1, -0.2)
    assert (request.min_p, request.repetition_penalty, request.ignore_end) == (0.05, 1.2, True)
    assert request.logit_bias == {5: -100.0}
    assert request.seed == 2**63 - 3
    ask(client)
    request = engine.requests[-1]
    assert (request.temperature, request.top_p, request.top_k) == (1.0, 1.0, 0)
    assert (request.seed, request.logit_bias, request.max_new_tokens) == (None, {}, 200)
    ask(client, temperature=0.7, top_p=0)
    assert (engine.requests[-1].temperature, engine.requests[-1].top_p) == (0.0, 1.0)


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_tell_every_token_with_its_bytes(client, engine, stream):
    answer = ask(client, logprobs=True, top_logprobs=3, stream=stream)
    if stream:
        tokens = [
            token
            for chunk in answer
            if chunk.choices[0].logprobs
            for token in chunk.choices[0].logprobs.content
        ]
    else:
        tokens = answer.choices[0].logprobs.content
        assert answer.choices[0].logprobs.refusal is None
    assert len(tokens) == len(engine.tokenizer(DEFAULT_ANSWER)["input_ids"])
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == DEFAULT_ANSWER
    assert {token.logprob for token in tokens} == {-0.25}
    assert all(len(token.top_logprobs) == 3 for token in tokens)
    assert all(token.top_logprobs[0].token == token.token for token in tokens)


def test_logprobs_stop_where_the_text_stops(client):
    choice = ask(client, logprobs=True, stop=" an").choices[0]
    raw = b"".join(bytes(token.bytes) for token in choice.logprobs.content)
    assert raw.decode() == choice.message.content == "Hello! This is"


@pytest.mark.parametrize("stream", [False, True])
def test_tool_call_is_parsed_and_text_before_it_kept(client, stream):
    answer = ask(client, "weather?", tools=[WEATHER], stream=stream)
    if stream:
        chunks = list(answer)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        calls = [c for chunk in chunks for c in chunk.choices[0].delta.tool_calls or []]
        finish = chunks[-1].choices[0].finish_reason
        assert [call.index for call in calls] == [0]
    else:
        message = answer.choices[0].message
        text, calls, finish = message.content, message.tool_calls, answer.choices[0].finish_reason
    assert (text, finish) == ("Let me look.", "tool_calls")
    (call,) = calls
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == {"place": "Köln"}
    assert call.id.startswith("call_")


def test_content_is_null_where_there_are_calls_only(client):
    message = ask(client, "twice", tools=[WEATHER]).choices[0].message
    assert message.content is None
    assert len(message.tool_calls) == 2
    message = ask(client, "twice", tools=[WEATHER], parallel_tool_calls=False).choices[0].message
    assert len(message.tool_calls) == 1


def test_answer_and_tool_result_go_back_as_the_client_keeps_them(client, engine):
    message = ask(client, "weather?", tools=[WEATHER]).choices[0].message
    call = message.tool_calls[0]
    history = [
        {"role": "user", "content": "weather?"},
        message,
        {"role": "tool", "tool_call_id": call.id, "content": "21 degrees"},
        {
            "role": "user",
            "content": [{"type": "text", "text": "say "}, {"type": "text", "text": "nothing"}],
        },
    ]
    client.chat.completions.create(model="tiny", messages=history, tools=[WEATHER])
    prompt = engine.tokenizer.decode(list(engine.requests[-1].prompt))
    assert '{"name": "get_weather", "arguments": {"place": "Köln"}}</tool_call>' in prompt
    assert "<|im_start|>tool\n21 degrees" in prompt
    assert "say nothing" in prompt


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "get_weather"}}]
)
def test_forced_call_is_held_to_a_grammar(client, engine, choice):
    answer = ask(client, "forced", tools=[WEATHER], tool_choice=choice)
    call = answer.choices[0].message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"place": "Rome"}
    assert answer.choices[0].finish_reason == "tool_calls"
    grammar = engine.requests[-1].grammar
    schema = json.loads(grammar.text)
    assert grammar.kind == "json_schema"
    assert schema["items"]["anyOf"][0]["properties"]["name"] == {"const": "get_weather"}
    assert schema.get("maxItems") == (None if choice == "required" else 1)


def test_tool_choice_none_shows_the_model_no_tools(client, engine):
    answer = ask(client, "hello", tools=[WEATHER], tool_choice="none")
    assert answer.choices[0].message.tool_calls is None
    assert "get_weather" not in engine.tokenizer.decode(list(engine.requests[-1].prompt))


def test_response_format_becomes_a_grammar(client, engine):
    class Weather(BaseModel):
        place: str
        degrees: int

    messages = [{"role": "user", "content": "as json"}]
    parsed = client.chat.completions.parse(model="tiny", messages=messages, response_format=Weather)
    assert parsed.choices[0].message.parsed == Weather(place="Rome", degrees=21)
    grammar = engine.requests[-1].grammar
    assert grammar.kind == "json_schema"
    assert json.loads(grammar.text)["required"] == ["place", "degrees"]
    ask(client, "as json", response_format={"type": "json_object"})
    assert engine.requests[-1].grammar.kind == "json_object"
    ask(client, "as json", extra_body={"structured_outputs": {"choice": ["a", "b"]}})
    assert engine.requests[-1].grammar.kind == "choice"
    assert json.loads(engine.requests[-1].grammar.text) == ["a", "b"]


def test_completions_take_text_ids_and_lists(client, engine):
    ids = engine.tokenizer("Once upon")["input_ids"]
    for prompt, count in (
        ("Once upon", 1),
        (ids, 1),
        (["Once upon", "a time"], 2),
        ([ids, ids, ids], 3),
    ):
        answer = client.completions.create(model="tiny", prompt=prompt, max_tokens=100)
        assert [choice.index for choice in answer.choices] == list(range(count))
        assert {choice.text for choice in answer.choices} == {DEFAULT_ANSWER}
        assert answer.id.startswith("cmpl-")
    assert answer.usage.prompt_tokens == 3 * len(ids)
    assert engine.requests[-1].prompt == tuple(ids)
    answer = client.completions.create(model="tiny", prompt="Once upon")
    assert answer.usage.completion_tokens == 16


def test_echo_repeats_and_rates_the_prompt(client, engine):
    answer = client.completions.create(
        model="tiny", prompt="Once upon", echo=True, logprobs=2, max_tokens=1
    )
    choice = answer.choices[0]
    assert choice.text == "Once uponH"
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == "Once uponH"
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == [-0.25] * (len(logprobs.tokens) - 1)
    assert len(logprobs.top_logprobs[1]) == 2
    starts = logprobs.text_offset
    assert [choice.text[a:b] for a, b in pairwise(starts)] == (logprobs.tokens[:-1])
    # The prompt alone.
    answer = client.completions.create(model="tiny", prompt="Once upon", echo=True, max_tokens=0)
    assert (answer.choices[0].text, answer.choices[0].finish_reason) == ("Once upon", "length")
    assert engine.requests[-1].max_new_tokens == 0


def test_streamed_completion(client):
    chunks = list(
        client.completions.create(model="tiny", prompt="Once", max_tokens=100, stream=True, n=2)
    )
    for index in (0, 1):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in mine) == DEFAULT_ANSWER
        assert [choice.finish_reason for choice in mine][-1] == "stop"


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
        ({"logit_bias": {"99999999": 1}}, "invalid_value", "logit_bias", "ids go from 0 to"),
        ({"top_logprobs": 3}, "invalid_value", None, "only where logprobs is true"),
        ({"audio": {"voice": "x", "format": "wav"}}, "unsupported_parameter", "audio", "text only"),
        ({"modalities": ["text", "audio"]}, "unsupported_parameter", "modalities", "more than"),
        ({"store": True}, "unsupported_parameter", "store", "more than"),
        ({"reasoning_effort": "low"}, "unsupported_parameter", "reasoning_effort", "template"),
        ({"service_tier": "flex"}, "unsupported_parameter", "service_tier", "flex"),
        ({"max_tokens": 10_000}, "context_length_exceeded", "messages", "512 tokens"),
        (
            {"tool_choice": "required"},
            "invalid_value",
            None,
            "tool_choice may be given only with tools",
        ),
        (
            {"extra_body": {"chat_template_kwargs": {"chat_template": "x"}}},
            "invalid_value",
            "chat_template_kwargs.chat_template",
            "is not the template's",
        ),
    ],
)
def test_bad_request_is_refused_by_name(client, more, code, param, said):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **more)
    error = caught.value
    assert (error.code, error.param, error.type) == (code, param, "invalid_request_error")
    assert said in error.message


def test_images_are_refused_by_name(client):
    content = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    with pytest.raises(openai.BadRequestError, match="'image_url' cannot be served") as caught:
        ask(client, content)
    assert caught.value.param == "messages.0.content.0"


def test_template_may_refuse(client):
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


def test_busy_engine_is_a_rate_limit_with_a_time(client):
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError) as caught:
            ask(client, "busy", stream=stream)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "7"


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
def test_leaving_client_frees_the_engine(server, engine, stream):
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


def test_tokenize_and_detokenize(server, engine):
    text = "naïve 🙂"
    ids = engine.tokenizer(text)["input_ids"]
    reply = httpx2.post(
        f"{server.address}/tokenize", json={"prompt": text, "return_token_strs": True}
    ).json()
    assert (reply["tokens"], reply["count"], reply["max_model_len"]) == (ids, len(ids), 512)
    assert len(reply["token_strs"]) == len(ids)
    back = httpx2.post(f"{server.address}/detokenize", json={"tokens": ids}).json()
    assert back == {"prompt": text}
    chat = httpx2.post(f"{server.address}/tokenize", json={"messages": HELLO}).json()
    assert chat["count"] > 4
    wrong = httpx2.post(f"{server.address}/detokenize", json={"tokens": [10**6]})
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "tokens")


def test_state_pages(server):
    assert httpx2.get(f"{server.address}/health").json() == {"status": "alive"}
    assert httpx2.get(f"{server.address}/ready").status_code == 200
    assert httpx2.get(f"{server.address}/version").json()["version"]
    assert httpx2.get(f"{server.address}/metrics").status_code == 404
