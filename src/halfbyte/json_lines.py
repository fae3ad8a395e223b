"""Objects in a file that people or programs wrote: JSON lines, or one list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import HalfbyteError


class JsonLine(NamedTuple):
    """One object, and where it stands."""

    number: int
    """Of its line, or its place in the list; from 1."""
    where: str
    """The same with the file's name, for messages."""
    values: dict[str, Any]


def read_json_lines(
    path: Path, error: type[HalfbyteError], *, what: str, wanted: str
) -> list[JsonLine]:
    """Read a file of objects, one per line; a ``.json`` file may hold one list of them instead.

    Args:
        path: The file, in UTF-8.
        error: What is raised.
        what: What the file is, for messages, such as "the data".
        wanted: A sentence that says what to give, for messages.

    Returns:
        The objects, at least one; empty lines are left out.

    Raises:
        HalfbyteError: As ``error``: the file cannot be read, is empty, or holds something else;
            names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise error(f"Cannot read {what} {path}: {fault.strerror}. {wanted}") from fault
    except UnicodeDecodeError as fault:
        reason = f"byte {fault.start} is not UTF-8"
        raise error(f"Cannot read {what} {path}: {reason}. {wanted}") from fault
    whole = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    # Not splitlines: that also cuts at U+2028 and the like, which may stand in a JSON string.
    lines = [text] if whole else text.split("\n")
    found: list[JsonLine] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        place = str(path) if whole else f"{path}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as fault:
            raise error(f"{place} is not JSON: {fault}. {wanted}") from fault
        for item, row in enumerate(value if whole else [value], start=1):
            where = f"{path}, item {item}" if whole else place
            if not isinstance(row, dict):
                raise error(f"{where} holds {str(row)[:40]!r}. {wanted}")
            found.append(JsonLine(item if whole else number, where, row))
    if not found:
        raise error(f"{what[0].upper()}{what[1:]} {path} is empty. {wanted}")
    return found
