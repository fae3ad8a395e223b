"""`halfbyte serve calibrate`: from a comparison, how unsure an answer must be to fall back."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from halfbyte.serve.routing.confidence import STATISTICS

if TYPE_CHECKING:
    from halfbyte.judge.statistics import Interval
    from halfbyte.serve.calibrate import Calibration

HELP = "choose from a comparison how unsure an answer must be for a larger model to be asked"


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
        help="JSON for `halfbyte serve --confidence` (default: only the table)",
    )
    parser.add_argument(
        "--share",
        type=float,
        default=0.1,
        metavar="SHARE",
        help="of the requests that may go to the larger model (default: 0.1)",
    )
    parser.add_argument(
        "--statistic",
        choices=STATISTICS,
        default=STATISTICS[0],
        help="what tells how sure the model is (default: mean_logprob)",
    )
    parser.add_argument(
        "--first-tokens",
        type=int,
        metavar="N",
        help="only so many tokens count, which is what a streamed answer is held back for "
        "(default: the whole answer, which helps answers that are not streamed)",
    )


def run(args: argparse.Namespace) -> int:
    """Choose, write the file, print the table.

    Args:
        args: From the parser.

    Returns:
        0.

    Raises:
        ConfigError: The report or an option cannot be used.
    """
    import json

    from halfbyte.checkpoint.atomic import write_atomically
    from halfbyte.cli.output import console
    from halfbyte.errors import ConfigError
    from halfbyte.serve.calibrate import calibrate, read_judged

    if args.first_tokens is not None and args.first_tokens < 1:
        raise ConfigError(f"first_tokens is {args.first_tokens}; it must be 1 or more.")
    items = read_judged(args.report, args.statistic, args.first_tokens)
    found = calibrate(
        items, statistic=args.statistic, first_tokens=args.first_tokens, share=args.share
    )
    if args.output is not None:
        text = json.dumps(found.to_dict(), indent=2) + "\n"
        write_atomically(args.output, [text.encode()])
    _print_table(found)
    if args.output is not None:
        console.print(f"wrote {args.output}", soft_wrap=True)
    return 0


def _print_table(found: Calibration) -> None:
    from rich.table import Table

    from halfbyte.cli.output import console

    console.print(
        f"{found.num_items} answers: right {_percent(found.candidate_accuracy)} by the served "
        f"model, {_percent(found.base_accuracy)} by the larger one.",
        soft_wrap=True,
    )
    table = Table(title=f"Falling back by {found.confidence.statistic}")
    for heading in ("threshold", "falls back", "accuracy", "gain, points", "over chance"):
        table.add_column(heading, justify="right")
    for one in found.choices:
        mark = "> " if one is found.chosen else ""
        table.add_row(
            f"{mark}{one.threshold:.4f}",
            _percent(one.share),
            _percent(one.accuracy),
            _points(one.gain, one.gain_interval),
            _points(one.over_chance, one.over_chance_interval),
        )
    console.print(table)
    if not found.tells:
        console.print(
            "Here low confidence does not find wrong answers better than chance, as far as these "
            "items tell. Compare on more, or leave --confidence out.",
            soft_wrap=True,
        )


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _points(value: float, interval: Interval | None) -> str:
    shown = f"{100 * value:+.1f}"
    if interval is None:
        return shown
    return f"{shown} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"
