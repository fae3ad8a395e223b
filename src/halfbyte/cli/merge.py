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

HELP = "make one model of a base and its adapter, in 16 bits or quantized again"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("base", metavar="BASE", help="model that the adapter was trained on")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="folder of a PEFT adapter")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the model"
    )
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="the 16-bit model that BASE was made from, to merge into instead",
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help="the task's JSON lines: what the merge is judged by, and calibrated on",
    )
    parser.add_argument(
        "--quantize", action="store_true", help="quantize the merged model; needs --data"
    )
    parser.add_argument(
        "--exact",
        action="store_true",
        help="keep the codes of BASE and put an adapter of --variant qalora beside them, exactly; "
        "for halfbyte only",
    )
    add_dataclass_options(parser, QuantConfig)
    add_dataclass_options(parser, CalibrationConfig)
    add_dataclass_options(parser, ResourceConfig)
    parser.add_argument(
        "--resume", action="store_true", help="go on with the unfinished run in OUT (--quantize)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Merge and print what it cost."""
    if args.exact and (args.quantize or args.original):
        raise ConfigError(
            f"--exact is given with {'--quantize' if args.quantize else '--original'}: an exact "
            "merge keeps the codes of BASE. Leave one of them out."
        )
    if args.quantize and args.data is None:
        raise ConfigError(
            "--quantize is given without --data. Name the task's JSON lines: the merged model is "
            "calibrated on them and judged by them."
        )
    if not args.quantize:
        _check_only_merging(args)
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


def _check_only_merging(args: argparse.Namespace) -> None:
    """Refuse what would change nothing, as it is for quantizing; device is for merging too."""
    given = [name for cls in (QuantConfig, CalibrationConfig) for name in given_values(cls, args)]
    given += [name for name in given_values(ResourceConfig, args) if name != "device"]
    given += ["resume"] if args.resume else []
    if given:
        raise ConfigError(
            f"{', '.join(given)} is given without --quantize, and a merge in 16 bits has no use "
            "for it. Add --quantize, or leave it out."
        )


def _print_report(report: MergeReport) -> None:
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("model", report.output)
    table.add_row(
        "KL to base plus adapter",
        f"{report.kl_to_adapted:.4f} nats per token (the bare base: {report.kl_without:.4f})",
    )
    names = {"adapted": "base plus adapter", "merged": "in 16 bits", "quantized": "quantized"}
    for key, score in report.scores.items():
        table.add_row(
            f"{names[key]}, on the task",
            f"{score.right:.1%} of the examples right throughout, loss {score.loss:.4f}",
        )
    console.print(table)
    if report.scores:
        console.print(report.verdict)
