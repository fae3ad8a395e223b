"""Console output: results go to stdout, progress and messages to stderr.

Both consoles print text literally (no markup, no emoji), so that a path or a tensor shape in square
brackets stays unchanged; styles are given with ``style=``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console

from halfbyte.jsonable import to_jsonable

if TYPE_CHECKING:
    from rich.progress import Progress as Bars

    from halfbyte.judge.progress import Progress

PLAIN_WIDTH = 160
"""Columns of tables that are written to a file or a pipe, which has no width."""


def make_console(*, stderr: bool = False) -> Console:
    """Make a console; its output is plain and wide if it is not a terminal.

    Args:
        stderr: Write to stderr instead of stdout.

    Returns:
        The console; it follows a later replacement of ``sys.stdout`` or ``sys.stderr``.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, markup=False, emoji=False, highlight=False)


console = make_console()
err_console = make_console(stderr=True)


@contextmanager
def show_progress() -> Iterator[Progress]:
    """Show progress on stderr: one bar per stage on a terminal, plain lines elsewhere.

    Yields:
        A function to call with the stage and with (done, total) within it.
    """
    from transformers.utils import logging

    from halfbyte.judge.progress import PlainProgress

    # Transformers' own bar for loading files would interfere.
    logging.disable_progress_bar()
    if not err_console.is_terminal:
        yield PlainProgress(err_console)
        return
    bars = _make_bars()
    stages: dict[str, Any] = {}

    def update_bar(stage: str, done: int, total: int) -> None:
        if stage not in stages:
            for earlier in stages.values():
                bars.stop_task(earlier)
            stages[stage] = bars.add_task(stage, total=total)
        bars.update(stages[stage], completed=done, total=total)

    with bars:
        yield update_bar


def _make_bars() -> Bars:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bars

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err_console,
        transient=True,
    )


def print_json(value: Any) -> None:
    """Print a value as indented JSON.

    Args:
        value: Plain values, dataclasses (through ``to_dict`` if they have it) and paths, nested at
            will. Infinity and NaN become null.
    """
    sys.stdout.write(json.dumps(to_jsonable(value), indent=2) + "\n")
