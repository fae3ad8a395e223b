import re

import pytest

from halfbyte.data import calibration_text, evaluation_text

NGRAM = 12


def ngrams(text, n):
    words = text.split()
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}


def test_calibration_and_evaluation_share_no_long_run_of_words():
    assert not ngrams(calibration_text(), NGRAM) & ngrams(evaluation_text(), NGRAM)


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


@pytest.mark.parametrize("text", [calibration_text(), evaluation_text()])
def test_texts_have_unix_line_ends_and_no_placeholder(text):
    assert "\r" not in text
    assert "<unk>" not in text


def test_calibration_text_is_long_enough_for_the_defaults():
    assert 55_000 < len(calibration_text().split()) < 65_000
