"""The verb `chat`."""

from __future__ import annotations

import argparse
import sys

from halfbyte.cli.generating import (
    add_model_arguments,
    add_sampling_arguments,
    check_text,
    make_sampling,
    open_generator,
    read_input,
    report_timing,
)
from halfbyte.cli.output import console, err_console

HELP = "chat with a model"

HINT = "/new starts a new conversation; /exit or end of input (Ctrl-D) quits."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model_arguments(parser)
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    add_sampling_arguments(parser, temperature=0.7, max_new_tokens=1024)


def run(args: argparse.Namespace) -> int:
    """Answer line by line until the input ends."""
    from halfbyte.integrations.generation import TextStream, Timing, encode_chat

    sampling = make_sampling(args)
    system = check_text(args.system or "", "--system")
    generator, tokenizer = open_generator(args)
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    err_console.print(HINT, style="dim")
    while (line := _read_line()) is not None:
        if line in ("/exit", "/quit"):
            break
        if line == "/new":
            messages = list(opening)
        if not line or line == "/new":
            continue
        messages.append({"role": "user", "content": line})
        ids = encode_chat(tokenizer, messages)
        timing, stream, pieces = Timing(prompt_tokens=len(ids)), TextStream(tokenizer), []
        try:
            for token in generator.stream(ids, sampling, timing):
                pieces.append(stream.add(token))
                console.print(pieces[-1], end="", soft_wrap=True)
                sys.stdout.flush()
        except KeyboardInterrupt:
            err_console.print(" (stopped)", style="dim", end="")
        num_tokens = len(pieces)
        pieces.append(stream.finish())
        console.print(pieces[-1], soft_wrap=True)
        if timing.prompt_seconds:
            report_timing(generator, timing, num_tokens)
        messages.append({"role": "assistant", "content": "".join(pieces)})
    return 0


def _read_line() -> str | None:
    """Read one line of input; None at its end."""
    try:
        if sys.stdin.isatty():
            return read_input(lambda: err_console.input("> ")).strip()
        line = read_input(lambda: sys.stdin.readline())
    except EOFError:
        return None
    return line.strip() if line else None
