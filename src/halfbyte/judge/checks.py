"""Checks that grade an answer by its text.

=============  =======================================================================
kind           passes if the answer
=============  =======================================================================
``equals``     equals this text, or one of these, ignoring case, extra spaces and a final period
``contains``   contains this text, or one of these, ignoring case
``regex``      matches this regular expression anywhere
``json``       is JSON, with or without a code fence, and has this value
``json_schema``  is JSON that is valid under this schema (needs the extra ``evaluate``)
``python``     makes the function of this name return true; the user names its file
=============  =======================================================================
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError, require_extra

KINDS = ("equals", "contains", "regex", "json", "json_schema", "python")

PythonCheck = Callable[[str, Mapping[str, Any]], bool]
"""Called with the answer and the item's line; returns whether the answer is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One check: a kind and its argument."""

    kind: str
    value: Any

    def passes(
        self, text: str, line: Mapping[str, Any], functions: Mapping[str, PythonCheck]
    ) -> bool:
        """Return whether an answer passes.

        Args:
            text: The answer.
            line: The item as the user wrote it, for Python functions.
            functions: Python functions by name.

        Returns:
            True if the answer is right.
        """
        match self.kind:
            case "equals":
                return normalize_text(text) in {
                    normalize_text(str(value)) for value in _as_list(self.value)
                }
            case "contains":
                folded = text.casefold()
                return any(str(value).casefold() in folded for value in _as_list(self.value))
            case "regex":
                return re.search(self.value, text) is not None
            case "json":
                found, value = parse_json(text)
                return found and _same_json(value, self.value)
            case "json_schema":
                found, value = parse_json(text)
                return found and _schema_allows(self.value, value)
            case _:
                return bool(functions[self.value](text, line))


def parse_check(value: object, where: str, functions: Mapping[str, PythonCheck]) -> Check:
    """Parse and validate a check from a task file.

    Args:
        value: An object with one key, the kind.
        where: File and line, for messages.
        functions: The Python functions that were loaded.

    Returns:
        The check.

    Raises:
        ConfigError: The kind is unknown or its argument is invalid.
    """
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ConfigError(
            f"{where}: the check is {json.dumps(value)}; it must be an object with one of the keys "
            f"{', '.join(KINDS)}, such as "
            '{"contains": "Paris"}.'
        )
    kind, argument = next(iter(value.items()))
    values = _as_list(argument)
    if kind in ("equals", "contains") and not all(map(_is_plain, values or [None])):
        raise ConfigError(
            f"{where}: {kind} is {json.dumps(argument)}, which cannot be compared with an answer. "
            "Give a string or a list of strings."
        )
    if kind == "contains" and "" in values:
        raise ConfigError(
            f"{where}: contains is an empty string, which every answer contains. Give a text."
        )
    if kind == "regex":
        try:
            re.compile(argument)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"{where}: the regular expression {argument!r} is invalid: {error}."
            ) from error
    if kind == "json_schema":
        _load_validator(argument, where)
    if kind == "python" and (not isinstance(argument, str) or argument not in functions):
        known = ", ".join(sorted(functions)) or "none"
        raise ConfigError(
            f"{where}: there is no check function {argument!r}; loaded are: {known}. Give the file "
            "that defines it with --checks."
        )
    return Check(kind=kind, value=argument)


def load_functions(path: Path | None) -> dict[str, PythonCheck]:
    """Run the user's file of check functions. A task file alone never runs code.

    Args:
        path: A Python file; None: no functions.

    Returns:
        Its public functions by name.

    Raises:
        ConfigError: The file cannot be read or run.
    """
    if path is None:
        return {}
    spec = importlib.util.spec_from_file_location("halfbyte_user_checks", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise ConfigError(f"Cannot read the check functions '{path}': it is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look up their own module there.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"Cannot import the check functions '{path}': {error!r}. Put code that must not run on "
            'import under if __name__ == "__main__".'
        ) from error
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    }


def parse_json(text: str) -> tuple[bool, Any]:
    """Parse an answer as JSON, with or without a code fence around it.

    Args:
        text: The answer.

    Returns:
        Whether it is valid JSON, and its value.
    """
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    body = fenced[1] if fenced else text
    try:
        return True, json.loads(body, parse_constant=_reject_constant)
    except (ValueError, RecursionError):
        return False, None


def normalize_text(text: str) -> str:
    """Fold case, collapse whitespace and remove a final period."""
    return " ".join(text.split()).removesuffix(".").casefold()


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _same_json(left: Any, right: Any) -> bool:
    """Compare two JSON values: true is not 1, but 1 equals 1.0."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_json, left, right))
    return bool(left == right)


def _reject_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _load_validator(schema: Any, where: str) -> Any:
    with require_extra("jsonschema", "evaluate", f"{where}: a json_schema check"):
        import jsonschema
    cls = jsonschema.validators.validator_for(schema)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{where}: the JSON schema is invalid: {error.message}.") from error
    return cls(schema)


def _schema_allows(schema: Any, value: Any) -> bool:
    return bool(_load_validator(schema, "a task").is_valid(value))
