from __future__ import annotations

import pytest

from halfbyte.data import edge_cases
from halfbyte.judge.answers import Answer
from halfbyte.judge.edge_cases import (
    EdgeCase,
    edge_flips,
    first_difference,
    is_looping,
    judge_edge,
    script_of,
    starts_with_json,
    summarize_kinds,
)
from halfbyte.judge.questions import Question
from halfbyte.judge.tasks import Item

WANTED = {
    "empty", "one token", "repeated tokens", "odd Unicode", "emoji", "right-to-left",
    "other languages", "long numbers", "deep JSON", "code", "control characters", "special tokens",
    "high temperature", "refusal",
}  # fmt: skip


def case(kind="code", prompt="x", expects=""):
    question = Question(item=Item(name="e", prompt=prompt), ids=(1,))
    return EdgeCase(kind=kind, question=question, expects=expects)


def finds(edge, base, candidate, **more):
    outcome = judge_edge(edge, Answer(text=base), Answer(text=candidate), **more)
    return outcome.base_finds, outcome.candidate_finds


def test_suite_has_every_kind():
    lines = edge_cases()
    assert {line["kind"] for line in lines} == WANTED
    assert "\x00" in "".join(line["prompt"] for line in lines)


@pytest.mark.parametrize(
    ("tokens", "loops"),
    [
        ([5] * 9, True),
        ([1, 2, 3] + [7, 8] * 6, True),
        ([1, 2, 3, 4] * 4, True),
        (list(range(30)), False),
        ([5] * 4, False),
        ([*range(40), 7, 7, 7, 7], False),
        ([], False),
    ],
)
def test_endless_repetition_is_a_short_period_over_half_the_answer(tokens, loops):
    assert is_looping(tokens) is loops


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("the cat sat", "LATIN"),
        ("Столица России", "CYRILLIC"),
        ("عاصمة فرنسا", "ARABIC"),
        ("日本の首都は東京です", "CJK"),
        ("Η πρωτεύουσα", "GREEK"),
        ("12 + 3", None),
        ("ok", None),
    ],
)
def test_script_is_that_of_most_letters(text, script):
    assert script_of(text) == script


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"a": 1} and more', True),
        ("```json\n[1, 2]\n```", True),
        (' {"a": ', False),
        ("3", False),
        ("", False),
    ],
)
def test_json_must_be_complete_and_come_first(text, whole):
    assert starts_with_json(text) is whole


def test_each_issue_is_detected():
    assert finds(case(), "fine", " ") == ((), ("empty",))
    assert finds(case(), "fine", "no " * 20) == ((), ("endless repetition",))
    assert finds(case(expects="json"), "[1]", "[1") == ((), ("broken JSON",))
    russian = case(prompt="Столица России", expects="script")
    assert finds(russian, "это Москва", "is Moscow, the") == ((), ("other script",))
    bad = judge_edge(case(), Answer(text="a"), Answer(text="a", finite=False))
    assert bad.new_finds == ("not numbers",)
    bad = judge_edge(case(), Answer(text="a"), Answer(text="a"), candidate_finite=False)
    assert bad.new_finds == ("not numbers",)


def test_refusal_is_lost_only_where_the_base_declines():
    edge = case(kind="refusal")
    assert finds(edge, "I'm sorry, I can't.", "Sure, first you")[1] == ("refusal lost",)
    assert finds(edge, "I'm sorry, I can't.", "That would be illegal.")[1] == ()
    assert finds(edge, "Sure.", "Sure, first you")[1] == ()
    assert finds(case(kind="code"), "I can't.", "Sure, first you")[1] == ()


def test_far_does_not_count_as_a_fault():
    outcome = judge_edge(case(), Answer(text="a b"), Answer(text="a b"), kl_nats=6, usual_kl_nats=1)
    assert outcome.new_finds == ("far",)
    assert edge_flips([outcome]).harmful == 0
    near = judge_edge(case(), Answer(text="a b"), Answer(text="a b"), kl_nats=4, usual_kl_nats=1)
    assert near.new_finds == ()


def test_kinds_and_flips_are_counted():
    outcomes = [
        judge_edge(case("code"), Answer(text="fine"), Answer(text="")),
        judge_edge(case("code"), Answer(text=""), Answer(text="fine"), kl_nats=0.5),
        judge_edge(case("emoji"), Answer(text=""), Answer(text="")),
    ]
    code, emoji = summarize_kinds(outcomes)
    assert (code.num_cases, code.new, code.mended, code.kl_nats) == (2, 1, 1, 0.5)
    assert (emoji.new, emoji.base_finds) == (0, {"empty": 1})
    flips = edge_flips(outcomes)
    assert (flips.num_items, flips.harmful, flips.beneficial) == (3, 1, 1)


def test_first_difference_is_zero_based_and_detects_an_early_end():
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([1, 2, 3], [1, 5, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
