"""Where text leaves the program: results to stdout, everything about the run to stderr.

Both consoles take text literally (no markup, no emoji), so that a path or a tensor shape in square
brackets comes out as it is; styles are given with ``style=``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

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


def print_json(value: Any) -> None:
    """Print a value as indented JSON, for programs to read.

    Args:
        value: Plain values, dataclasses (by ``to_dict`` where they have one) and paths, nested at
            will. Numbers that JSON does not know (infinity, not-a-number) become null.
    """
    sys.stdout.write(json.dumps(_plain(value), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """Turn dataclasses, paths, tuples and non-finite numbers into what JSON can hold."""
    if hasattr(value, "to_dict"):
        return _plain(value.to_dict())
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value
