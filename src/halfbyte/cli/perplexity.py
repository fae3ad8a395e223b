"""The verb `perplexity`: measures a model's perplexity on a text."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.measuring import (
    add_measuring_arguments,
    describe_text,
    format_standard_error,
    measuring_keywords,
    window_progress,
)
from halfbyte.cli.output import console, print_json

if TYPE_CHECKING:
    from halfbyte.evaluate.perplexity import PerplexityResult

HELP = "measure a model's perplexity on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model", type=Path, metavar="MODEL", help="folder of a model, quantized or not"
    )
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from halfbyte.evaluate.perplexity import perplexity

    with window_progress("perplexity") as progress:
        result = perplexity(args.model, progress=progress, **measuring_keywords(args))
    if args.json:
        text = None if args.text is None else str(args.text)
        print_json({"model": str(args.model), "text": text, **result.to_dict()})
    else:
        _print_table(args, result)
    return 0


def _print_table(args: argparse.Namespace, result: PerplexityResult) -> None:
    table = Table()
    table.add_column("model", overflow="fold")
    table.add_column("perplexity", justify="right")
    table.add_column("standard error", justify="right")
    table.add_column("nats per token", justify="right")
    table.add_row(
        str(args.model),
        f"{result.perplexity:.3f}",
        format_standard_error(result.standard_error, 3),
        f"{result.nll_nats:.4f}",
    )
    console.print(table)
    console.print(
        f"{result.num_windows} windows of {result.window} tokens ({result.num_tokens} predicted) "
        f"of {describe_text(args.text)}; {result.dtype}. The standard error is over windows.",
        soft_wrap=True,
    )
    if result.note:
        console.print(f"Note: {result.note}", soft_wrap=True)
