from __future__ import annotations

import json
import re
from collections import Counter

import pytest
from tests.helpers.tiny_llama import build_tokenizer

from halfbyte.data import builtin_facts
from halfbyte.errors import ConfigError
from halfbyte.judge.answers import Answer
from halfbyte.judge.builtin_tasks import builtin_tasks
from halfbyte.judge.checks import Check
from halfbyte.judge.interview import is_correct
from halfbyte.judge.questions import Question, make_passages, make_question
from halfbyte.judge.tasks import Item, name_documents, read_tasks


@pytest.fixture
def write(tmp_path):
    def save(*lines, name="mine.jsonl"):
        path = tmp_path / name
        path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines))
        return path

    return save


def test_three_forms_of_lines_become_items(write):
    path = write(
        {"prompt": "2 + 3 =", "answer": "5", "level": "easy"},
        {"prompt": "2 + 3 =", "choices": ["4", "5"], "answer": "5", "id": "c"},
        {"messages": [{"role": "user", "content": "hi"}], "check": {"contains": "hello"}},
    )
    first, second, third = read_tasks([path], slice_by=["level"])
    assert (first.name, first.stop, first.slices) == (
        "mine:1",
        ("\n",),
        {"task": "mine", "level": "easy"},
    )
    assert (second.name, second.right_choice, second.check) == ("c", 1, None)
    assert (third.shown_prompt, third.stop, third.check.kind) == ("user: hi", (), "contains")


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("{", "line 1 is not JSON"),
        ("[1]", "line 1 holds '[1]'. Write one JSON object"),
        ({"prompt": "x"}, "exactly one of 'answer' and 'check'"),
        ({"prompt": "x", "answer": "1", "check": {"equals": "1"}}, "exactly one of"),
        ({"answer": "1"}, "exactly one of 'prompt'"),
        ({"prompt": "x", "messages": [], "answer": "1"}, "exactly one of 'prompt'"),
        (
            {"messages": [{"role": "king", "content": "x"}], "answer": "1"},
            "system, user, assistant",
        ),
        ({"prompt": "x", "choices": ["a"], "answer": 0}, "two or more different"),
        ({"prompt": "x", "choices": ["a", "a"], "answer": 0}, "two or more different"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "from 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": True}, "the answer is True"),
        ({"prompt": "x", "answer": "1", "max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"prompt": "x", "answer": "1", "stop": [""]}, "stop is"),
        ({"prompt": "x", "answer": "1", "stop": None}, "stop is None"),
        ({"prompt": "x", "answer": "1", "stop": 5}, "stop is 5"),
        ({"prompt": "x", "answer": None}, "line 1: equals is null"),
        ("[" * 200_000, "line 1 is not JSON"),
    ],
)
def test_invalid_line_is_rejected_with_file_and_line(write, line, part):
    with pytest.raises(ConfigError, match=f"(?s)mine.jsonl.*{re.escape(part)}"):
        read_tasks([write(line)])


def test_empty_file_unknown_slice_and_duplicate_id_are_rejected(write):
    with pytest.raises(ConfigError, match="is empty"):
        read_tasks([write("")])
    line = {"prompt": "x", "answer": "1", "id": "a"}
    with pytest.raises(ConfigError, match="'a' is on 2 lines"):
        read_tasks([write(line, line)])
    with pytest.raises(ConfigError, match="slice by 'level': no line"):
        read_tasks([write(line)], slice_by=["level"])


def test_byte_order_mark_is_ignored(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"prompt": "x", "answer": "1"}', encoding="utf-8-sig")
    assert read_tasks([path])[0].prompt == "x"


def test_files_with_the_same_stem_are_named_by_their_paths(tmp_path):
    paths = [tmp_path / language / "test.jsonl" for language in ("en", "de")]
    for path in paths:
        path.parent.mkdir()
        path.write_text('{"prompt": "x", "answer": "1"}\n')
    items = read_tasks(paths)
    assert [item.slices["task"] for item in items] == [path.as_posix() for path in paths]


def test_items_with_the_same_question_share_a_document(write):
    asked = {"prompt": "x", "answer": "1", "document": None}
    chosen = {"prompt": "x", "answer": 0}
    path = write(
        asked,
        asked | {"answer": "2"},
        asked | {"prompt": "y"},
        asked | {"document": 7},
        chosen | {"choices": ["a", "b"]},
        chosen | {"choices": ["a", "c"]},
    )
    documents = [item.document for item in name_documents(read_tasks([path]))]
    assert documents == ["mine:1", "mine:1", "mine:3", "7", "mine:5", "mine:6"]


def test_unicode_line_separator_does_not_split_a_line(write):
    path = write(json.dumps({"prompt": "a\u2028b", "answer": "1"}, ensure_ascii=False))
    assert read_tasks([path])[0].prompt == "a\u2028b"


def test_builtin_items_are_reproducible_and_as_many_as_requested():
    items = builtin_tasks(100)
    assert items == builtin_tasks(100)
    assert items != builtin_tasks(100, seed=1)
    counts = Counter(item.slices["task"] for item in items)
    assert counts == dict.fromkeys(("arithmetic", "copying", "json", "facts", "code"), 100)
    assert len({item.name for item in items}) == len({item.prompt for item in items}) == 500


def test_builtin_arithmetic_is_correct():
    checked = 0
    for item in builtin_tasks(150):
        found = re.search(r"Q: (\d+ [-+*] \d+) =\nA:$", item.prompt)
        if found:
            checked += 1
            assert item.check.value == str(eval(found[1]))
        found = re.search(r"larger, (\d+) or (\d+)\?\nA:$", item.prompt)
        if found:
            largest = max(int(found[1]), int(found[2]))
            assert item.choices[item.right_choice] == f" {largest}"
    assert checked > 60


def test_builtin_code_prints_its_expected_answer(capsys):
    for item in builtin_tasks(60):
        if item.slices["task"] == "code":
            code = item.prompt.rsplit("Code:\n", 1)[1].removesuffix("\nPrints:")
            exec(code, {})
            assert capsys.readouterr().out.strip() == item.check.value


def test_builtin_json_contains_only_what_its_text_says():
    for item in builtin_tasks(60):
        if item.slices["task"] == "json":
            text = item.prompt.rsplit("Text: ", 1)[1]
            words = re.findall(r"\w+", json.dumps(item.check.value))
            keys = {"name", "item", "count", "age", "home", "city"}
            assert [w for w in words if w not in keys and w not in text] == []


def test_facts_have_one_right_answer_each():
    for kind, question, pairs in builtin_facts():
        assert question.count("{}") == 1
        subjects = [subject for subject, _ in pairs]
        assert len(set(subjects)) == len(subjects), kind
        assert len({answer for _, answer in pairs}) >= 4, kind


@pytest.mark.parametrize(
    ("nats", "finite", "right"),
    [((-1.0, -2.0), True, True), ((-2.0, -1.0), True, False), ((-1.0, -2.0), False, False)],
)
def test_likeliest_choice_counts_if_its_logits_are_finite(nats, finite, right):
    item = Item(name="x", prompt="p", choices=("a", "b"), right_choice=0)
    answer = Answer(choice_nats=nats, finite=finite)
    assert is_correct(Question(item=item, ids=(1,)), answer, {}) is right


@pytest.mark.parametrize("error", ["ValueError", "SystemExit"])
def test_check_that_raises_is_named_with_the_item(error):
    def bad(text, line):
        raise {"ValueError": ValueError, "SystemExit": SystemExit}[error]("no number")

    item = Item(name="mine:7", prompt="p", check=Check(kind="python", value="bad"))
    question = Question(item=item, ids=(1,))
    with pytest.raises(ConfigError, match=f"'mine:7': the check 'bad' raised {error}"):
        is_correct(question, Answer(text="x"), {"bad": bad})


def test_prompt_and_choices_share_no_token():
    tokenizer = build_tokenizer()
    item = Item(name="x", prompt="w1 w2", choices=(" w3", " w3 w4", " w5"))
    question = make_question(tokenizer, item)
    assert question.ids == (5, 6)
    assert question.choices == ((7,), (7, 8), (9,))


def test_choice_that_adds_no_token_is_rejected():
    item = Item(name="x", prompt="w1", choices=("  ", " w2"))
    with pytest.raises(ConfigError, match="'x': a choice adds no token"):
        make_question(build_tokenizer(), item)


def test_chat_without_a_template_is_rejected():
    item = Item(name="x", messages=({"role": "user", "content": "w1"},))
    with pytest.raises(ConfigError, match="has no chat template"):
        make_question(build_tokenizer(), item)


def test_documents_are_split_into_windows_with_their_document(words):
    passages = make_passages(
        build_tokenizer(), {"a": [words(50), words(20)], "b": [words(70)]}, window=32, limit=None
    )
    assert [(p.document, len(p.ids)) for p in passages] == [
        ("a:0", 32),
        ("a:0", 18),
        ("a:1", 20),
        ("b:0", 32),
        ("b:0", 32),
    ]
    few = make_passages(build_tokenizer(), {"a": [words(1600)]}, window=400, limit=2)
    assert [p.document for p in few] == ["a:0", "a:0"]
    few = make_passages(build_tokenizer(), {"a": [words(4096)]}, window=32, limit=3)
    assert [p.document for p in few] == ["a:0", "a:1", "a:2"]
    with pytest.raises(ConfigError, match="'b' has no document of 16 tokens"):
        make_passages(
            build_tokenizer(), {"a": [words(90)], "b": [words(15)]}, window=32, limit=None
        )
    with pytest.raises(ConfigError, match="window is 8 tokens"):
        make_passages(build_tokenizer(), {}, window=8, limit=None)
