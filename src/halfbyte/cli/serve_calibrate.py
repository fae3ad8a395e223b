"""The verb `serve calibrate`: chooses the confidence threshold for a fallback."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.serve.routing.confidence import STATISTICS

if TYPE_CHECKING:
    from halfbyte.judge.statistics import Interval
    from halfbyte.serve.calibrate import Calibration

HELP = "choose the confidence threshold below which a request falls back to a larger model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "report",
        type=Path,
        metavar="REPORT",
        help="report.json of `halfbyte compare LARGER SERVED -o FOLDER`",
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="JSON file for `halfbyte serve --confidence` (default: only print the table)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="maximum share of the requests that fall back to the larger model (default: 0.1)",
    )
    parser.add_argument(
        "--statistic",
        choices=STATISTICS,
        default=STATISTICS[0],
        help="how confidence is measured (default: mean_logprob)",
    )
    parser.add_argument(
        "--first-tokens",
        type=int,
        metavar="N",
        help="use only the first N tokens, as needed for streamed answers, of which only the "
        "beginning is buffered (default: the whole answer; for answers that are not streamed)",
    )


def run(args: argparse.Namespace) -> int:
    """Choose the threshold, write the file, print the table.

    Args:
        args: The parsed arguments.

    Returns:
        0.

    Raises:
        ConfigError: The report or an option is invalid.
    """
    import json

    from halfbyte.checkpoint.atomic import write_atomically
    from halfbyte.cli.output import console
    from halfbyte.errors import ConfigError
    from halfbyte.serve.calibrate import calibrate, read_judged

    if args.first_tokens is not None and args.first_tokens < 1:
        raise ConfigError(f"first_tokens is {args.first_tokens}; it must be 1 or more.")
    items = read_judged(args.report, args.statistic, args.first_tokens)
    result = calibrate(
        items, statistic=args.statistic, first_tokens=args.first_tokens, share=args.share
    )
    if args.output is not None:
        text = json.dumps(result.to_dict(), indent=2) + "\n"
        write_atomically(args.output, [text.encode()])
    _print_table(result)
    if args.output is not None:
        console.print(f"Wrote {args.output}", soft_wrap=True)
    return 0


def _print_table(result: Calibration) -> None:
    from rich.table import Table

    from halfbyte.cli.output import console

    console.print(
        f"{result.num_items} answers: the served model is right in "
        f"{_percent(result.candidate_accuracy)}, the larger one in "
        f"{_percent(result.base_accuracy)}.",
        soft_wrap=True,
    )
    table = Table(title=f"Fallback by {result.confidence.statistic}")
    for heading in ("threshold", "falls back", "accuracy", "gain, points", "over chance"):
        table.add_column(heading, justify="right")
    for choice in result.choices:
        mark = "> " if choice is result.chosen else ""
        table.add_row(
            f"{mark}{choice.threshold:.4f}",
            _percent(choice.share),
            _percent(choice.accuracy),
            _points(choice.gain, choice.gain_interval),
            _points(choice.over_chance, choice.over_chance_interval),
        )
    console.print(table)
    if not result.is_better_than_chance:
        console.print(
            "On these items, low confidence does not find wrong answers significantly better than "
            "chance. Compare on more items, or do not use --confidence.",
            soft_wrap=True,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(value: float, interval: Interval | None) -> str:
    shown = f"{100 * value:+.1f}"
    if interval is None:
        return shown
    return f"{shown} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
