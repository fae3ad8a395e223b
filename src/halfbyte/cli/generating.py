"""Options and steps that the generating verbs share: generate, chat and bench."""

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
    """Add the options that say which model and how to run it.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a model, GPTQ or not")
    parser.add_argument(
        "--head-bits",
        type=int,
        default=16,
        choices=HEAD_BITS,
        help="on a CPU: 16 keeps the head as stored, 8 or 4 rounds a copy, which is read faster "
        "(default: %(default)s)",
    )
    add_activations_argument(parser)
    add_computing_arguments(parser, auto=FAST)


def add_activations_argument(parser: argparse.ArgumentParser) -> None:
    """Add the option that says what quantized layers multiply by.

    Args:
        parser: The verb's parser.
    """
    parser.add_argument(
        "--activations",
        default="float",
        choices=ACTIVATIONS,
        help="on a CPU: int8 rounds the input of quantized layers, which is less exact, and faster "
        "where there are no matrix units (`halfbyte bench` says by how much; default: %(default)s)",
    )


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, temperature: float, max_new_tokens: int
) -> None:
    """Add the options that say how tokens are drawn.

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
        help="stop after so many tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 takes the likeliest token, 1 draws as the model says (default: %(default)s)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="draw among the likeliest tokens of this total probability (default: %(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the drawing (default: %(default)s)"
    )


def make_sampling(args: argparse.Namespace) -> Sampling:
    """Put the drawing options together.

    Args:
        args: What the parser returned.

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
    """Read from the standard input.

    Args:
        read: Reads as much as is wanted.

    Returns:
        The text.

    Raises:
        ConfigError: It is no text.
    """
    if isinstance(sys.stdin, io.TextIOWrapper) and sys.stdin.errors != "surrogateescape":
        # As the arguments come: bytes that are no text are told by check_text. Before the first
        # line only: a pipe that was read from cannot be changed.
        sys.stdin.reconfigure(errors="surrogateescape")
    return check_text(read(), "standard input")


def check_text(text: str, source: str) -> str:
    """Refuse bytes that are no text, which the system passes on as they are.

    Args:
        text: From outside.
        source: Where it is from, for the message.

    Returns:
        The same text.

    Raises:
        ConfigError: A character of it stands for such a byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(
            f"The text from {source} is not {sys.stdin.encoding or 'UTF-8'}: it has a byte "
            f"0x{ord(text[error.start]) & 0xFF:02x} behind {error.start} characters. Convert it "
            "(iconv -t UTF-8), or set PYTHONUTF8=1."
        ) from error
    return text


def open_generator(args: argparse.Namespace) -> tuple[Generator, Any]:
    """Load the model and choose how it generates.

    Args:
        args: What the parser returned.

    Returns:
        The generator and the model's tokenizer.
    """
    from transformers import AutoTokenizer

    from halfbyte.integrations.generation import Generator
    from halfbyte.integrations.load import load_model

    model = load_model(
        args.model, dtype=args.dtype, device=args.device, activations=args.activations
    )
    generator = Generator(model, head_bits=args.head_bits)
    return generator, AutoTokenizer.from_pretrained(args.model)


def report_timing(generator: Generator, timing: Timing, num_tokens: int) -> None:
    """Say on stderr how fast it was, and why no faster."""
    err_console.print(
        f"{timing.prompt_tokens} prompt tokens at {timing.prompt_rate:.0f}/s, first token after "
        f"{timing.prompt_seconds * 1000:.0f} ms; {num_tokens} generated at {timing.rate:.1f}/s; "
        f"{generator.describe_decoding()}",
        style="dim",
        soft_wrap=True,
    )
