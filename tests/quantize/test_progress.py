from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from halfbyte.quantize import progress as progress_module
from halfbyte.quantize.progress import (
    LiveProgress,
    PlainProgress,
    SilentProgress,
    make_progress,
)


@pytest.fixture
def clock(monkeypatch):
    """Time that stands still until the test moves it."""
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(progress_module, "resident_memory_bytes", lambda: 2_100_000_000)
    return now


def plain() -> tuple[PlainProgress, io.StringIO]:
    out = io.StringIO()
    return PlainProgress(Console(file=out, width=200)), out


def run_two_of_three_blocks(progress, clock, make_module) -> None:
    progress.started(("memory 1.2 GB", "disk 0.1 GB"))
    for block in (0, 1):
        progress.block_started(block, 3)
        clock[0] += 10
        progress.module_done(make_module(f"l.{block}.q", 0.01))
        progress.module_done(make_module(f"l.{block}.down", 0.03))


def test_plain_lines_show_plan_block_worst_module_time_left_and_memory(clock, make_module):
    progress, out = plain()
    run_two_of_three_blocks(progress, clock, make_module)
    progress.phase("saving")
    assert out.getvalue().splitlines() == [
        "memory 1.2 GB",
        "disk 0.1 GB",
        "block 1 of 3: 2 modules, worst down 0.03, 10.0 s, 2.1 GB, 20.0 s left",
        "block 2 of 3: 2 modules, worst down 0.03, 10.0 s, 2.1 GB, 10.0 s left",
        "saving (20.0 s)",
    ]


def test_last_block_and_head_are_printed_by_finished(clock, make_module):
    progress, out = plain()
    for block, seconds in ((1, 10), (2, 5)):
        progress.block_started(block, 3)
        clock[0] += seconds
        progress.module_done(make_module(f"l.{block}.q"))
    progress.phase("training")
    clock[0] += 30
    progress.phase("quantizing the head")
    clock[0] += 2
    progress.module_done(make_module("lm_head"))
    progress.finished()
    assert out.getvalue().splitlines()[1:] == [
        "block 3 of 3: 1 modules, worst q 0.01, 5.0 s, 2.1 GB",
        "training (15.0 s)",
        "quantizing the head (45.0 s)",
        "head: 1 modules, worst lm_head 0.01, 2.0 s, 2.1 GB",
    ]


def test_fallback_is_printed_immediately_by_module(clock, make_module):
    progress, out = plain()
    progress.module_done(make_module("l.0.q", notes=("damping raised to 0.1",)))
    assert out.getvalue() == "l.0.q: damping raised to 0.1\n"


def test_same_fallback_of_the_next_block_is_not_repeated(clock, make_module):
    progress, out = plain()
    for name, note in (("l.0.q", "raised"), ("l.1.q", "raised"), ("l.1.q", "other")):
        progress.module_done(make_module(name, notes=(note,)))
    assert out.getvalue().splitlines() == ["l.0.q: raised", "l.1.q: other"]


def test_time_left_of_a_resumed_run_counts_its_own_blocks_only(clock, make_module):
    progress, out = plain()
    progress.block_started(20, 30)
    clock[0] += 4
    progress.module_done(make_module("l.20.q"))
    progress.block_started(21, 30)
    clock[0] += 4
    progress.module_done(make_module("l.21.q"))
    progress.finished()
    first, second = out.getvalue().splitlines()
    assert first.endswith("36.0 s left"), "9 blocks of 4 s"
    assert second.endswith("32.0 s left"), "8 blocks of 4 s"


def test_live_display_shows_block_module_error_times_and_memory(clock, make_module):
    out = io.StringIO()
    console = Console(file=out, width=120, force_terminal=True)
    progress = LiveProgress(console)
    run_two_of_three_blocks(progress, clock, make_module)
    progress.phase("quantizing")
    console.print(progress.render())
    progress.finished()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    for words in (
        *("memory 1.2 GB", "block 2 of 3", "quantizing", "down", "relative error 0.03"),
        *("20.0 s elapsed", "10.0 s left", "2.1 GB"),
    ):
        assert words in text


def test_live_display_shows_training_until_the_next_phase(clock, make_module):
    progress = LiveProgress(Console(file=io.StringIO(), width=120, force_terminal=True))
    run_two_of_three_blocks(progress, clock, make_module)

    def shown() -> str:
        out = io.StringIO()
        Console(file=out, width=120).print(progress.render())
        return out.getvalue()

    progress.phase("training scales")
    progress.tuned(40, 120, 0.2, 0.1)
    for words in ("step 40 of 120", "training scales", "KL 0.2000, best 0.1000", "Ctrl-C"):
        assert words in shown()
    progress.phase("measuring quality")
    assert "measuring quality" in shown()
    assert "Ctrl-C" not in shown(), "it would end the run now"
    progress.finished()


def test_live_display_begins_with_the_first_phase(clock):
    out = io.StringIO()
    progress = LiveProgress(Console(file=out, width=120, force_terminal=True, highlight=False))
    progress.phase("generating calibration text with the model: 16 of 128")
    assert "generating calibration text with the model: 16 of 128" in out.getvalue()
    progress.started(("memory 1.2 GB",))
    progress.finished()
    assert "memory 1.2 GB" in out.getvalue()


def test_live_display_keeps_fallbacks(clock, make_module):
    out = io.StringIO()
    progress = LiveProgress(Console(file=out, width=120, force_terminal=True, highlight=False))
    progress.started(())
    progress.module_done(make_module("l.0.q", notes=("float64 retry",)))
    progress.finished()
    assert "l.0.q: float64 retry" in out.getvalue()


@pytest.mark.parametrize(("terminal", "kind"), [(True, LiveProgress), (False, PlainProgress)])
def test_display_follows_the_console(terminal, kind):
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert isinstance(make_progress(console), kind)


def test_silent_progress_prints_nothing(capsys, make_module):
    progress = SilentProgress()
    progress.started(("plan",))
    progress.phase("p")
    progress.block_started(0, 1)
    progress.module_done(make_module("l.0.q", notes=("n",)))
    progress.finished()
    assert capsys.readouterr() == ("", "")
