"""Is an answer right? Checks as data, and how each is applied to the text of an answer.

=============  =======================================================================
kind           right where the answer
=============  =======================================================================
``equals``     is this text, or one of these, but for case, space and a full stop at its end
``contains``   has this text in it, or one of these, whatever the case
``regex``      has a match of this pattern
``json``       is JSON (perhaps in a code fence) of this value
``json_schema``  is JSON that this schema allows (needs the extra ``evaluate``)
``python``     makes the function of this name true; it comes from a file that the user names
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
"""Called with the answer and the item's line; says whether it is right."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One way of telling a right answer."""

    kind: str
    value: Any

    def passes(
        self, text: str, line: Mapping[str, Any], functions: Mapping[str, PythonCheck]
    ) -> bool:
        """Tell whether an answer is right.

        Args:
            text: The answer.
            line: The item as the user wrote it, for Python functions.
            functions: Python functions by name.

        Returns:
            Whether it is.
        """
        match self.kind:
            case "equals":
                return tidy(text) in {tidy(str(value)) for value in _as_list(self.value)}
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
    """Read a check as it stands in a task file.

    Args:
        value: An object of one key, the kind.
        where: File and line, for messages.
        functions: Python functions that were loaded.

    Returns:
        The check.

    Raises:
        ConfigError: The kind is none of these, or its value cannot be used.
    """
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in KINDS:
        raise ConfigError(
            f"{where}: the check is {json.dumps(value)}; write one of {', '.join(KINDS)}, such as "
            '{"contains": "Paris"}.'
        )
    kind, argument = next(iter(value.items()))
    values = _as_list(argument)
    if kind in ("equals", "contains") and not all(map(_is_plain, values or [None])):
        raise ConfigError(
            f"{where}: {kind} is {json.dumps(argument)}, which no answer can be held against. "
            "Write a text, or a list of texts."
        )
    if kind == "contains" and "" in values:
        raise ConfigError(f"{where}: contains is an empty text, which every answer has in it.")
    if kind == "regex":
        try:
            re.compile(argument)
        except (re.error, TypeError) as error:
            raise ConfigError(
                f"{where}: the pattern {argument!r} is not valid: {error}."
            ) from error
    if kind == "json_schema":
        _load_validator(argument, where)
    if kind == "python" and (not isinstance(argument, str) or argument not in functions):
        known = ", ".join(sorted(functions)) or "none were loaded"
        raise ConfigError(
            f"{where}: there is no check function {argument!r} ({known}). Name the file that "
            "defines it with --checks."
        )
    return Check(kind=kind, value=argument)


def load_functions(path: Path | None) -> dict[str, PythonCheck]:
    """Run the user's file of check functions; a task file alone never runs code.

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
        raise ConfigError(f"Cannot read the check functions '{path}': it is no Python file.")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their own module up there.
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise ConfigError(
            f"Cannot run the check functions '{path}': {error!r}. What is to run only as a program "
            'stands under if __name__ == "__main__".'
        ) from error
    return {
        name: value
        for name, value in vars(module).items()
        if callable(value) and not name.startswith("_")
    }


def parse_json(text: str) -> tuple[bool, Any]:
    """Read an answer as JSON, with or without a code fence around it.

    Args:
        text: The answer.

    Returns:
        Whether it is JSON, and its value.
    """
    fenced = re.search(r"```(?:json)?\s*\n(.*?)```", text, re.DOTALL)
    body = fenced[1] if fenced else text
    try:
        return True, json.loads(body, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        return False, None


def tidy(text: str) -> str:
    """Give a text without case, outer space and closing full stop, runs of space as one."""
    return " ".join(text.split()).removesuffix(".").casefold()


def _is_plain(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _same_json(left: Any, right: Any) -> bool:
    """Compare as JSON does: true is not 1, but 1 is 1.0."""
    if isinstance(left, bool) or isinstance(right, bool):
        return left is right
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same_json(left[k], right[k]) for k in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_same_json, left, right))
    return bool(left == right)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _load_validator(schema: Any, where: str) -> Any:
    with require_extra("jsonschema", "evaluate", f"{where}: a json_schema check"):
        import jsonschema
    cls = jsonschema.validators.validator_for(schema)
    try:
        cls.check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ConfigError(f"{where}: the JSON schema is not valid: {error.message}.") from error
    return cls(schema)


def _schema_allows(schema: Any, value: Any) -> bool:
    return bool(_load_validator(schema, "a task").is_valid(value))
