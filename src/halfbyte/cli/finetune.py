"""The verb `finetune`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args
from halfbyte.cli.output import console, err_console, print_json
from halfbyte.finetune.config import AdapterConfig, TrainConfig

if TYPE_CHECKING:
    from halfbyte.finetune.report import TrainReport

HELP = "train a LoRA adapter on a quantized model, whose weights stay frozen"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model", metavar="MODEL", help="model folder, quantized or not, or a name on the Hub"
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        metavar="FILE",
        help="JSON lines with 'messages', 'prompt' and 'completion', or 'text'",
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="ADAPTER", help="folder for the adapter"
    )
    parser.add_argument(
        "--validation-data",
        type=Path,
        metavar="FILE",
        help="held-out data (default: a share of the training data)",
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="ADAPTER",
        help="adapter to start from, such as one made by halfbyte repair",
    )
    add_dataclass_options(parser, AdapterConfig)
    add_dataclass_options(parser, TrainConfig)
    parser.add_argument(
        "--resume", action="store_true", help="resume the unfinished run in ADAPTER"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Train and print the report."""
    adapter = dataclass_from_args(AdapterConfig, args)
    config = dataclass_from_args(TrainConfig, args)
    from halfbyte.finetune.progress import make_train_progress
    from halfbyte.finetune.train import finetune

    report = finetune(
        args.model,
        args.output,
        data=args.data,
        validation=args.validation_data,
        adapter=adapter,
        config=config,
        start_from=args.start_from,
        resume=args.resume,
        progress=make_train_progress(err_console),
    )
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def _print_report(report: TrainReport) -> None:
    from halfbyte.units import format_bytes, format_seconds

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("adapter", report.output)
    size = format_bytes(report.adapter_bytes)
    table.add_row("size", f"{report.trained_parameters:,} parameters, {size}")
    early = ", stopped early" if report.stopped_early else ""
    table.add_row("steps", f"{report.steps}{early}; kept: step {report.kept_step}")
    if report.validation_before is not None and report.validation_after is not None:
        before, after = report.validation_before, report.validation_after
        table.add_row("held-out loss", f"{before:.4f} -> {after:.4f}")
    table.add_row("time", format_seconds(report.seconds))
    table.add_row("peak memory", format_bytes(report.peak_memory_bytes))
    console.print(table)
