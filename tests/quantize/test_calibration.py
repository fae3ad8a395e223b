"""Loading calibration data of every kind, and rejecting unusable data."""

from __future__ import annotations

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from halfbyte.data import CALIBRATION_FILES, calibration_documents
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.calibration import (
    BUILT_IN,
    CalibrationTokens,
    _count_by_kind,
    check_ids,
    load_calibration,
)

END = 99


class LetterTokenizer:
    """One token per character."""

    eos_token_id: int | None = END
    chat_template: str | None = None

    def __call__(self, text: str, **keywords: Any) -> dict[str, list[int]]:
        assert keywords["add_special_tokens"] is False
        return {"input_ids": [ord(letter) % 90 for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], *, tokenize: bool) -> str:
        assert not tokenize
        return "".join(f"<{m['role']}>{m['content']}" for m in messages)


TOKENIZER = LetterTokenizer()


def ids_of(text: str) -> list[int]:
    return [ord(letter) % 90 for letter in text]


def load(
    source: Any,
    *,
    tokenizer: Any = TOKENIZER,
    longest: int | None = None,
    **settings: Any,
) -> CalibrationTokens:
    config = CalibrationConfig(**{"samples": 4, "length": 8, **settings})
    return load_calibration(source, config, tokenizer, longest)


def lists(tokens: CalibrationTokens) -> list[list[int]]:
    return [sequence.tolist() for sequence in tokens.sequences]


# ── kinds of sources ──────────────────────────────────────────────────────────


def test_text_file_is_cut_into_whole_sequences(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("abcdefghijklmnopqrstuvwxyz" + "é" * 10)
    tokens = load(path)
    whole = ids_of("abcdefghijklmnopqrstuvwxyz" + "é" * 10)
    assert lists(tokens) == [whole[0:8], whole[8:16], whole[16:24], whole[24:32]]
    assert tokens.source == "some.txt"
    assert tokens.notes == ()
    assert tokens.num_tokens == 32
    assert all(sequence.dtype == torch.int64 for sequence in tokens.sequences)


def test_path_may_be_a_string(tmp_path: Path) -> None:
    path = tmp_path / "some.txt"
    path.write_text("abcdefgh" * 4)
    assert lists(load(str(path))) == lists(load(path))


def test_texts_are_joined_by_the_end_of_text_token() -> None:
    assert lists(load(["abc", "defg", "hijklmn"], samples=2)) == [
        [*ids_of("abc"), END, *ids_of("defg")],
        [END, *ids_of("hijklmn")],
    ]


def test_tokenizer_without_an_end_of_text_token() -> None:
    tokenizer = LetterTokenizer()
    tokenizer.eos_token_id = None
    assert lists(load(["abcd", "efgh"], tokenizer=tokenizer, samples=1)) == [ids_of("abcdefgh")]


def test_only_the_needed_part_of_a_long_text_is_tokenized() -> None:
    class Counting(LetterTokenizer):
        seen = 0

        def __call__(self, text: str, **keywords: Any) -> dict[str, list[int]]:
            self.seen += len(text)
            # The tokens at the end of a text differ from those in its middle.
            ids = super().__call__(text, **keywords)["input_ids"]
            return {"input_ids": [*ids[:-3], 1, 1, 1][: len(ids)]}

    lines = [chr(97 + i % 26) * (i % 40) for i in range(20_000)]
    for source in ("\n".join(lines), " ".join(lines)):
        tokenizer = Counting()
        found = load([source, "behind it"], tokenizer=tokenizer, samples=16, length=20)
        assert lists(found) == [ids_of(source[i : i + 20]) for i in range(0, 320, 20)]
        assert tokenizer.seen <= 8 * (320 + 64)
        everything = load([source], tokenizer=tokenizer, samples=16, length=20, seed=3)
        assert tokenizer.seen > len(source)
        assert lists(everything) != lists(found)


def test_long_items_are_tokenized_until_there_are_enough_tokens() -> None:
    items = ["abc", "de" * 500, "fg" * 3000, "never looked at"]
    joined = [*ids_of(items[0]), END, *ids_of(items[1]), END, *ids_of(items[2])]
    found = load(items, samples=20, length=100)
    assert lists(found) == [joined[i : i + 100] for i in range(0, 2000, 100)]


def test_json_lines_of_texts(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"text": "abcd", "other": 1}\n\n{"text": "efg"}\n')
    assert lists(load(path, samples=1)) == [[*ids_of("abcd"), END, *ids_of("efg")]]


def test_other_forms_of_the_same_objects(tmp_path: Path) -> None:
    (tmp_path / "a.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "abcd"}')
    (tmp_path / "a.json").write_text('[{"text": "abcd", "messages": null, "input_ids": null}]')
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfabcd")
    for name in ("a.JSONL", "a.json", "a.txt"):
        assert lists(load(tmp_path / name, samples=1)) == [ids_of("abcd")]
    tokenizer = LetterTokenizer()
    tokenizer.chat_template = "there is one"
    row = {"text": None, "messages": [{"role": "user", "content": "hello"}]}
    (tmp_path / "b.jsonl").write_text(json.dumps(row))
    assert lists(load(tmp_path / "b.jsonl", tokenizer=tokenizer, samples=1)) == [ids_of("<user>he")]


def test_json_lines_of_chats_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = LetterTokenizer()
    tokenizer.chat_template = "there is one"
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello"}]}))
    assert lists(load(path, tokenizer=tokenizer, samples=1)) == [ids_of("<user>he")]
    chat = [{"role": "user", "content": "hello"}]
    assert lists(load([chat], tokenizer=tokenizer, samples=1)) == [ids_of("<user>he")]


def test_json_lines_of_ids_need_no_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"input_ids": [1, 2, 3]}\n{"input_ids": [4, 5]}\n')
    assert lists(load(path, tokenizer=None)) == [[1, 2, 3], [4, 5]]


def test_built_in_text() -> None:
    tokens = load(None, samples=16, length=64)
    assert tokens.source == BUILT_IN
    assert len(tokens.sequences) == 16
    assert {len(sequence) for sequence in tokens.sequences} == {64}


@pytest.mark.parametrize(
    "item",
    [
        [1, 2, 3],
        (1, 2, 3),
        torch.tensor([1, 2, 3]),
        torch.tensor([[1, 2, 3]], dtype=torch.int32),
        np.array([1, 2, 3]),
        np.array([[1, 2, 3]], dtype=np.uint16),
        np.array([1, 2, 3], dtype=np.uint32),
        [[1, 2, 3]],
        {"input_ids": [1, 2, 3]},
        {"input_ids": torch.tensor([[1, 2, 3]])},
        BatchEncoding({"input_ids": torch.tensor([[1, 2, 3]])}),
    ],
    ids=lambda item: type(item).__name__,
)
def test_token_ids_in_every_form(item: Any) -> None:
    assert lists(load([item], tokenizer=None)) == [[1, 2, 3]]


def test_padding_is_left_out_by_the_mask() -> None:
    encoded = BatchEncoding(
        {
            "input_ids": torch.tensor([[1, 2, 3, 0, 0], [0, 4, 5, 6, 7], [8, 9, 8, 9, 8]]),
            "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1], [1, 1, 1, 1, 1]]),
        }
    )
    expected = [[1, 2, 3], [4, 5, 6, 7], [8, 9, 8, 9, 8]]
    assert lists(load([encoded], tokenizer=None)) == expected
    assert lists(load(encoded, tokenizer=None)) == expected, "one item outside a list"


def test_rows_of_a_table_are_sequences_of_their_own() -> None:
    """If joined, the end of one example would become context of the next."""
    ragged = {"input_ids": [[1, 2], [3, 4, 5]], "attention_mask": [[1, 1], [1, 1, 1]]}
    assert lists(load([ragged], tokenizer=None)) == [[1, 2], [3, 4, 5]]
    assert lists(load(torch.tensor([[1, 2], [3, 4]]), tokenizer=None)) == [[1, 2], [3, 4]]


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


# ── refusals ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "The calibration list is empty. Give at least one text"),
        ([[1]], "a list given in Python holds no sequence of 2 tokens or more"),
        (["a"], "holds no sequence of 2 tokens or more"),
        ([""], "holds no sequence of 2 tokens or more"),
        ([[1, 2], "text"], "mixes 1 token id lists with 1 texts. Use one kind"),
        ([["a", "b"]], "an item of type list, which is neither text"),
        ([None], "an item of type NoneType, which is neither text"),
        (5, "an item of type int, which is neither text"),
        ([{"input_ids": "abc"}], "'abc', which are not token ids"),
        ([{"input_ids": None}], "neither text, nor chat messages, nor token ids"),
        ([[1, 2.5]], r"'\[1, 2.5\]', which are not token ids. Give lists of integers"),
        ([torch.tensor([0.25, 0.5, 0.75, 1.0])], "'tensor.*', which are not token ids"),
        ([torch.zeros(2, 2, 2, dtype=torch.int64)], "which are not token ids"),
        (
            [{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}],
            "holds 3 token ids with an attention mask of 2",
        ),
        ([{"input_ids": [1, 2, 3], "labels": [1]}], "holds 3 token ids with labels of 1"),
        ([[{"role": "user", "content": "hi"}]], "the tokenizer has no chat template"),
    ],
    ids=str,
)
def test_unusable_data_is_refused(source: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        load(source)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", " \n", r"Calibration file .*a\.txt is empty. Use a text of several pages"),
        ("a.jsonl", "\n\n", r"Calibration file .*a\.jsonl is empty. Give one object per line"),
        ("a.jsonl", '{"text": "x"}\n{"text"', r"a\.jsonl, line 2 is not JSON"),
        ("a.jsonl", '{"prompt": "x"}', r"a\.jsonl, line 1 has none of 'text', 'messages'"),
        ("a.jsonl", "[1, 2]", r"a\.jsonl, line 1 holds '\[1, 2\]'"),
        ("a.jsonl", '{"text": null}', r"a\.jsonl, line 1 has none of 'text', 'messages'"),
        ("a.ndjson", '{"text": "x"}', r"a\.ndjson has the unknown extension \.ndjson. Use \.jsonl"),
        ("a.jsonl", '{"input_ids": [1, 2]}\n{"text": "x"}', "mixes 1 token id lists with 1 texts"),
    ],
)
def test_unusable_file_is_refused(name: str, text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(CalibrationError, match=message):
        load(tmp_path / name)


def test_missing_and_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"Cannot read calibration file .*nowhere\.txt: No"):
        load(tmp_path / "nowhere.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(CalibrationError, match=r"latin\.txt: 'utf-8' codec .*Give a UTF-8 text"):
        load(tmp_path / "latin.txt")
    with pytest.raises(CalibrationError, match="Cannot read calibration file"):
        load(tmp_path)


def test_text_in_place_of_a_file_is_named_in_short() -> None:
    with pytest.raises(CalibrationError, match=r"in Python, a list of texts\.") as refused:
        load("a whole text " * 1000)
    assert len(str(refused.value)) < 600


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CalibrationError, match="is text, but the model folder has no tokenizer"):
        load(["some text"], tokenizer=None)


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
