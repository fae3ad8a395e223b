"""The verb `quantize`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.options import add_dataclass_options, dataclass_from_args
from halfbyte.cli.output import console, err_console, print_json
from halfbyte.quant_config import PRESETS, CalibrationConfig, QuantConfig, ResourceConfig

if TYPE_CHECKING:
    from halfbyte.quantize.report import QuantizationReport

HELP = "quantize a model folder into a standard GPTQ checkpoint"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model", metavar="MODEL", help="Hugging Face model folder, or a name on the Hub"
    )
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="folder for the checkpoint"
    )
    parser.add_argument(
        "--calibration",
        metavar="FILE",
        help="text file, or JSON lines with 'text', 'messages' or 'input_ids'; 'self': text that "
        "the model generates (default: built-in text)",
    )
    parser.add_argument(
        "--preset",
        choices=PRESETS,
        default="fast",
        help="from fastest to best quality; other options override it (default: %(default)s)",
    )
    add_dataclass_options(parser, QuantConfig)
    add_dataclass_options(parser, CalibrationConfig)
    add_dataclass_options(parser, ResourceConfig)
    parser.add_argument("--resume", action="store_true", help="resume the unfinished run in OUT")
    parser.add_argument(
        "--no-quality",
        dest="quality",
        action="store_false",
        help="do not measure quality on held-out text",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Quantize and print the report."""
    config = dataclass_from_args(QuantConfig, args, PRESETS[args.preset])
    calibration = dataclass_from_args(CalibrationConfig, args)
    resources = dataclass_from_args(ResourceConfig, args)
    from halfbyte.quantize.pipeline import quantize
    from halfbyte.quantize.progress import make_progress

    report = quantize(
        args.model,
        args.output,
        config=config,
        calibration=calibration,
        resources=resources,
        text=args.calibration,
        resume=args.resume,
        quality=args.quality,
        progress=make_progress(err_console),
    )
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def _count_modules(report: QuantizationReport) -> str:
    text = f"{len(report.modules)} quantized, {len(report.skipped)} in 16 bits"
    share = report.unquantized_share
    return f"{text}, {share:.0%} of the blocks' weights" if share >= 0.01 else text


def _print_report(report: QuantizationReport) -> None:
    from halfbyte.units import format_bytes, format_seconds

    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    table.add_row("checkpoint", report.output)
    table.add_row("size", format_bytes(report.checkpoint_bytes))
    table.add_row("bits per weight", f"{report.bits_per_weight:.2f} in quantized layers")
    table.add_row("modules", _count_modules(report))
    coverage = report.expert_coverage()
    if coverage:
        fewest = min(min(block.tokens) for block in coverage)
        missed = sum(len(block.unreached) for block in coverage)
        table.add_row("experts", f"the rarest got {fewest} tokens; {missed} got none")
    if report.end_to_end is not None:
        tuning = report.end_to_end
        table.add_row(
            "end to end",
            f"KL on held-out text {tuning.kl_before:.4f} -> {tuning.kl_after:.4f} "
            f"(step {tuning.kept_step} of {tuning.steps})",
        )
    quality = report.quality
    if quality is not None:
        table.add_row(
            "perplexity", f"{quality.base_perplexity:.2f} -> {quality.quantized_perplexity:.2f}"
        )
        error = quality.kl_standard_error
        spread = "" if error is None else f" ± {error:.4f}"
        table.add_row("KL to the base", f"{quality.kl_nats_mean:.4f}{spread} nats per token")
        table.add_row("top-1 agreement", f"{quality.top1_agreement:.1%}")
        table.add_row(
            "measured on", f"{quality.windows} windows of {quality.window} tokens, held out"
        )
    table.add_row("time", format_seconds(report.seconds))
    table.add_row("peak memory", format_bytes(report.peak_memory_bytes))
    console.print(table)
