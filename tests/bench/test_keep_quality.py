"""Tests of keep_quality.py: joins runs of equal settings, refuses others."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"
SETTINGS = "4 bits; base 20.1"


@pytest.fixture
def script(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(BENCH))
    monkeypatch.setattr(importlib.import_module("record"), "RESULTS", tmp_path / "kept")
    return importlib.import_module("keep_quality")


def write_run(path: Path, script, rows: dict[str, float], settings: str = SETTINGS) -> str:
    numbers = len(script.COLUMNS) - 1
    run = {
        "date": "2026-11-27",
        "commit": "abc",
        "command": "python bench/measure_quality.py",
        "machine": {"system": "x"},
        "versions": {"torch": "y"},
        "columns": ["tool", *script.COLUMNS],
        "rows": [[name, kl, *[0] * numbers] for name, kl in rows.items()],
        "note": f"{settings}{script.RAGGED}{script.PLACE}cpu, 1 threads",
        "data": {"results": {}},
    }
    path.write_text(json.dumps(run))
    return str(path)


def keep(script, monkeypatch, *words: str):
    monkeypatch.setattr("sys.argv", ["keep_quality.py", "joined", *words, "--commit", "abc"])
    script.main()
    return json.loads((script.save_result.__globals__["RESULTS"] / "joined.json").read_text())


def test_later_rows_take_precedence_and_are_in_the_order_of_cases(script, monkeypatch, tmp_path):
    first = write_run(
        tmp_path / "a.json",
        script,
        {
            "AutoRound, group 128": 3,
            "halfbyte best, group 128, 60 of 120 steps": 2,
            "halfbyte fast, group 128": 9,
        },
    )
    second = write_run(
        tmp_path / "b.json",
        script,
        {"halfbyte fast, group 128": 1, "halfbyte fast, group 128, rotated": 4},
    )
    joined = keep(script, monkeypatch, first, second)
    assert [row[:2] for row in joined["rows"]] == [
        ["halfbyte fast, group 128", 1],
        ["halfbyte best, group 128, 60 of 120 steps", 2],
        ["halfbyte fast, group 128, rotated", 4],
        ["AutoRound, group 128", 3],
    ]
    assert {row[-1] for row in joined["rows"]} == {"CPU"}
    assert "AutoRound with its default of 200 iterations" in joined["note"]
    assert script.RAGGED in joined["note"]
    again = keep(script, monkeypatch, str(tmp_path / "kept" / "joined.json"))
    assert again["rows"] == joined["rows"]


def test_note_mentions_only_what_rows_have(script, monkeypatch, tmp_path):
    path = write_run(tmp_path / "a.json", script, {"halfbyte fast, group 64": 1})
    joined = keep(script, monkeypatch, path)
    assert script.RAGGED not in joined["note"]
    assert "AutoRound" not in joined["note"]
    left = keep(script, monkeypatch, path, "--without", "group 64")
    assert left["rows"] == []


def test_runs_with_different_settings_are_refused(script, monkeypatch, tmp_path):
    first = write_run(tmp_path / "a.json", script, {"halfbyte fast, group 128": 1})
    second = write_run(tmp_path / "b.json", script, {"AutoRound, group 128": 2}, "3 bits")
    with pytest.raises(
        SystemExit,
        match=r"^Cannot join runs that differ in their settings:\n3 bits\n4 bits; base 20\.1",
    ):
        keep(script, monkeypatch, first, second)
