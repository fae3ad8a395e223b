"""The verb `bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from halfbyte.cli.generating import add_activations_argument
from halfbyte.cli.options import FAST, add_computing_arguments
from halfbyte.cli.output import console, err_console, print_json
from halfbyte.run_config import HEAD_BITS

if TYPE_CHECKING:
    from halfbyte.evaluate.divergence import DivergenceResult
    from halfbyte.integrations.speed import SpeedResult

HELP = "benchmark models on this machine: load time, prompt and generation speed, memory"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "models", type=Path, nargs="+", metavar="MODEL", help="model folders, quantized or not"
    )
    parser.add_argument(
        "--base", type=Path, metavar="BASE", help="the original model to compare with; listed first"
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        default=512,
        metavar="N",
        help="length of the prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=3,
        metavar="N",
        help="repetitions; medians are shown (default: %(default)s)",
    )
    parser.add_argument(
        "--head-bits",
        type=int,
        default=16,
        choices=HEAD_BITS,
        help="bits of the output layer (head) of quantized models on a CPU (default: %(default)s)",
    )
    add_activations_argument(parser)
    add_computing_arguments(parser, auto=FAST)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Benchmark each model in a separate process, and print the results."""
    from halfbyte.integrations.speed import measure_apart

    folders = [*([args.base] if args.base else []), *args.models]
    results = {}
    for folder in folders:
        err_console.print(f"{folder} ...")
        results[str(folder)] = measure_apart(measure_folder, args, folder)
    if args.json:
        shares = {name: {"memory_share": result.memory_share} for name, result in results.items()}
        print_json({"models": results, "shares": shares})
    else:
        _print(results)
    return 0


def measure_folder(args: argparse.Namespace, folder: Path) -> SpeedResult:
    """Benchmark one model in this process.

    Args:
        args: The parsed options.
        folder: The model's.

    Returns:
        The measurements.
    """
    from transformers import AutoTokenizer

    from halfbyte.integrations.load import load_model
    from halfbyte.integrations.speed import measure_speed

    activations = "float" if folder == args.base else args.activations
    return measure_speed(
        lambda: load_model(folder, dtype=args.dtype, device=args.device, activations=activations),
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        repeats=args.repeats,
        head_bits=16 if folder == args.base else args.head_bits,
        rounding=None if activations == "float" else AutoTokenizer.from_pretrained(folder),
    )


def describe_rounding(rounding: DivergenceResult) -> str:
    """Describe the error that int8 activations cause.

    Args:
        rounding: The divergence from the same model with activations in its own dtype.

    Returns:
        A sentence without a full stop.
    """
    return (
        f"with int8 activations the KL divergence is {rounding.kl_nats:.4f} ± "
        f"{rounding.kl_standard_error or 0:.4f} nats per token, the top-1 agreement "
        f"{rounding.top1_agreement:.1%} ({rounding.num_tokens} tokens of the built-in text)"
    )


def _print(results: dict[str, SpeedResult]) -> None:
    table = Table()
    table.add_column("model", overflow="fold")
    headings = ("prompt tok/s", "first token", "tok/s", "speedup", "load", "memory", "read/token")
    for heading in (*headings, "of bandwidth"):
        table.add_column(heading, justify="right")
    first = next(iter(results.values()))
    for name, result in results.items():
        share = result.memory_share
        table.add_row(
            name,
            f"{result.prompt_rate:.0f}",
            f"{result.first_token_seconds:.2f} s",
            f"{result.rate:.1f}",
            f"{result.rate / first.rate:.2f}",
            f"{result.load_seconds:.2f} s",
            f"{result.memory_bytes / 1e9:.2f} GB",
            f"{result.read_bytes / 1e6:.0f} MB",
            "–" if share is None else f"{share:.0%}",
        )
    console.print(table)
    rates = [result.memory_rate for result in results.values() if result.memory_rate]
    memory = f"; memory bandwidth {max(rates) / 1e9:.1f} GB/s" if rates else ""
    console.print(
        f"Prompts of {first.prompt_tokens} tokens, batch 1, {first.threads} threads, "
        f"{first.dtype}; medians{memory}.",
        soft_wrap=True,
    )
    for name, result in results.items():
        if result.rounding is not None:
            console.print(f"{name}: {describe_rounding(result.rounding)}.", soft_wrap=True)
        if result.why_not:
            console.print(f"{name}: no compiled decoder: {result.why_not}.", soft_wrap=True)
