"""Fields of the config dataclasses that command lines are made from, and the checks they share.

Each option lives once: its name, type, default, range and help text are the dataclass field, and
the command line is made from the fields (see :mod:`halfbyte.cli.options`). Where None is a field's
default it passes every check: nothing is asked for.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from typing import Any

from halfbyte.errors import ConfigError

_TYPES: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (float, int),
    "bool": (bool,),
    "str": (str,),
    "tuple": (tuple,),
}
"""What a field's annotation allows, whatever is in its brackets; True is no int here."""


def option(default: Any, help: str, **extra: Any) -> Any:
    """Make a field that becomes an option.

    Args:
        default: Its default.
        help: For the command line.
        **extra: Further metadata, which :mod:`halfbyte.cli.options` reads.

    Returns:
        The field.
    """
    return field(default=default, metadata={"help": help, **extra})


def check_keys(cls: Any, values: Mapping[str, Any]) -> None:
    """Refuse a key that is no field, with the one that was probably meant.

    Args:
        cls: A config dataclass.
        values: By field.

    Raises:
        ConfigError: There is such a key.
    """
    allowed = [entry.name for entry in fields(cls)]
    for key in values:
        if key not in allowed:
            close = difflib.get_close_matches(key, allowed, n=1)
            hint = f"Did you mean '{close[0]}'? " if close else ""
            raise ConfigError(
                f"Unknown setting '{key}' for {cls.__name__}. {hint}Allowed: {', '.join(allowed)}."
            )


def check_types(config: Any) -> None:
    """Refuse a value of another type than its field's, as JSON may give one.

    Args:
        config: A config dataclass.

    Raises:
        ConfigError: There is such a value.
    """
    for entry in fields(config):
        value = getattr(config, entry.name)
        annotation = str(entry.type)
        allowed = _TYPES[annotation.removesuffix(" | None").partition("[")[0]]
        if type(value) not in allowed and not (value is None and annotation.endswith(" | None")):
            wanted = " or ".join(kind.__name__ for kind in allowed)
            raise ConfigError(
                f"{entry.name} is {value!r}, a {type(value).__name__}; {wanted} is needed."
            )


def check_least(config: Any, name: str, least: int) -> None:
    """Refuse anything but a whole number from ``least`` on, with a ConfigError."""
    value = getattr(config, name)
    if value is not None and (type(value) is not int or value < least):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {least} or more.")


def check_range(config: Any, name: str, least: float, most: float, advice: str) -> None:
    """Refuse a number outside a range, both ends allowed, with a ConfigError that gives advice."""
    value = getattr(config, name)
    if not least <= value <= most:
        raise ConfigError(f"{name} is {value}; allowed is {least} to {most}. {advice}")


def check_positive(config: Any, name: str) -> None:
    """Refuse anything but a finite number above 0, with a ConfigError."""
    value = getattr(config, name)
    if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0.")


def check_share(config: Any, name: str, *, above_0: bool = False, below_1: bool = False) -> None:
    """Refuse anything but a share.

    Args:
        config: A config dataclass.
        name: Of the field.
        above_0: Whether 0 is none.
        below_1: Whether 1 is none.

    Raises:
        ConfigError: It is no such number.
    """
    value = getattr(config, name)
    if value is None:
        return
    is_share = type(value) in (int, float) and 0 <= value <= 1
    if not is_share or (above_0 and value == 0) or (below_1 and value == 1):
        least = "above 0" if above_0 else "0 or more"
        most = "less than 1" if below_1 else "at most 1"
        raise ConfigError(f"{name} is {value!r}; it must be a share, {least} and {most}.")


def check_choice(config: Any, name: str, allowed: Collection[Any]) -> None:
    """Refuse anything that is not among ``allowed``, with a ConfigError."""
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}.")


def as_sequence(name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    """Give a list or tuple as it is; anything else is a ConfigError."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is {value!r}; a list is needed. Put it in square brackets.")
    return value


def check_pattern(kind: str, pattern: str) -> None:
    """Refuse what is no regular expression, with a ConfigError."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"The {kind} pattern '{pattern}' is not a regular expression: {error}. "
            "Escape special characters, or use a plain part of the module name."
        ) from error
