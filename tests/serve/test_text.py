"""Stop strings, tool calls and token texts, for any split of the text into pieces."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise
from unittest.mock import DEFAULT, Mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.serve.helpers_text import make_tokenizer
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from halfbyte.errors import ServeError
from halfbyte.integrations.generation import TextStream
from halfbyte.serve.text.choice_requests import count_characters
from halfbyte.serve.text.prompts import Prompts
from halfbyte.serve.text.stops import StopFilter
from halfbyte.serve.text.token_text import Spelling
from halfbyte.serve.text.tool_calls import (
    FORCED,
    HERMES,
    LLAMA,
    MISTRAL,
    ToolCallFilter,
    detect_call_format,
    parse_calls,
)


def cut(text, places):
    edges = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(edges)]


def test_other_threads_run_while_a_long_prompt_is_tokenized():
    prompts, text = Prompts(make_tokenizer()), "many different words " * 20_000
    ran, is_done = [], threading.Event()

    def run():
        while not is_done.wait(0.001):
            ran.append(time.monotonic())

    other = threading.Thread(target=run)
    other.start()
    start = time.monotonic()
    ids = prompts.encode_text(text)
    end = time.monotonic()
    is_done.set()
    other.join()
    assert ids == make_tokenizer().backend_tokenizer.encode(text).ids
    quarter = (end - start) / 4
    assert any(start + quarter < when < end - quarter for when in ran)


def test_tools_and_their_calls_count_as_characters_of_the_prompt():
    messages = [
        {"role": "user", "content": "x" * 10},
        {"role": "assistant", "tool_calls": [{"function": {"arguments": "y" * 100}}]},
    ]
    assert 110 <= count_characters({"messages": messages}) < 200
    tools = [{"type": "function", "function": {"name": "z" * 1000}}]
    assert count_characters({"messages": messages, "tools": tools}) >= 1110


@given(
    text=st.text("abc", max_size=30),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    places=st.lists(st.integers(0, 30), max_size=10),
)
def test_stop_filter_equals_a_search_in_the_whole_text(text, stops, places):
    found = [stop for stop in stops if stop in text]
    stop_filter = StopFilter(stops)
    whole = "".join(stop_filter.feed(piece) for piece in cut(text, places)) + stop_filter.finish()
    assert stop_filter.hit == bool(found)
    if not found:
        assert whole == text
    else:
        assert text.startswith(whole)
        assert any(text[len(whole) :].startswith(stop) for stop in stops)
        assert not any(stop in whole for stop in stops)


class SlowTokenizer(PreTrainedTokenizerFast):
    """Reverses texts before it encodes them, which the Rust tokenizer does not."""

    def _encode_plus(self, text, **settings):
        return super()._encode_plus(text[::-1], **settings)


@given(st.text(max_size=40), st.booleans())
def test_prompt_is_encoded_as_by_transformers(text, add_special):
    trained = make_tokenizer()
    # What a file says of these is meant for training: nothing of a prompt is cut off or filled up.
    trained.backend_tokenizer.enable_truncation(3)
    trained.backend_tokenizer.enable_padding(length=50)
    prompts = Prompts(trained)
    found = prompts.encode_text(text, add_special=add_special)
    assert found == trained(text, add_special_tokens=add_special)["input_ids"]
    messages = [{"role": "user", "content": f"<|im_end|>{text}"}]
    chat = trained.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert prompts.encode_chat(messages) == chat
    slow = SlowTokenizer(tokenizer_object=trained.backend_tokenizer)
    assert (
        Prompts(slow).encode_text(text)
        == slow(text)["input_ids"]
        == trained(text[::-1])["input_ids"]
    )


def test_far_too_long_prompt_is_refused_by_its_first_part(monkeypatch):
    prompts, tokenized = Prompts(make_tokenizer()), []
    encoder = Mock(wraps=prompts._encoder)
    encoder.encode.side_effect = lambda text, **_: tokenized.append(len(text)) or DEFAULT
    monkeypatch.setattr(prompts, "_encoder", encoder)
    told = r"length is 100 tokens. The prompt has 2000 characters; the first 800 alone have \d+ tok"
    with pytest.raises(ServeError, match=told) as caught:
        prompts.encode_text("some word " * 200, context=100)
    assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "prompt")
    assert tokenized == [800]
    with pytest.raises(ServeError, match=r"The prompt has 40\d\d characters") as caught:
        prompts.encode_chat([{"role": "user", "content": "ab" * 2000}], context=100)
    assert caught.value.param == "messages"


@given(st.text("ab \n", min_size=1, max_size=30), st.integers(1, 4), st.integers(1, 100))
def test_refused_prompt_would_not_have_fit(piece, context, times):
    prompts, text = Prompts(make_tokenizer()), piece * times
    ids = prompts.encode_text(text)
    try:
        assert prompts.encode_text(text, context=context) == ids
    except ServeError:
        assert len(ids) > context


@pytest.mark.parametrize(
    "arguments", [r'{"x": "\ud83d"}', "[" * 900 + "]" * 900], ids=["half a character", "deep"]
)
def test_unencodable_arguments_are_a_client_error(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(ServeError, match="does not accept these messages") as caught:
        Prompts(make_tokenizer()).encode_chat(messages)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@given(st.text(max_size=40))
def test_text_stream_returns_the_whole_text(text):
    tokenizer = make_tokenizer()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special_tokens=True)


def test_text_stream_replaces_broken_bytes_and_keeps_characters():
    tokenizer = make_tokenizer()
    broken = tokenizer.convert_tokens_to_ids("Ł")  # a byte that begins nothing
    smile = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert len(smile) == 4
    stream = TextStream(tokenizer)
    pieces = [stream.add(token) for token in [broken] * 8 + smile]
    assert any(pieces[:8])
    assert "".join(pieces).endswith("🙂")
    assert stream.finish() == ""
    assert TextStream(tokenizer).finish() == ""
    half = TextStream(tokenizer)
    assert [half.add(token) for token in smile[:2]] == ["", ""]
    assert half.finish() == "\N{REPLACEMENT CHARACTER}"


CALL = '{"name": "add", "arguments": {"a": 1, "b": "x</tool"}}'
EXPECTED = [("add", {"a": 1, "b": "x</tool"})]
FORMS = {
    "hermes": (HERMES, f"Sure.\n<tool_call>\n{CALL}\n</tool_call>", "Sure.", EXPECTED),
    "two": (
        HERMES,
        f"<tool_call>{CALL}</tool_call>\n<tool_call>{CALL}</tool_call>",
        "",
        EXPECTED * 2,
    ),
    "unclosed": (HERMES, f"<tool_call>{CALL}", "", EXPECTED),
    "coder": (
        HERMES,
        "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\nx</tool\n"
        "</parameter>\n</function>\n</tool_call>",
        "",
        EXPECTED,
    ),
    "mistral": (MISTRAL, f"[TOOL_CALLS][{CALL}, {CALL}]", "", EXPECTED * 2),
    "mistral new": (MISTRAL, '[TOOL_CALLS]add[ARGS]{"a": 1, "b": "x</tool"}', "", EXPECTED),
    "llama": (LLAMA, CALL.replace("arguments", "parameters"), "", EXPECTED),
    "llama tag": (LLAMA, f"<|python_tag|>{CALL}; {CALL}", "", EXPECTED * 2),
    "forced": (FORCED, f"[{CALL}]", "", EXPECTED),
    "text": (HERMES, "a < b, <tool, no call", "a < b, <tool, no call", []),
    "unknown tool": (HERMES, "<tool_call>{}</tool_call> x", "<tool_call>{}</tool_call> x", []),
    "no json": (LLAMA, "{not json", "{not json", []),
    "other json": (LLAMA, '{"a": 1}', '{"a": 1}', []),
}


@pytest.mark.parametrize("name", FORMS)
@given(places=st.lists(st.integers(0, 200), max_size=20))
def test_calls_are_found_however_the_text_is_split(name, places):
    form, text, content, calls = FORMS[name]
    tool_filter = ToolCallFilter(form, {"add": {}})
    texts, found = [], []
    for piece in cut(text, places):
        out, more = tool_filter.feed(piece)
        texts.append(out)
        found += more
    out, more = tool_filter.finish()
    found += more
    assert "".join(texts) + out == content
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls
    assert [call.index for call in found] == list(range(len(calls)))


def test_call_of_an_unknown_tool_is_content():
    tool_filter = ToolCallFilter(HERMES, {"other": {}})
    text = f"<tool_call>{CALL}</tool_call>"
    assert tool_filter.feed(text) == (text, ())


def test_tagged_parameters_have_the_types_of_the_schema():
    properties = {"zip": {"type": "string"}, "count": {"type": "integer"}}
    tool_filter = ToolCallFilter(HERMES, {"add": {"type": "object", "properties": properties}})
    values = {"zip": "01234", "count": "5", "other": "true", "half": '{"x": "\\ud83d"}'}
    tags = "".join(f"<parameter={name}>\n{value}\n</parameter>" for name, value in values.items())
    _, calls = tool_filter.feed(f"<tool_call><function=add>{tags}</function></tool_call>")
    found = {"zip": "01234", "count": 5, "other": True, "half": {"x": "?"}}
    assert json.loads(calls[0].arguments) == found


def test_number_of_calls_is_limited():
    tool_filter = ToolCallFilter(HERMES, {"add": {}}, max_calls=1)
    _, calls = tool_filter.feed(f"<tool_call>{CALL}</tool_call>" * 2)
    assert len(calls) == 1
    assert tool_filter.is_full
    assert tool_filter.finish() == ("", ())


@given(st.text('{}[]":,a1 ', max_size=40))
def test_parsing_calls_never_fails(text):
    assert isinstance(parse_calls(text), list)


def test_deep_nesting_is_not_a_call():
    assert parse_calls("[" * 100_000) == []


def test_call_format_is_detected_and_ids_match_it():
    assert detect_call_format("... <tool_call> ...") is HERMES
    assert detect_call_format("... [TOOL_CALLS] ...") is MISTRAL
    assert detect_call_format("... tools ...") is LLAMA
    _, calls = ToolCallFilter(MISTRAL, {"add": {}}).feed("")
    tool_filter = ToolCallFilter(MISTRAL, {"add": {}})
    tool_filter.feed(f"[TOOL_CALLS][{CALL}]")
    _, calls = tool_filter.finish()
    assert len(calls[0].id) == 9
    assert calls[0].id.isalnum()


def test_spelling_of_byte_level_tokens():
    tokenizer = make_tokenizer()
    spelling = Spelling(tokenizer)
    ids = tokenizer(" naïve 🙂", add_special_tokens=False)["input_ids"]
    assert b"".join(spelling.spell(token)[1] for token in ids).decode() == " naïve 🙂"
    smile = tokenizer("🙂", add_special_tokens=False)["input_ids"]
    assert spelling.spell(smile[0]) == ("\\xf0", b"\xf0")
    assert spelling.spell(tokenizer.eos_token_id) == ("<|im_end|>", b"<|im_end|>")
    assert spelling.spell(10**6) == ("", b"")


def test_spelling_of_sentencepiece_tokens():
    words = {"<unk>": 0, "▁hello": 1, "<0xE2>": 2, "a": 3}
    inner = Tokenizer(models.BPE(words, [], byte_fallback=True, unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])
    spelling = Spelling(PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>"))
    assert spelling.spell(1) == (" hello", b" hello")
    assert spelling.spell(2)[1] == b"\xe2"
    assert spelling.spell(3) == ("a", b"a")
