"""One reader for files of objects, whoever wrote them and wherever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from halfbyte.errors import DataError
from halfbyte.json_lines import read_json_lines


def read(path: Path) -> list[tuple[int, str, dict[str, object]]]:
    lines = read_json_lines(path, DataError, what="the data", wanted="Give objects.")
    return [(number, where.removeprefix(str(path)), values) for number, where, values in lines]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("start", ["", "\ufeff"], ids=["plain", "bom"])
def test_only_line_ends_end_lines(start: str, end: str, tmp_path: Path) -> None:
    rows = [{"text": f"a{mark}b"} for mark in ("\u2028", "\x85", "\x0c")]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "a.jsonl").write_bytes((start + f"{end}{end}".join(lines) + end).encode())
    found = read(tmp_path / "a.jsonl")
    assert found == [(2 * i + 1, f", line {2 * i + 1}", row) for i, row in enumerate(rows)]


def test_json_file_holds_a_list_or_lines(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2}]')
    assert read(tmp_path / "a.json") == [(1, ", item 1", {"a": 1}), (2, ", item 2", {"a": 2})]
    (tmp_path / "b.JSON").write_text('{"a": 1}\n{"a": 2}\n')
    assert read(tmp_path / "b.JSON") == [(1, ", line 1", {"a": 1}), (2, ", line 2", {"a": 2})]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"a": 1}\n{', r"a\.jsonl, line 2 is not JSON: .*column 2.*\. Give objects"),
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is not JSON: .*recursion"),
        ("a.jsonl", b"[1, 2]", r"a\.jsonl, line 1 holds '\[1, 2\]'\. Give objects"),
        ("a.json", b"[{}, 3]", r"a\.json, item 2 holds '3'"),
        ("a.json", b"[{},\n{]", r"a\.json is not JSON: .* line 2 column 2"),
        ("a.json", b"[]", r"The data .*a\.json is empty\. Give objects"),
        ("a.jsonl", b" \n", r"The data .*a\.jsonl is empty"),
        ("a.jsonl", b"\xff{}", r"Cannot read the data .*a\.jsonl: byte 0 is not UTF-8"),
    ],
)
def test_anything_else_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / name)
