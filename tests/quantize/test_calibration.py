"""Token ids to sequences, batches and weights: how many, how long, which count."""

from __future__ import annotations

import hashlib
import re
import struct
from typing import Any

import pytest
import torch
from tests.helpers.calibration import ids_of, lists, load

from halfbyte.data import CALIBRATION_FILES, calibration_documents
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import (
    CalibrationTokens,
    _count_by_kind,
    check_ids,
    load_calibration,
)

# ── how many, how long ────────────────────────────────────────────────────────

LONG = [[i, i + 1, i + 2, i + 3] for i in range(0, 80, 4)]


def test_first_sequences_are_taken_with_seed_0() -> None:
    assert lists(load(LONG, length=4)) == LONG[:4]


@pytest.mark.parametrize("source", [LONG, ["abcdefghijklmnopqrstuvwxyz" * 4]], ids=["ids", "text"])
def test_other_seeds_choose_randomly_in_the_original_order(source: Any) -> None:
    first = lists(load(source, length=4, samples=6))
    chosen = lists(load(source, length=4, samples=6, seed=3))
    assert chosen != first
    assert chosen == lists(load(source, length=4, samples=6, seed=3))
    assert chosen != lists(load(source, length=4, samples=6, seed=4))
    everything = lists(load(source, length=4, samples=20))
    positions = [everything.index(sequence) for sequence in chosen]
    assert len(set(positions)) == 6 or isinstance(source[0], str)
    if source is LONG:
        assert positions == sorted(positions)


def test_too_little_text_is_noted() -> None:
    tokens = load(["abcdefgh" * 3], samples=9)
    assert len(tokens.sequences) == 3
    assert tokens.notes == ("3 sequences instead of 9: the text holds no more",)


def test_text_shorter_than_a_sequence_is_one_short_sequence() -> None:
    tokens = load(["abc"])
    assert lists(tokens) == [ids_of("abc")]
    assert tokens.notes == ("1 sequence instead of 4: the text holds no more",)


def test_length_is_limited_to_what_the_model_supports() -> None:
    tokens = load(["abcdefgh" * 4], length=100, longest=16, samples=2)
    assert [len(sequence) for sequence in tokens.sequences] == [16, 16]
    assert tokens.notes == ("sequences of 16 tokens instead of 100: the model supports no more",)


def test_truncated_and_dropped_rows_are_noted() -> None:
    tokens = load([list(range(12)), [1], [], [5, 6]], samples=2, tokenizer=None)
    assert lists(tokens) == [[0, 1, 2, 3, 4, 5, 6, 7], [5, 6]]
    assert tokens.notes == (
        "1 of 4 sequences truncated to 8 tokens",
        "2 of 4 sequences left out: fewer than 2 tokens",
    )


# ── batches and digest ────────────────────────────────────────────────────────


def test_batches_never_mix_lengths() -> None:
    sequences = tuple(torch.arange(length) for length in (5, 3, 5, 5, 3, 7))
    batches = CalibrationTokens(sequences=sequences, source="").batches(2)
    assert [tuple(batch.shape) for batch in batches] == [(2, 5), (1, 5), (2, 3), (1, 7)]
    assert sum(batch.numel() for batch in batches) == sum(map(len, sequences))


def digest(*sequences: list[int]) -> str:
    tensors = tuple(torch.tensor(sequence) for sequence in sequences)
    return CalibrationTokens(sequences=tensors, source="").digest


def test_digest_is_the_same_everywhere() -> None:
    """Checkpoints store it, so it must not depend on versions or machines."""
    data = struct.pack("<Q3q", 3, 1, 2, 3) + struct.pack("<Q2q", 2, 4, 5)
    assert digest([1, 2, 3], [4, 5]) == hashlib.sha256(data).hexdigest()


def test_digest_depends_on_lengths_order_and_ids() -> None:
    different = {
        digest([1, 2, 3], [4, 5]),
        digest([1, 2], [3, 4, 5]),
        digest([4, 5], [1, 2, 3]),
        digest([1, 2, 3], [4, 6]),
        digest([1, 2, 3, 4, 5]),
    }
    assert len(different) == 5


@pytest.mark.parametrize(("ids", "found"), [([-1, 5], "-1..5"), ([3, 50], "3..50")])
def test_ids_without_an_embedding_are_refused(ids: list[int], found: str) -> None:
    tokens = CalibrationTokens(sequences=(torch.tensor(ids),), source="ids.jsonl")
    with pytest.raises(
        CalibrationError, match=rf"ids\.jsonl holds token ids {found}; .* embedding has 50 rows"
    ):
        check_ids(tokens, 50)


def test_the_last_id_is_allowed() -> None:
    check_ids(CalibrationTokens(sequences=(torch.tensor([0, 49]),), source=""), 50)


class Letters:
    """A tokenizer of one token per character."""

    eos_token_id = 0

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}


def test_any_stretch_of_the_built_in_text_is_a_mix() -> None:
    def kind_of(sequence: torch.Tensor) -> str:
        text = "".join(map(chr, sequence.tolist())).split("\0")[0]
        return next(
            kind
            for kind in CALIBRATION_FILES
            if any(text in document for document in calibration_documents(kind))
        )

    config = CalibrationConfig(samples=40, length=256)
    found = load_calibration(None, config, Letters(), None)
    kinds = [kind_of(sequence) for sequence in found.sequences]
    assert {kind: kinds.count(kind) for kind in set(kinds)} == {
        "prose": 16,
        "code": 6,
        "dialogue": 6,
        "languages": 6,
        "technical": 6,
    }
    for start in range(0, 40, 10):
        assert len(set(kinds[start : start + 10])) == 5
    other = load_calibration(
        None, CalibrationConfig(samples=40, length=256, seed=1), Letters(), None
    )
    assert other.digest != found.digest
    assert load_calibration(None, config, Letters(), None).digest == found.digest


def test_other_kinds_fill_up_for_exhausted_ones() -> None:
    assert _count_by_kind({"prose": 100, "code": 2, "dialogue": 50}, 60) == {
        "prose": 33,
        "code": 2,
        "dialogue": 25,
    }
    assert _count_by_kind({"prose": 3, "code": 2}, 60) == {"prose": 3, "code": 2}


def test_built_in_text_that_holds_less_is_noted() -> None:
    found = load_calibration(None, CalibrationConfig(samples=10_000), Letters(), None)
    assert re.fullmatch(
        r"\d+ sequences instead of 10000: the text holds no more", " ".join(found.notes)
    )


def test_labels_select_the_predictions_that_count() -> None:
    rows = [
        {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]},
        {"input_ids": [5, 6, 7, 8]},
        {"input_ids": [9, 10, 11], "attention_mask": [0, 1, 1], "labels": [-100, -100, 11]},
    ]
    tokens = load(rows)
    assert lists(tokens) == [[1, 2, 3, 4], [5, 6, 7, 8], [10, 11]]
    weights = tokens.weight_batches(2)
    assert weights is not None
    # A label counts where it is predicted, one token earlier; the three labels together weigh as
    # much as the four tokens without labels.
    assert [w.tolist() for w in weights] == [[[0, 1, 1, 0], [0.75] * 4], [[1, 0]]]
    assert [b.shape for b in tokens.batches(2)] == [w.shape for w in weights]
    assert tokens.digest != load([{"input_ids": row} for row in lists(tokens)]).digest
    assert load([[1, 2, 3]]).weight_batches(2) is None
    # Truncated and dropped tokens lose their labels too.
    cut = load([{"input_ids": [1], "labels": [1]}, *rows], length=3)
    assert cut.counted[0] is not None
    assert cut.counted[0].tolist() == [False, False, True]
