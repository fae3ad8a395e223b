from __future__ import annotations

import time

import pytest
from tests.serve.helpers_quality import make_call

from halfbyte.data import calibration_documents, evaluation_documents
from halfbyte.serve.backend import Delta, Finish, ToolCall
from halfbyte.serve.watch.language import detect_language, is_other_language
from halfbyte.serve.watch.monitors import find_failures, is_repetitive
from halfbyte.serve.watch.observation import AttemptRecord, content_text, prompt_text

ENGLISH = "What is the capital of France, and why is it the city that all of the roads lead to?"
GERMAN = (
    "Die Hauptstadt ist Paris, und das liegt auch an den Königen, die sich dort mit dem Hof und"
)
JSON = {"response_format": {"type": "json_object"}}


def failures(text, asked="Say something.", *, whole=True, tools=(), **body):
    record = AttemptRecord(backend="x", role="primary", started=0.0)
    record.add(Delta(text=text, tool_calls=tools), 1.0)
    record.add(Finish(), 2.0)
    return find_failures(make_call(asked, **body), record, whole=whole)


@pytest.mark.parametrize(
    ("text", "more", "found"),
    [
        ("A plain answer.", {}, ()),
        (" \n", {}, ("empty",)),
        ("", {"max_tokens": 0}, ()),
        ("", {"whole": False}, ()),
        ("so it goes " * 20, {}, ("repetition",)),
        ("哈" * 40, {"asked": "你好，请说点什么吧"}, ("repetition",)),
        ('{"a": [1, 2', JSON, ("json",)),
        ('{"a": [1, 2', {**JSON, "whole": False}, ()),
        ('```json\n{"a": 1}\n```', JSON, ()),
        ("Here you are: yes", JSON, ("json",)),
        ("Вот мой ответ на вопрос", {}, ("language",)),
        (GERMAN, {"asked": ENGLISH}, ("language",)),
        (ENGLISH, {"asked": ENGLISH}, ()),
        ("Ja.", {"asked": ENGLISH}, ()),
        ("はい、わかりました。これは答えです", {"asked": "你好，请说点什么吧"}, ()),
        ("I'm sorry, but I cannot help with that.", {}, ("refusal",)),
    ],
)
def test_checks_find_failures_and_nothing_else(text, more, found):
    assert failures(text, **more) == found


def test_refusal_counts_only_at_the_beginning():
    text = " ".join(f"point {n} of the plan," for n in range(40)) + " which I cannot show."
    assert failures(text) == ()


def test_tool_arguments_must_be_json_and_a_call_is_not_empty():
    def tool(arguments):
        return (ToolCall(index=0, id="1", name="f", arguments=arguments),)

    assert failures("", tools=tool('{"x": 1}')) == ()
    assert failures("", tools=tool('{"x": ')) == ("json",)


def test_every_choice_is_checked():
    record = AttemptRecord(backend="x", role="primary", started=0.0)
    for choice, text in enumerate(("fine", "")):
        record.add(Delta(choice=choice, text=text), 1.0)
        record.add(Finish(choice=choice), 1.0)
    assert find_failures(make_call(n=2), record) == ("empty",)


def test_prompt_is_found_in_every_form():
    parts = [{"type": "text", "text": "Say "}, {"type": "image_url"}, {"type": "text", "text": "a"}]
    assert prompt_text({"messages": [{"role": "user", "content": parts}]}) == "Say a"
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert prompt_text({"messages": chat}) == "a"
    assert prompt_text({"messages": []}) == ""
    assert prompt_text({"prompt": ["a", "b"]}) == "a\nb"
    assert prompt_text({"prompt": [1, 2]}) == ""
    assert content_text(None) == ""


def test_long_answers_are_checked_quickly():
    text = " ".join(str(n) for n in range(200_000))
    start = time.process_time()
    assert not is_repetitive(text)
    # Generous: the whole text, word by word and for each period, takes a hundred times as long.
    assert time.process_time() - start < 0.05


@pytest.mark.parametrize("documents", [calibration_documents, evaluation_documents])
def test_languages_of_the_shipped_texts_are_detected(documents):
    found = [detect_language(text) for text in documents("languages")]
    told = [language for language in found if language is not None]
    # Where the files have several texts of a language one after the other, they agree.
    assert len(told) >= 0.9 * len(found)
    assert "english" not in told
    expected = ["german"] * 5 + ["french"] * 5 + ["spanish"] * 5 + ["italian"] * 5
    latin = [(f, e) for f, e in zip(found, expected, strict=False) if f is not None]
    wrong = [(f, e) for f, e in latin if f != e]
    # The first file has six French texts: what follows is shifted by one.
    assert len(wrong) <= (2 if documents is calibration_documents else 0)


@pytest.mark.parametrize("kind", ["prose", "code", "dialogue", "technical"])
def test_english_texts_are_english_or_unclear(kind):
    for documents in (calibration_documents, evaluation_documents):
        assert {detect_language(text) for text in documents(kind)} <= {"english", None}


def test_no_text_switches_language_within_itself():
    for text in evaluation_documents("languages") + evaluation_documents("code"):
        middle = len(text) // 2
        assert not is_other_language(text[:middle], text[middle:])
