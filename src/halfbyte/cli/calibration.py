"""The verb `calibration`: inspects a calibration text before it is used."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.output import console, print_json
from halfbyte.quant_config import CalibrationConfig

if TYPE_CHECKING:
    from halfbyte.quantize.inspection import Inspection

HELP = "inspect a calibration text before quantizing with it"
BUILT_IN = "built-in"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's actions."""
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    inspect = actions.add_parser(
        "inspect",
        help="measure how far a calibration text is from the text that the model will see",
        allow_abbrev=False,
    )
    inspect.add_argument(
        "file",
        metavar="FILE",
        help=f"calibration text, or '{BUILT_IN}' for the text that ships with halfbyte",
    )
    inspect.add_argument(
        "--against",
        type=Path,
        required=True,
        metavar="WORKLOAD",
        help="text of the kind that the model will see: a text file or JSON lines",
    )
    inspect.add_argument(
        "--model", type=Path, required=True, metavar="MODEL", help="folder of the model"
    )
    inspect.add_argument(
        "--samples", type=int, default=32, metavar="N", help="sequences of each text (default: 32)"
    )
    inspect.add_argument(
        "--length", type=int, default=512, metavar="N", help="tokens per sequence (default: 512)"
    )
    inspect.add_argument(
        "--picture",
        type=Path,
        metavar="PNG",
        help="plot the distance of each layer's inputs to this PNG file",
    )
    inspect.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    config = CalibrationConfig(samples=args.samples, length=args.length)
    from halfbyte.quantize.inspection import inspect_calibration, save_inspection_picture

    source = None if args.file == BUILT_IN else Path(args.file)
    found = inspect_calibration(args.model, source, args.against, config=config)
    if args.picture:
        save_inspection_picture(found, args.picture)
    if args.json:
        print_json(found)
    else:
        _print_table(found)
    return 0


def _print_table(found: Inspection) -> None:
    table = Table()
    table.add_column("")
    table.add_column("calibration", justify="right")
    table.add_column("workload", justify="right")
    table.add_row("text", found.calibration, found.workload)
    table.add_row("tokens", f"{found.calibration_tokens:,}", f"{found.workload_tokens:,}")
    table.add_row(
        "perplexity", f"{found.calibration_perplexity:.1f}", f"{found.workload_perplexity:.1f}"
    )
    table.add_row(
        "share of the workload's tokens that occur in the text",
        f"{found.coverage:.1%}",
        f"{found.coverage_floor:.1%} (one half in the other)",
    )
    console.print(table)
    console.print(f"Verdict: {found.verdict}. " + "; ".join(found.reasons) + ".", soft_wrap=True)
