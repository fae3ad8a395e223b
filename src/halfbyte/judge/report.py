"""Writes a comparison in all report formats."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from halfbyte.checkpoint.atomic import write_atomically
from halfbyte.checkpoint.output_folder import check_outside
from halfbyte.errors import ConfigError
from halfbyte.jsonable import to_jsonable
from halfbyte.judge.comparison import Comparison
from halfbyte.judge.remote_model import is_address
from halfbyte.judge.report_html import write_html
from halfbyte.judge.report_text import write_junit, write_markdown


def write_json(comparison: Comparison) -> str:
    """Write a comparison as JSON, with all its data.

    Args:
        comparison: The result.

    Returns:
        Indented JSON; infinity and NaN become null.
    """
    return json.dumps(to_jsonable(comparison), indent=2, ensure_ascii=False) + "\n"


FORMATS: Mapping[str, tuple[str, Callable[[Comparison], str]]] = {
    "html": ("report.html", write_html),
    "json": ("report.json", write_json),
    "md": ("report.md", write_markdown),
    "junit": ("junit.xml", write_junit),
}
"""Format -> file name and writer."""


@contextmanager
def report_folder(folder: Path, *models: str | Path) -> Iterator[None]:
    """Create the folder of a report, and remove it again if there will be no report.

    Args:
        folder: The folder.
        *models: The models that the report is about; addresses of servers are left out.

    Yields:
        While the folder exists.
    """
    check_outside(folder, *(Path(model) for model in models if not is_address(str(model))))
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        create_folder(folder)
        yield
    except BaseException:
        for path in created:
            with suppress(OSError):  # not empty
                path.rmdir()
        raise


def create_folder(folder: Path) -> None:
    """Create the folder of a report, unless it exists.

    Args:
        folder: The folder.

    Raises:
        ConfigError: It cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"Cannot create the report folder '{folder}': {error.strerror}. Choose another one."
        ) from error


def write_report(comparison: Comparison, folder: Path) -> list[Path]:
    """Write a comparison in all formats into a folder.

    Args:
        comparison: The result.
        folder: Created unless it exists.

    Returns:
        Paths of the files.
    """
    create_folder(folder)
    paths = []
    for name, (file, _) in FORMATS.items():
        write_atomically(folder / file, [render(comparison, name).encode()])
        paths.append(folder / file)
    return paths


def render(comparison: Comparison, name: str) -> str:
    """Write a comparison in one format.

    Args:
        comparison: The result.
        name: A key of ``FORMATS``.

    Returns:
        The text; a lone surrogate, which a model may generate, is replaced by "?".
    """
    text = FORMATS[name][1](comparison)
    return text.encode("utf-8", "replace").decode()
