"""Write a comparison down in every form that somebody reads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.errors import ConfigError
from halfbyte.jsonable import to_jsonable
from halfbyte.judge.comparison import Comparison
from halfbyte.judge.report_html import write_html
from halfbyte.judge.report_text import write_junit, write_markdown


def write_json(comparison: Comparison) -> str:
    """Write a comparison as JSON, complete.

    Args:
        comparison: The result.

    Returns:
        Indented JSON; infinity and not-a-number become null.
    """
    return json.dumps(to_jsonable(comparison), indent=2, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, tuple[str, Callable[[Comparison], str]]] = {
    "html": ("report.html", write_html),
    "json": ("report.json", write_json),
    "md": ("report.md", write_markdown),
    "junit": ("junit.xml", write_junit),
}
"""Name -> file and writer."""


def make_folder(folder: Path) -> None:
    """Make the folder of a report where it is missing.

    Args:
        folder: Which.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"Cannot make the folder '{folder}': {error.strerror}.") from error


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write all forms of a comparison into a folder.

    Args:
        comparison: The result.
        folder: Made where it is missing.

    Returns:
        The files.
    """
    make_folder(folder)
    paths = []
    for name, (file, _) in FORMATS.items():
        write_atomically(folder / file, [render(comparison, name).encode()])
        paths.append(folder / file)
    return paths


def render(comparison: Comparison, name: str) -> str:
    """Write a comparison in one form.

    Args:
        comparison: The result.
        name: A key of ``FORMATS``.

    Returns:
        Text that every encoding can hold: a lone surrogate, which a model may write, is replaced.
    """
    text = FORMATS[name][1](comparison)
    return text.encode("utf-8", "replace").decode()
