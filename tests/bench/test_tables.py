from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tables():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "bench" / "tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


RESULT = {
    "columns": ["tool", "KL"],
    "rows": [["ours", 0.123456], ["theirs", 2345.6], ["n", 7]],
    "note": "On a text.",
    "command": "python bench/measure_x.py",
    "commit": "abc1234",
    "date": "2026-11-25",
    "machine": {"cores": "2"},
    "versions": {"torch": "2.13.0"},
}


def test_block_is_filled_and_the_text_around_it_kept(tables, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    text = "before\n<!-- bench x -->\nold\n<!-- end bench -->\nafter\n"
    assert tables.fill(text, tmp_path) == (
        "before\n<!-- bench x -->\n"
        "| tool | KL |\n|---|---|\n| ours | 0.1235 |\n| theirs | 2346 |\n| n | 7 |\n\n"
        "On a text. (`python bench/measure_x.py` at abc1234, 2026-11-25; cores 2, torch 2.13.0)\n"
        "<!-- end bench -->\nafter\n"
    )


def test_excerpt_has_the_named_columns_and_rows_in_that_order(tables, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps(RESULT | {"columns": ["tool", "KL, nats"]}))
    text = "<!-- bench x; columns: KL, nats | tool; rows: n | ours -->\n<!-- end bench -->"
    lines = tables.fill(text, tmp_path).splitlines()
    assert lines[1:5] == ["| KL, nats | tool |", "|---|---|", "| 7 | n |", "| 0.1235 | ours |"]


@pytest.mark.parametrize("choice", ["columns: tool | PPL", "rows: ours | nobody's"])
def test_excerpt_of_what_is_not_there_fails(tables, tmp_path, choice):
    (tmp_path / "x.json").write_text(json.dumps(RESULT))
    with pytest.raises((KeyError, ValueError), match=r"PPL|nobody"):
        tables.fill(f"<!-- bench x; {choice} -->\n<!-- end bench -->", tmp_path)


def test_block_without_a_result_says_which_script_makes_it(tables, tmp_path):
    text = "<!-- bench flat-memory -->\n| made up | 1 |\n<!-- end bench -->"
    filled = tables.fill(text, tmp_path)
    assert "made up" not in filled
    assert "Not measured yet: `bench/measure_flat_memory.py`." in filled


def test_tables_in_the_pages_are_those_of_the_results(tables, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["tables.py", "--check"])
    assert tables.main() == 0, capsys.readouterr().err
