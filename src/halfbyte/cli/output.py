"""Console output: results go to stdout, progress and messages to stderr.

Both consoles print text literally (no markup, no emoji), so that a path or a tensor shape in square
brackets stays unchanged; styles are given with ``style=``.
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


def make_bars() -> Progress:
    """Make a progress bar on stderr, which is hidden if that is not a terminal."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )
    from transformers.utils import logging

    # Transformers' own bar for loading files would interfere.
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
    """Print a value as indented JSON.

    Args:
        value: Plain values, dataclasses (through ``to_dict`` if they have it) and paths, nested at
            will. Infinity and NaN become null.
    """
    sys.stdout.write(json.dumps(to_jsonable(value), indent=2) + "\n")
