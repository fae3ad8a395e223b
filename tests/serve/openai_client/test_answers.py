"""Chats, completions, streams and logprobs, read by OpenAI's own client."""

from __future__ import annotations

import json
from itertools import pairwise

import httpx2
import openai
import pytest
from tests.serve.helpers_openai import HELLO, ask
from tests.serve.helpers_scripted import DEFAULT_ANSWER


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


def test_headers_name_the_answering_model(server):
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


def test_length_limit_is_the_finish_reason(client):
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


def test_stop_string_stops_the_engine(client, engine):
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


def test_echo_returns_and_scores_the_prompt(client, engine):
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
    # Tokens that are a part of a character count for none, whatever they are spelled like.
    choice = client.completions.create(
        model="tiny", prompt="a 🙂", echo=True, logprobs=0, max_tokens=1
    ).choices[0]
    starts, end = choice.logprobs.text_offset, len("a 🙂")
    assert starts[0] == 0
    assert starts[-1] == end
    assert max(starts) < len(choice.text)
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
