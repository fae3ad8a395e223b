"""The verb `profile`: measures memory under a peak load and compares it with the plan."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from halfbyte.cli.options import EXACTLY, add_computing_arguments
from halfbyte.cli.output import console, print_json

HELP = "measure a model's memory under a peak load and compare it with the plan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options and positionals."""
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
    parser.add_argument(
        "--requests",
        type=int,
        default=4,
        metavar="N",
        help="concurrent requests (default: %(default)s)",
    )
    parser.add_argument(
        "--context",
        type=int,
        default=1024,
        metavar="N",
        help="tokens of each request, prompt and answer together (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=8,
        metavar="N",
        help="tokens that each request generates (default: %(default)s)",
    )
    add_computing_arguments(parser, auto=EXACTLY)
    parser.add_argument("--json", action="store_true", help="print JSON, with sizes in bytes")


def run(args: argparse.Namespace) -> int:
    """Measure and print."""
    from halfbyte.judge.profile import profile
    from halfbyte.units import format_bytes, format_seconds

    result = profile(
        args.model,
        requests=args.requests,
        context=args.context,
        new_tokens=args.new_tokens,
        dtype=args.dtype,
        device=args.device,
    )
    if args.json:
        print_json(result)
        return 0
    found = result.measured
    table = Table(title=f"{args.model}: {args.requests} x {args.context} tokens, {found.dtype}")
    for heading in ("part", "planned", "measured", "planned / measured"):
        table.add_column(heading, justify="left" if heading == "part" else "right")
    for name, planned, measured in result.parts():
        ratio = f"{planned / measured:.2f}" if measured > 0 else "–"
        table.add_row(name, format_bytes(planned), format_bytes(measured), ratio)
    console.print(table)
    console.print(
        f"Prefill: {result.prefill_tokens_per_second:,.0f} tokens/s "
        f"({format_seconds(found.prefill_seconds)}); decode: "
        f"{result.decode_tokens_per_second:,.1f} tokens/s. Peak memory while loading: "
        f"{format_bytes(found.load_peak)}.",
        soft_wrap=True,
    )
    return 0
