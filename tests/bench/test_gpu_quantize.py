"""Tests of measure_gpu_quantize.py with a tiny shape on the CPU."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from halfbyte.quantize import run

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    # Undoes the script's replacement of the meter.
    monkeypatch.setattr(run, "Meter", run.Meter)
    return importlib.import_module("measure_gpu_quantize")


def options(script, tmp_path: Path, *more: str):
    small = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--samples",
        "4",
        "--length",
        "32",
        "--blocks",
        "3",
    ]
    places = ["--folder", str(tmp_path), "--output", str(tmp_path / "found.json")]
    return script.parse([*small, *places, *more])


def test_output_has_blocks_phases_floor_and_profile(script, tmp_path):
    script.measure(options(script, tmp_path, "--profile", "1", "--memory", "auto", "1MB"))
    found = json.loads((tmp_path / "found.json").read_text())
    assert list(found["runs"]) == ["auto", "1MB"]
    for here in found["runs"].values():
        assert here["finished"]
        assert len(here["blocks"]) == 3
        assert here["blocks"][1]["profiled"]
        assert here["blocks"][2]["phases"]["solve"] > 0
        summary = here["summary"]
        assert summary["seconds_full"] > here["seconds"]
        assert summary["flops_per_block"]["forward"] == 2 * 4 * 32 * (64 * 64 * 3 + 64 * 128 * 3)
        assert here["report"]["quality"]["kl_nats"] >= 0
    profiles = {"found-auto.profile.txt", "found-1MB.profile.txt"}
    for name in profiles:
        assert "aten::" in (tmp_path / name).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"found.json", *profiles}


def test_run_that_is_stopped_early_writes_partial_results(script, tmp_path):
    script.measure(options(script, tmp_path, "--limit-seconds", "0"))
    here = json.loads((tmp_path / "found.json").read_text())["runs"]["auto"]
    assert not here["finished"]
    assert "problem" not in here
    assert here["blocks"] == []
