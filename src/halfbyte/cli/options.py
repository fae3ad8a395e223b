"""Command-line options made from a config dataclass, so that each option lives once.

A field with ``help`` in its metadata becomes an option. Further metadata: ``flag`` (where the
option's name is not the field's), ``choices``, ``metavar``, ``both`` (a switch with its opposite).
Any other bool becomes a switch that turns the default over; a tuple becomes an option that may be
given again and again. What is not given on the command line stands in no namespace, so that
something else, such as a preset, may decide it.
"""

from __future__ import annotations

import argparse
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any, TypeVar

from halfbyte.errors import ConfigError
from halfbyte.run_config import DTYPES

Config = TypeVar("Config")

EXACTLY = "float32 on a CPU, as stored elsewhere"
FAST = "on a CPU bfloat16 where that is fast, else float32; as stored elsewhere"
"""What ``--dtype auto`` comes to, for verbs that measure and for verbs that generate."""


def add_computing_arguments(parser: argparse._ActionsContainer, *, auto: str) -> None:
    """Add the options that say in what and where to compute.

    Args:
        parser: The verb's parser, or a group of it.
        auto: What the verb takes by itself: ``EXACTLY`` or ``FAST``.
    """
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help=f"what to compute in (default: auto: {auto})",
    )
    parser.add_argument(
        "--device", default="auto", help="auto, cpu or cuda:N (default: %(default)s)"
    )


def add_dataclass_options(parser: argparse.ArgumentParser, cls: type[Any]) -> None:
    """Add one option per documented field of a config dataclass.

    Args:
        parser: Gets the options, as a group of their own.
        cls: A dataclass whose fields carry ``help`` in their metadata.
    """
    group = parser.add_argument_group(_group_title(cls))
    hints = typing.get_type_hints(cls)
    for option in _option_fields(cls):
        flag = option.metadata.get("flag", "--" + option.name.replace("_", "-"))
        group.add_argument(flag, dest=option.name, **_argument(option, hints[option.name]))


def dataclass_from_args(
    cls: type[Config], args: argparse.Namespace, preset: Mapping[str, Any] | None = None
) -> Config:
    """Make the config that the command line describes.

    Args:
        cls: The dataclass given to :func:`add_dataclass_options`.
        args: What the parser returned.
        preset: Settings that hold where the command line gives no others.

    Returns:
        The config, which has checked itself: a value out of range is its ConfigError.
    """
    return cls(**{**(preset or {}), **given_values(cls, args)})


def given_values(cls: type[Any], args: argparse.Namespace) -> dict[str, Any]:
    """Give what the command line says of a config, and nothing else.

    Args:
        cls: The dataclass given to :func:`add_dataclass_options`.
        args: What the parser returned.

    Returns:
        Values by field.
    """
    names = [option.name for option in _option_fields(cls)]
    given = {name: getattr(args, name) for name in names if hasattr(args, name)}
    # An option that may repeat comes as a list; the config is frozen all the way down.
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _group_title(cls: type[Any]) -> str:
    """Give the first part of the class's docstring: "how weights are rounded"."""
    title = (cls.__doc__ or cls.__name__).partition(".")[0].partition(",")[0]
    return title[:1].lower() + title[1:]


def _option_fields(cls: type[Any]) -> list[Field[Any]]:
    return [option for option in fields(cls) if "help" in option.metadata]


def _argument(option: Field[Any], hint: Any) -> dict[str, Any]:
    """Give the keywords for ``add_argument``."""
    help_text = option.metadata["help"].replace("%", "%%")
    keywords: dict[str, Any] = {"help": help_text, "default": argparse.SUPPRESS}
    if hint is bool:
        action: Any = "store_false" if option.default else "store_true"
        if option.metadata.get("both"):
            action = argparse.BooleanOptionalAction
        return keywords | {"action": action}
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
        keywords["action"] = "append"
    elif option.default is not None:
        keywords["help"] += f" (default: {option.default})"
    for key in ("choices", "metavar"):
        if key in option.metadata:
            keywords[key] = option.metadata[key]
    return keywords | {"type": _converter(hint)}


def _converter(hint: Any) -> Callable[[str], Any]:
    """Give the function that reads one value from the command line."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not types.NoneType)
    parse: Callable[[str], Any] = getattr(hint, "parse", hint)

    def convert(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            # argparse replaces the text of any other ValueError by "invalid value".
            raise argparse.ArgumentTypeError(str(error)) from error

    # argparse names the type in its message: "invalid int value: 'x'".
    convert.__name__ = getattr(hint, "__name__", "value")
    return convert
