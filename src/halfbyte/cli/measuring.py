"""Options and output shared by the verbs `perplexity` and `divergence`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from halfbyte.cli.options import EXACTLY, add_computing_arguments
from halfbyte.cli.output import show_progress
from halfbyte.errors import ConfigError

SHIPPED_TEXT = "the evaluation text of halfbyte (WikiText-2 test, first eight articles)"


def add_measuring_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select the text and how it is measured.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help=f"UTF-8 text file (default: {SHIPPED_TEXT})"
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="N",
        help="tokens per window (default: 2048, or the model's context length if shorter)",
    )
    parser.add_argument(
        "--windows",
        type=int,
        metavar="N",
        help="use only the first N windows; 0 for all (default: all)",
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="windows per forward pass (default: %(default)s)",
    )
    parser.add_argument(
        "--add-bos", action="store_true", help="add a BOS token at the start of the text"
    )
    add_computing_arguments(parser, auto=EXACTLY)
    parser.add_argument("--json", action="store_true", help="print JSON")


def measuring_keywords(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of the measuring functions, from the command line.

    Args:
        args: Parsed arguments.

    Returns:
        Keyword arguments of ``perplexity`` and ``divergence``, with the content of the text file.

    Raises:
        ConfigError: The text file cannot be read.
    """
    return {
        "text": None if args.text is None else read_text(args.text),
        "window": args.window,
        "windows": args.windows or None,
        "batch_size": args.batch_size,
        "add_bos": args.add_bos,
        "dtype": args.dtype,
        "device": args.device,
    }


def read_text(path: Path) -> str:
    """Read a text file, with all line endings converted to LF.

    Args:
        path: A UTF-8 file.

    Returns:
        Its text.

    Raises:
        ConfigError: There is no such file, or it is not UTF-8, or JSON lines.
    """
    if path.suffix.lower() == ".jsonl":
        raise ConfigError(
            f"Cannot measure on '{path}': it holds JSON lines, and their keys and braces would be "
            f"measured as text. Give plain text, for example: jq -r .text {path.name} > text.txt"
        )
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"Cannot read the text '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Cannot read the text '{path}': byte {error.start} is not UTF-8. "
            "Convert the file to UTF-8."
        ) from error


@contextmanager
def window_progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """Show progress on stderr; yields a function to call with (done, total)."""
    with show_progress() as progress:
        progress("loading", 0, 1)
        yield lambda done, total: progress(label, done, total)


def describe_text(path: Path | None) -> str:
    """Describe the text in a table's caption."""
    return SHIPPED_TEXT if path is None else str(path)


def format_nats(value: float) -> str:
    """Format a divergence with 4 decimals, or in scientific notation if below 0.001."""
    return f"{value:.4f}" if value == 0 or abs(value) >= 0.001 else f"{value:.2e}"


def format_standard_error(error: float | None, digits: int) -> str:
    """Format a standard error, or a dash if there is none (a single window)."""
    return "–" if error is None else f"± {error:.{digits}f}"
