from __future__ import annotations

import io

import pytest
from rich.console import Console

from halfbyte.judge import progress as module
from halfbyte.judge.progress import PlainProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test sets, in seconds."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_at_stage_boundaries_and_every_30_seconds_within_a_stage(clock):
    out = io.StringIO()
    progress = PlainProgress(Console(file=out, width=160))
    for seconds, stage, done, total in (
        (0, "base: loading", 0, 1),
        (5, "base: tasks", 20, 300),
        (20, "base: tasks", 60, 300),
        (35, "base: tasks", 80, 300),
        (50, "base: tasks", 100, 300),
        (64, "base: tasks", 299, 300),
        (66, "base: tasks", 300, 300),
        (67, "candidate: loading", 0, 1),
    ):
        clock[0] = 100.0 + seconds
        progress(stage, done, total)
    assert out.getvalue().splitlines() == [
        "base: loading (0.0 s elapsed)",
        "base: tasks, 20 of 300 (5.0 s elapsed)",
        # 60 items in 30 seconds; the first 20 came from an earlier run.
        "base: tasks, 80 of 300 (35.0 s elapsed, 1 min 50 s left in this stage)",
        "base: tasks, 300 of 300 (1 min 6 s elapsed)",
        "candidate: loading (1 min 7 s elapsed)",
    ]
