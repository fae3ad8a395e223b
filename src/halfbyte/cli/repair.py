"""The verb `repair`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args
from halfbyte.cli.output import console, print_json
from halfbyte.quant_config import CalibrationConfig

HELP = "make an adapter that corrects part of the quantization error, without training"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("base", metavar="BASE", help="quantized model")
    parser.add_argument("original", metavar="MODEL", help="16-bit model that it was made from")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="ADAPTER", help="folder for the adapter"
    )
    parser.add_argument(
        "--rank",
        type=int,
        default=16,
        metavar="N",
        help="rank of the adapter (default: %(default)s)",
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text on which the output error is minimized (default: built-in text)",
    )
    add_dataclass_options(parser, CalibrationConfig)
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="device to compute on (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Make the adapter and print the report."""
    calibration = dataclass_from_args(CalibrationConfig, args, {"length": 512})
    from halfbyte.finetune.repair import repair
    from halfbyte.units import format_seconds

    report = repair(
        args.base,
        args.original,
        args.output,
        rank=args.rank,
        text=args.calibration,
        calibration=calibration,
        device=args.device,
    )
    if args.json:
        print_json(report)
        return 0
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("adapter", report.output)
    table.add_row("linears", f"{len(report.kept_error)}, rank {report.rank}")
    table.add_row(
        "output error left", f"{report.mean_kept_error:.1%} of the squared error, on average"
    )
    table.add_row("text", f"{report.tokens:,} tokens")
    table.add_row("time", format_seconds(report.seconds))
    console.print(table)
    return 0
