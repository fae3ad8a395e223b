"""Options and steps shared by the verbs that generate text: generate, chat and bench."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.cli.options import FAST, add_computing_arguments
from halfbyte.cli.output import err_console
from halfbyte.errors import ConfigError
from halfbyte.run_config import ACTIVATIONS, HEAD_BITS

if TYPE_CHECKING:
    from halfbyte.integrations.generation import Generator, Sampling, Timing


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that select a model and how to run it.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument("model", type=Path, metavar="MODEL", help="model folder, quantized or not")
    parser.add_argument(
        "--head-bits",
        type=int,
        default=16,
        choices=HEAD_BITS,
        help="bits of the output layer (head) on a CPU: 16 keeps it as stored; 8 and 4 use a "
        "rounded copy, which is faster (default: %(default)s)",
    )
    add_activations_argument(parser)
    add_computing_arguments(parser, auto=FAST)


def add_activations_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option for the dtype of the inputs of quantized layers.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument(
        "--activations",
        default="float",
        choices=ACTIVATIONS,
        help="inputs of quantized layers on a CPU: int8 rounds them, which is less exact, but "
        "faster without matrix units; `halfbyte bench` measures both (default: %(default)s)",
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int
) -> None:
    """Add the sampling options.

    Args:
        parser: The verb's parser.
        temperature: Its default.
        max_new_tokens: Its default.
    """
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help="maximum number of tokens to generate (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="sampling temperature; 0 takes the most likely token (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens of this total probability (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="seed for sampling (default: %(default)s)"
    )


def make_sampling(args: argparse.Namespace) -> Sampling:
    """Make the sampling settings from the options.

    Args:
        args: The parsed options.

    Returns:
        The settings.
    """
    from halfbyte.integrations.generation import Sampling

    return Sampling(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )


def read_input(read: Callable[[], str]) -> str:
    """Read text from the standard input.

    Args:
        read: Reads a line, or everything.

    Returns:
        The text.

    Raises:
        ConfigError: The input is not valid text.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        # As for command-line arguments, so that check_text can name an invalid byte. Only before
        # the first line: a pipe cannot be reconfigured once it was read from.
        sys.stdin.reconfigure(errors="surrogateescape")
    return check_text(read(), "standard input")


def check_text(text: str, source: str) -> str:
    """Refuse text with bytes that could not be decoded (surrogate escapes).

    Args:
        text: From outside.
        source: Where it comes from, for the message.

    Returns:
        The same text.

    Raises:
        ConfigError: The text holds such a byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"The text from {source} is not {sys.stdin.encoding or 'UTF-8'}: it has a byte "
            f"0x{ord(text[error.start]) & 0xFF:02x} after {error.start} characters. Convert it "
            "(iconv -t UTF-8), or set PYTHONUTF8=1."
        ) from error
    return text


def open_generator(args: argparse.Namespace) -> tuple[Generator, Any]:
    """Load a model for generation.

    Args:
        args: The parsed options.

    Returns:
        The generator and the model's tokenizer.

    Raises:
        ConfigError: The model has no tokenizer.
    """
    from halfbyte.evaluate.loading import load_tokenizer
    from halfbyte.integrations.generation import Generator
    from halfbyte.integrations.load import load_model

    model = load_model(
        args.model, dtype=args.dtype, device=args.device, activations=args.activations
    )
    tokenizer = load_tokenizer(args.model)
    if tokenizer is None:
        raise ConfigError(
            f"Cannot generate text with '{args.model}': it has no tokenizer. Copy the tokenizer "
            "files of the base model into it."
        )
    return Generator(model, head_bits=args.head_bits), tokenizer


def report_timing(generator: Generator, timing: Timing, num_tokens: int) -> None:
    """Print the speed, and what ran the model, on stderr."""
    err_console.print(
        f"{timing.prompt_tokens} prompt tokens at {timing.prompt_rate:.0f}/s, first token after "
        f"{timing.prompt_seconds * 1000:.0f} ms; {num_tokens} generated at {timing.rate:.1f}/s; "
        f"{generator.describe_decoding()}",
        style="dim",
        soft_wrap=True,
    )
