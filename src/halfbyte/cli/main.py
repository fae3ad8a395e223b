"""Entry point of the `halfbyte` command: dispatches to a verb and maps errors to exit codes.

A verb is a module with ``HELP``, ``add_arguments(parser)`` and ``run(args) -> int``. Only the
module that is needed is imported, and it imports torch only inside ``run``, so that help is fast.

Exit codes: 0 success; 1 failure; 2 invalid option or setting; 130 interrupted. A verb that gives
its exit codes another meaning defines ``EXIT_ERROR``, which replaces 1 and 2.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import io
import os
import sys
import traceback
from collections.abc import Sequence
from typing import Any, Protocol, cast

from halfbyte.cli.output import err_console
from halfbyte.environment import VARIABLES, read_variable
from halfbyte.errors import ConfigError, HalfbyteError
from halfbyte.machine.threads import configure_threads
from halfbyte.version import __version__

VERBS = {
    "quantize": "halfbyte.cli.quantize",
    "calibration": "halfbyte.cli.calibration",
    "rotate": "halfbyte.cli.rotate",
    "check": "halfbyte.cli.check",
    "convert": "halfbyte.cli.convert",
    "store": "halfbyte.cli.store",
    "perplexity": "halfbyte.cli.perplexity",
    "divergence": "halfbyte.cli.divergence",
    "generate": "halfbyte.cli.generate",
    "chat": "halfbyte.cli.chat",
    "serve": "halfbyte.cli.serve",
    "serve calibrate": "halfbyte.cli.serve_calibrate",
    "bench": "halfbyte.cli.bench",
    "compare": "halfbyte.cli.compare",
    "plan": "halfbyte.cli.plan",
    "profile": "halfbyte.cli.profile",
    "finetune": "halfbyte.cli.finetune",
    "merge": "halfbyte.cli.merge",
    "repair": "halfbyte.cli.repair",
    "doctor": "halfbyte.cli.doctor",
    "sample-model": "halfbyte.cli.sample_model",
    "demo": "halfbyte.cli.demo",
}
"""Verb -> module, in the order of the help text."""

EXIT_FAILURE = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 130


class Verb(Protocol):
    """Interface of a verb's module."""

    HELP: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the verb's options."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the verb and return the exit code."""


def load_verb(name: str) -> Verb:
    """Import the module of a verb."""
    return cast(Verb, importlib.import_module(VERBS[name]))


class Parser(argparse.ArgumentParser):
    """A parser that reports unknown options with the verb's own usage and a suggestion.

    argparse leaves unknown options to the outermost parser, which shows only its own usage.
    """

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does, but raise an error for unknown arguments."""
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], flags, n=1, cutoff=0.8)
            hint = f". Did you mean {close[0]}?" if close else ""
            self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        return found, unknown


def build_parser(verbs: Sequence[str] = tuple(VERBS)) -> argparse.ArgumentParser:
    """Build the parser for the given verbs.

    Args:
        verbs: Names from VERBS; only their modules are imported.

    Returns:
        The parser. Its namespace holds ``verb`` and ``debug`` beside the verb's own options.
    """
    parser = Parser(
        prog="halfbyte",
        description="Quantize language models to 2, 3, 4 or 8 bits, measure and run them.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"halfbyte {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for name in verbs:
        verb = load_verb(name)
        subparser = subparsers.add_parser(
            name, help=verb.HELP, description=verb.HELP, allow_abbrev=False
        )
        verb.add_arguments(subparser)
        # SUPPRESS: otherwise the default would overwrite a --debug given before the verb.
        subparser.add_argument(
            "--debug",
            action="store_true",
            default=argparse.SUPPRESS,
            help="show the traceback of an error",
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.

    Raises:
        SystemExit: argparse has printed an error or the help text.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Print "?" for characters that the terminal's encoding lacks, instead of failing.
        sys.stdout.reconfigure(errors="replace")
    configure_threads()
    arguments = join_verb(list(sys.argv[1:] if argv is None else argv))
    name = next((word for word in arguments if not word.startswith("-")), None)
    if name is not None and name not in VERBS:
        return _report_unknown_verb(name)
    parser = build_parser(tuple(VERBS) if name is None else (name,))
    try:
        args = parser.parse_args(arguments)
    except SystemExit as stop:
        if name is None or not stop.code:
            raise
        raise SystemExit(_error_code(load_verb(name), EXIT_USAGE)) from stop
    if args.verb is None:
        parser.print_help(sys.stderr)
        return EXIT_USAGE
    return _run(load_verb(args.verb), args)


def join_verb(arguments: list[str]) -> list[str]:
    """Join the words of a two-word verb, such as ``serve calibrate``, into one argument.

    Args:
        arguments: Without the program's name.

    Returns:
        The arguments; unchanged if they hold no such verb.
    """
    for place, word in enumerate(arguments[:-1]):
        if word.startswith("-"):
            continue
        joined = f"{word} {arguments[place + 1]}"
        if joined not in VERBS:
            break
        return [*arguments[:place], joined, *arguments[place + 2 :]]
    return arguments


def _report_unknown_verb(name: str) -> int:
    close = difflib.get_close_matches(name, VERBS, n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    _print_error(f"Unknown verb '{name}'.{hint} Available: {', '.join(VERBS)}.")
    return EXIT_USAGE


def _run(verb: Verb, args: argparse.Namespace) -> int:
    try:
        for variable in VARIABLES:
            read_variable(variable)
        return verb.run(args)
    except KeyboardInterrupt:
        can_resume = hasattr(args, "resume")
        hint = " Run the same command with --resume to continue." if can_resume else ""
        _print_error(f"Interrupted.{hint}")
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) exited. Python would raise again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _error_code(verb, EXIT_FAILURE)
    except (HalfbyteError, OSError) as error:
        if args.debug:
            err_console.print_exception()
        _print_error(str(error) if isinstance(error, HalfbyteError) else _describe_os_error(error))
        return _error_code(verb, EXIT_USAGE if isinstance(error, ConfigError) else EXIT_FAILURE)
    except Exception:  # noqa: BLE001 - a bug: report it as one
        # With the verb's own exit code: 1 of `compare` would be a verdict.
        traceback.print_exc()
        _print_error("This is a bug in halfbyte. Please report it with the lines above.")
        return _error_code(verb, EXIT_FAILURE)


def _error_code(verb: Verb, default: int) -> int:
    code: int = getattr(verb, "EXIT_ERROR", default)
    return code


def _describe_os_error(error: OSError) -> str:
    """Describe an OSError: the file and the reason."""
    what = f"Cannot use {error.filename}: " if error.filename else ""
    return f"{what}{error.strerror or str(error) or type(error).__name__}."


def _print_error(message: str) -> None:
    err_console.print(f"halfbyte: {message}", soft_wrap=True)
