import re

import pytest

from halfbyte.data import (
    CALIBRATION_FILES,
    EVALUATION_FILES,
    PROSE,
    calibration_documents,
    calibration_text,
    evaluation_documents,
    evaluation_text,
)

NGRAM = 12
KINDS = list(CALIBRATION_FILES)
WRITTEN = [kind for kind in KINDS if kind != PROSE]


def ngrams(text, n):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def calibration(kind):
    return "\n".join(calibration_documents(kind))


def evaluation(kind):
    return "\n".join(evaluation_documents(kind))


def test_there_is_the_same_choice_of_kinds_for_both_uses():
    assert list(EVALUATION_FILES) == KINDS
    assert calibration_text() == calibration(PROSE)
    assert evaluation_text() == evaluation(PROSE)


def test_calibration_and_evaluation_share_no_long_run_of_words():
    all_calibration = set().union(*(ngrams(calibration(kind), NGRAM) for kind in KINDS))
    for kind in KINDS:
        assert not all_calibration & ngrams(evaluation(kind), NGRAM), kind


def test_calibration_and_evaluation_share_no_line_but_common_headings():
    calibration = {line.strip() for line in calibration_text().splitlines()}
    evaluation = {line.strip() for line in evaluation_text().splitlines()}
    shared = calibration & evaluation - {""}
    assert all(re.fullmatch(r"= = [^=]+ = =", line) for line in shared), shared
    assert max(len(line.split()) for line in shared) <= 8


def test_evaluation_text_is_whole_articles():
    text = evaluation_text()
    assert text.startswith(" = Robert Boulter = \n")
    assert len(re.findall(r"(?m)^ = [^=\n]+ = $", text)) == 8
    assert text.endswith(" \n")
    assert len(text.encode()) == 167_033


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [calibration, evaluation])
def test_texts_have_unix_line_ends_and_no_placeholder(read, kind):
    text = read(kind)
    assert "\r" not in text
    assert "<unk>" not in text
    assert "%%" not in text
    assert "\ufffd" not in text


@pytest.mark.parametrize("kind", WRITTEN)
def test_written_kinds_have_many_documents(kind):
    assert len(calibration_documents(kind)) > 15
    assert len(evaluation_documents(kind)) > 8
    assert len(calibration(kind).encode()) > 35_000
    assert all(document.strip() for document in calibration_documents(kind))


def test_languages_are_many():
    scripts = {
        "Cyrillic": "[а-я]{3}",
        "Arabic": "[\u0600-\u06ff]{3}",
        "Devanagari": "[\u0900-\u097f]{3}",
        "Han": "[\u4e00-\u9fff]{3}",
        "Kana": "[\u3040-\u30ff]{3}",
        "Hangul": "[\uac00-\ud7af]{2}",
    }
    text = calibration("languages")
    assert [name for name, letters in scripts.items() if not re.search(letters, text)] == []


def test_calibration_text_is_long_enough_for_the_defaults():
    assert 55_000 < len(calibration_text().split()) < 65_000
