"""The verb `convert`: the same codes and scales in another runtime's format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from halfbyte.convert.report import ConversionReport

HELP = "convert a quantized model to another runtime's format, without rounding again"

FORMATS = ("gguf", "awq", "mlx", "compressed-tensors", "hf", "gptq")
TYPES = ("keep", "f16", "q8_0", "q6_k")
DTYPES = ("float16", "bfloat16", "float32")
SHOWN = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "model",
        type=Path,
        metavar="MODEL",
        help="folder (GPTQ, AWQ, MLX, compressed-tensors) or .gguf file",
    )
    parser.add_argument("--to", required=True, choices=FORMATS, help="format to write")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="OUT",
        help="new folder, or a .gguf file",
    )
    parser.add_argument(
        "--allow-error",
        action="store_true",
        help="store what the format cannot hold exactly in the closest form, and report the error",
    )
    parser.add_argument(
        "--base",
        type=Path,
        metavar="FOLDER",
        help="for a .gguf MODEL: folder with the model's config.json and tokenizer",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float16",
        help="dtype of dense weights: of all with --to hf, else of those that are not quantized "
        "(default: float16; float32 is exact)",
    )
    gguf = parser.add_argument_group("GGUF only")
    gguf.add_argument(
        "--embeddings", choices=TYPES, default="keep", help="type of the embeddings (default: keep)"
    )
    gguf.add_argument(
        "--head", choices=TYPES, default="keep", help="type of an untied head (default: keep)"
    )
    gguf.add_argument(
        "--widen",
        action="store_true",
        help="store asymmetric 4-bit codes exactly, as Q8_0, at twice the size",
    )
    gguf.add_argument(
        "--pre-tokenizer",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer (default: detected)",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    """Convert, print the report, and return the exit code."""
    from halfbyte.cli.output import print_json
    from halfbyte.convert.run import ConversionConfig, convert

    config = ConversionConfig(
        to=args.to,
        allow_error=args.allow_error,
        widen=args.widen,
        dtype=args.dtype,
        embeddings=args.embeddings,
        head=args.head,
        pre_tokenizer=args.pre_tokenizer,
    )
    report = convert(args.model, args.output, config=config, base=args.base)
    if args.json:
        print_json(report)
    else:
        _print_report(report)
    return 0


def _print_report(report: ConversionReport) -> None:
    from halfbyte.cli.output import console

    held = ", ".join(f"{count} x {how}" for how, count in report.holds.items())
    console.print(f"{report.output}: {report.num_linears} linears ({held})", soft_wrap=True)
    rate = report.num_bytes / report.seconds / 1e6
    console.print(f"{report.num_bytes / 1e6:.1f} MB in {report.seconds:.1f} s ({rate:.0f} MB/s)")
    if report.folded:
        console.print(f"act-order of {report.folded} linears folded into the layers before them")
    if report.is_exact:
        console.print("Exact: every weight has the same value as before, bit for bit.")
    else:
        worst = sorted(report.rounded, key=lambda found: -found.relative_error)
        rounded = "1 tensor was" if len(worst) == 1 else f"{len(worst)} tensors were"
        console.print(f"Not exact: {rounded} rounded. The largest errors:")
        for found in worst[:SHOWN]:
            console.print(
                f"  {found.name}: relative error {found.relative_error:.2e}, at most "
                f"{found.largest_error:.2e} of the largest weight; {found.how}",
                soft_wrap=True,
            )
    for note in report.notes:
        console.print(f"Note: {note}", soft_wrap=True)
