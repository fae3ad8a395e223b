"""Read JSON objects from a file: JSON lines, or a single JSON list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from halfbyte.errors import HalfbyteError


class JsonLine(NamedTuple):
    """One JSON object and its position in the file."""

    number: int
    """Line number, or position in the list; from 1."""
    where: str
    """File name and position, for messages."""
    values: dict[str, Any]


def read_json_lines(
    path: Path, error: type[HalfbyteError], *, what: str, wanted: str
) -> list[JsonLine]:
    """Read a file with one JSON object per line, or a ``.json`` file with a list of objects.

    Args:
        path: The file, in UTF-8.
        error: Type of the exception to raise.
        what: Name of the file's content in messages, such as "the data".
        wanted: Sentence appended to messages that says what is expected.

    Returns:
        The objects, at least one. Empty lines are skipped.

    Raises:
        HalfbyteError: Of type ``error``: the file cannot be read, is empty, or contains something
            other than objects; names the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise error(f"Cannot read {what} {path}: {fault.strerror}. {wanted}") from fault
    except UnicodeDecodeError as fault:
        reason = f"byte {fault.start} is not UTF-8"
        raise error(f"Cannot read {what} {path}: {reason}. {wanted}") from fault
    whole = path.suffix.lower() == ".json" and text.lstrip().startswith("[")
    # Not splitlines(), which also splits at U+2028 and the like; JSON strings may contain those.
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
