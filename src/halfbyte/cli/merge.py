"""The verb `merge`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args, given_values
from halfbyte.cli.output import console, err_console, print_json
from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig

if TYPE_CHECKING:
    from halfbyte.finetune.merge_check import MergeReport

HELP = "merge an adapter into its base model, in 16 bits or quantized again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("base", metavar="BASE", help="model that the adapter was trained on")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a PEFT adapter")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="folder for the merged model",
    )
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="merge into this 16-bit model instead, the one that BASE was made from",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="JSON lines of the task, to evaluate on; with --quantize also to calibrate on",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="quantize the merged model; needs --data"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="merge an adapter of --variant qalora without changing the codes of BASE; only "
        "halfbyte loads the result",
    )
    add_dataclass_options(parser, QuantConfig)
    add_dataclass_options(parser, CalibrationConfig)
    add_dataclass_options(parser, ResourceConfig)
    parser.add_argument(
        "--resume", action="store_true", help="resume the unfinished run in OUT (with --quantize)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and print the report."""
    if args.exact and (args.quantize or args.original):
        raise ConfigError(
            f"--exact cannot be combined with {'--quantize' if args.quantize else '--original'}: "
            "an exact merge keeps the codes of BASE. Remove one of the two."
        )
    if args.quantize and args.data is None:
        raise ConfigError(
            "--quantize needs --data: the merged model is calibrated and evaluated on the task's "
            "JSON lines."
        )
    if not args.quantize:
        _check_no_quantizing_options(args)
    calibration = dataclass_from_args(CalibrationConfig, args, {"length": 512})
    resources = dataclass_from_args(ResourceConfig, args)
    from halfbyte.finetune.exact_merge import merge_exactly
    from halfbyte.finetune.merge import merge
    from halfbyte.finetune.requantize import merge_and_quantize, merging_config
    from halfbyte.quantize.progress import make_progress
    from halfbyte.quantize.source import find_model

    if args.exact:
        report = merge_exactly(
            args.base, args.adapter, args.output, data=args.data, device=resources.device
        )
    elif not args.quantize:
        report = merge(
            args.base,
            args.adapter,
            args.output,
            original=args.original,
            data=args.data,
            device=resources.device,
        )
    else:
        report = merge_and_quantize(
            args.base,
            args.adapter,
            args.output,
            data=args.data,
            config=merging_config(find_model(args.base), **given_values(QuantConfig, args)),
            original=args.original,
            calibration=calibration,
            resources=resources,
            resume=args.resume,
            progress=make_progress(err_console),
        )
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def _check_no_quantizing_options(args: argparse.Namespace) -> None:
    """Refuse options that only apply to quantizing; --device applies to merging too."""
    given = [name for cls in (QuantConfig, CalibrationConfig) for name in given_values(cls, args)]
    given += [name for name in given_values(ResourceConfig, args) if name != "device"]
    given += ["resume"] if args.resume else []
    if given:
        raise ConfigError(
            f"Options without effect: {', '.join(given)}. They only apply to quantizing: add "
            "--quantize, or remove them."
        )


def _print_report(report: MergeReport) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", report.output)
    table.add_row(
        "KL to base plus adapter",
        f"{report.kl_to_adapted:.4f} nats per token (the base alone: {report.kl_without:.4f})",
    )
    names = {"adapted": "base plus adapter", "merged": "in 16 bits", "quantized": "quantized"}
    for key, score in report.scores.items():
        table.add_row(
            f"{names[key]}, on the task",
            f"{score.right:.1%} of the examples entirely right, loss {score.loss:.4f}",
        )
    console.print(table)
    if report.scores:
        console.print(report.verdict)
