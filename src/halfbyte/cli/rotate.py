"""The verb `rotate`."""

from __future__ import annotations

import argparse
from pathlib import Path

HELP = "rotate the residual stream of a 16-bit model, which may then lose less when quantized"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("model", metavar="MODEL", help="model folder, or a name on the Hub")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="OUT", help="new folder"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="seed of the rotation (default: %(default)s)",
    )
    parser.add_argument(
        "--device",
        default="cpu",
        metavar="NAME",
        help="device to compute on (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Rotate the model and print the report."""
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
        f"{format_seconds(report.seconds)}; the outputs of each block differ by at most "
        f"{report.largest_error:.1e}, relative",
        soft_wrap=True,
    )
    if report.untied_bytes:
        console.print(
            f"Note: the head is no longer tied to the embeddings, which adds "
            f"{format_bytes(report.untied_bytes)} to every checkpoint made from this model",
            soft_wrap=True,
        )
    return 0
