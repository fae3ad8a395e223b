"""The verb `divergence`: measures how far a quantized model is from its base."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.measuring import (
    add_measuring_arguments,
    describe_text,
    format_nats,
    format_standard_error,
    measuring_keywords,
    window_progress,
)
from halfbyte.cli.output import console, print_json

if TYPE_CHECKING:
    from halfbyte.evaluate.divergence import DivergenceResult

HELP = "measure the divergence of a quantized model from its base on a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("base", type=Path, metavar="BASE", help="folder of the base model")
    parser.add_argument(
        "quantized", type=Path, metavar="QUANTIZED", help="folder of the quantized model"
    )
    add_measuring_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from halfbyte.evaluate.divergence import divergence

    with window_progress("divergence") as progress:
        result = divergence(
            args.base, args.quantized, progress=progress, **measuring_keywords(args)
        )
    if args.json:
        text = None if args.text is None else str(args.text)
        names = {"base_model": str(args.base), "quantized_model": str(args.quantized)}
        print_json({**names, "text": text, **result.to_dict()})
    else:
        _print_table(args, result)
    return 0


def _print_table(args: argparse.Namespace, result: DivergenceResult) -> None:
    table = Table(title=f"{args.quantized} compared with {args.base}")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("standard error", justify="right")
    for row in divergence_rows(result):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"{result.num_windows} windows of {result.window} tokens ({result.num_tokens} predicted) "
        f"of {describe_text(args.text)}; base {result.base.dtype}, quantized "
        f"{result.quantized.dtype}. Standard errors are over windows.",
        soft_wrap=True,
    )
    if result.note:
        console.print(f"Note: {result.note}", soft_wrap=True)


def divergence_rows(result: DivergenceResult) -> list[tuple[str, str, str]]:
    """Format a result as rows of name, value and standard error.

    Args:
        result: The measurement.

    Returns:
        Rows of the table.
    """
    kl_error = result.kl_standard_error
    agreement_error = result.top1_standard_error
    ratio_error = result.nll_increase_standard_error
    rows = [
        (
            "KL(base || quantized), nats per token",
            format_nats(result.kl_nats),
            "–" if kl_error is None else f"± {format_nats(kl_error)}",
        )
    ]
    for name, value in result.kl_percentiles.items():
        label = "  maximum" if name == "100" else f"  {name}th percentile"
        rows.append((label, format_nats(value), ""))
    return [
        *rows,
        (
            "top-1 agreement, %",
            f"{100 * result.top1_agreement:.1f}",
            format_standard_error(None if agreement_error is None else 100 * agreement_error, 1),
        ),
        (
            "perplexity of the base",
            f"{result.base.perplexity:.3f}",
            format_standard_error(result.base.standard_error, 3),
        ),
        (
            "perplexity of the quantized model",
            f"{result.quantized.perplexity:.3f}",
            format_standard_error(result.quantized.standard_error, 3),
        ),
        (
            "perplexity, quantized / base",
            f"{result.perplexity_ratio:.4f}",
            format_standard_error(
                None if ratio_error is None else ratio_error * result.perplexity_ratio, 4
            ),
        ),
    ]
