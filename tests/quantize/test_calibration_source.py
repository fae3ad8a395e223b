"""Loading calibration data of every kind, and rejecting unusable data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.calibration import END, LetterTokenizer, ids_of, lists, load
from transformers import BatchEncoding

from halfbyte.errors import CalibrationError
from halfbyte.quantize.calibration import BUILT_IN

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
