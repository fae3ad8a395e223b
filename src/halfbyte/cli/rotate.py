"""The verb `rotate`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "write the same 16-bit model in another basis, which may lose less when it is quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", metavar="MODEL", help="folder, or a name on the Hub")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="new folder"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="draws the rotation (default: %(default)s)"
    )
    parser.add_argument(
        "--device", default="cpu", metavar="NAME", help="where to compute (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Rotate and say what was written."""
    from halfbyte.cli.output import console, err_console, print_json
    from halfbyte.quantize.rotate import rotate
    from halfbyte.units import format_bytes, format_seconds

    with err_console.status("reading the model") as status:
        report = rotate(
            args.model,
            args.output,
            seed=args.seed,
            device=args.device,
            on_block=lambda index, count: status.update(f"block {index + 1} of {count}"),
        )
    if args.json:
        print_json(report)
        return 0
    console.print(
        f"{report.output}: {report.num_blocks} blocks, {format_bytes(report.num_bytes)} in "
        f"{format_seconds(report.seconds)}; every block computes the same to "
        f"{report.largest_error:.1e} of its outputs",
        soft_wrap=True,
    )
    if report.untied_bytes:
        console.print(
            f"Note: the head was tied to the embeddings and is not any more, which takes "
            f"{format_bytes(report.untied_bytes)} in every checkpoint made of it",
            soft_wrap=True,
        )
    return 0
