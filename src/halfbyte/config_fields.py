"""Define the fields of config dataclasses, and shared checks of their values.

Each option is defined once: the dataclass field holds its name, type, default and help text, and
the command line is generated from the fields (see :mod:`halfbyte.cli.options`). Fields with the
default None pass every check as None, which means that the option is not set.
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
"""Types of values by a field's annotation, without its brackets; a bool is not accepted as int."""


def option(default: Any, help: str, **extra: Any) -> Any:
    """Create a dataclass field that becomes a command-line option.

    Args:
        default: Default value.
        help: Help text for the command line.
        **extra: Further metadata for :mod:`halfbyte.cli.options`.

    Returns:
        The field.
    """
    return field(default=default, metadata={"help": help, **extra})


def check_keys(cls: Any, values: Mapping[str, Any]) -> None:
    """Check that all keys are fields of a config dataclass.

    Args:
        cls: A config dataclass.
        values: Values by field name.

    Raises:
        ConfigError: A key is not a field; suggests the most similar one.
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
    """Check that every value has the type of its field, which is not certain for values from JSON.

    Args:
        config: An instance of a config dataclass.

    Raises:
        ConfigError: A value has another type.
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


def check_config(value: Any, kind: type) -> None:
    """Check that a config is of a class, and not a dict of its settings.

    Args:
        value: The config; None: not given.
        kind: The class.

    Raises:
        ConfigError: It is something else.
    """
    if value is not None and not isinstance(value, kind):
        name = kind.__name__
        raise ConfigError(
            f"{str(value)[:80]} is a {type(value).__name__}; a {name} is needed. Make one with "
            f"halfbyte.{name}(...)."
        )


def check_least(config: Any, name: str, minimum: int) -> None:
    """Raise a ConfigError unless the value is an integer of at least ``minimum``."""
    value = getattr(config, name)
    if value is not None and (type(value) is not int or value < minimum):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number, {minimum} or more.")


def check_range(config: Any, name: str, low: float, high: float, advice: str) -> None:
    """Raise a ConfigError with advice unless the value is in [low, high]."""
    value = getattr(config, name)
    if not low <= value <= high:
        raise ConfigError(f"{name} is {value}; allowed is {low} to {high}. {advice}")


def check_positive(config: Any, name: str) -> None:
    """Raise a ConfigError unless the value is a finite number above 0."""
    value = getattr(config, name)
    if value is not None and not (type(value) in (int, float) and 0 < value < float("inf")):
        raise ConfigError(f"{name} is {value!r}; it must be a number above 0.")


def check_share(config: Any, name: str, *, above_0: bool = False, below_1: bool = False) -> None:
    """Check that a value is a share, a number from 0 to 1.

    Args:
        config: An instance of a config dataclass.
        name: Name of the field.
        above_0: Whether 0 is excluded.
        below_1: Whether 1 is excluded.

    Raises:
        ConfigError: The value is not in that range.
    """
    value = getattr(config, name)
    if value is None:
        return
    is_share = type(value) in (int, float) and 0 <= value <= 1
    if not is_share or (above_0 and value == 0) or (below_1 and value == 1):
        low = "above 0" if above_0 else "0 or more"
        high = "less than 1" if below_1 else "at most 1"
        raise ConfigError(f"{name} is {value!r}; it must be a share, {low} and {high}.")


def check_choice(config: Any, name: str, allowed: Collection[Any]) -> None:
    """Raise a ConfigError unless the value is in ``allowed``."""
    value = getattr(config, name)
    if value not in allowed:
        raise ConfigError(f"{name} is {value!r}; allowed are {', '.join(map(str, allowed))}.")


def as_sequence(name: str, value: Any) -> list[Any] | tuple[Any, ...]:
    """Return a list or tuple unchanged; raise a ConfigError for anything else."""
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{name} is {value!r}; a list is needed. Put it in square brackets.")
    return value


def check_pattern(kind: str, pattern: str) -> None:
    """Raise a ConfigError unless the pattern is a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"The {kind} pattern '{pattern}' is not a regular expression: {error}. "
            "Escape special characters, or use a plain part of the module name."
        ) from error
