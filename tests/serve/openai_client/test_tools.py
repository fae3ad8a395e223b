"""Tools and response formats, through OpenAI's own client."""

from __future__ import annotations

import json

import pytest
from pydantic import BaseModel
from tests.serve.helpers_openai import WEATHER, ask


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
def test_forced_call_is_constrained_by_a_grammar(client, engine, choice):
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
    anything = {"type": "json_schema", "json_schema": {"name": "x", "schema": None}}
    ask(client, "as json", response_format=anything)
    assert engine.requests[-1].grammar.text == "{}"
    ask(client, "as json", response_format={"type": "json_object"})
    assert engine.requests[-1].grammar.kind == "json_object"
    ask(client, "as json", extra_body={"structured_outputs": {"choice": ["a", "b"]}})
    assert engine.requests[-1].grammar.kind == "choice"
    assert json.loads(engine.requests[-1].grammar.text) == ["a", "b"]
