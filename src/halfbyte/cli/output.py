"""Where text leaves the program: results to stdout, everything about the run to stderr.

Both consoles take text literally (no markup, no emoji), so that a path or a tensor shape in square
brackets comes out as it is; styles are given with ``style=``.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console

from halfbyte.jsonable import to_jsonable

if TYPE_CHECKING:
    from rich.progress import Progress

PLAIN_WIDTH = 160
"""Columns for tables where the output is a file or a pipe, which has no width of its own."""


def make_console(*, stderr: bool = False) -> Console:
    """Make a console that is plain and wide where it does not write to a terminal.

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


def make_bars() -> Progress:
    """Make bars of steps done, shown on stderr while that is a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from transformers.utils import logging

    # Its bar for reading a file would come in between.
    logging.disable_progress_bar()
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err_console,
        disable=not err_console.is_terminal,
        transient=True,
    )


def print_json(value: Any) -> None:
    """Print a value as indented JSON, for programs to read.

    Args:
        value: Plain values, dataclasses (by ``to_dict`` where they have one) and paths, nested at
            will. Numbers that JSON does not know (infinity, not-a-number) become null.
    """
    sys.stdout.write(json.dumps(to_jsonable(value), indent=2) + "\n")
