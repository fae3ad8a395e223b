"""The verb `generate`."""

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
from halfbyte.cli.output import print_json

HELP = "continue a prompt, or answer it"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    add_model_arguments(parser)
    parser.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to go on from; - reads it from stdin"
    )
    parser.add_argument(
        "--answer", action="store_true", help="put the prompt to a chat model as a question"
    )
    add_sampling_arguments(parser, temperature=0.0, max_new_tokens=256)
    parser.add_argument("--json", action="store_true", help="print JSON for programs, at the end")


def run(args: argparse.Namespace) -> int:
    """Generate and print while it comes."""
    from halfbyte.integrations.generation import TextStream, Timing, encode_chat

    sampling = make_sampling(args)
    if args.prompt == "-":
        prompt = read_input(lambda: sys.stdin.read())
    else:
        prompt = check_text(args.prompt, "--prompt")
    generator, tokenizer = open_generator(args)
    if args.answer:
        ids = encode_chat(tokenizer, [{"role": "user", "content": prompt}])
    else:
        ids = list(tokenizer(prompt)["input_ids"])
    timing = Timing(prompt_tokens=len(ids))
    stream, pieces, tokens = TextStream(tokenizer), [], []

    def put_out(piece: str) -> None:
        pieces.append(piece)
        if not args.json:
            sys.stdout.write(piece)
            sys.stdout.flush()

    for token in generator.stream(ids, sampling, timing):
        tokens.append(token)
        put_out(stream.add(token))
    put_out(stream.finish())
    if args.json:
        print_json(
            {
                "text": "".join(pieces),
                "tokens": tokens,
                "prompt_tokens": len(ids),
                "prompt_tokens_per_second": timing.prompt_rate,
                "tokens_per_second": timing.rate,
                "first_token_seconds": timing.prompt_seconds,
                "compiled_decoder": generator.obstacle is None,
                "why_not": generator.obstacle,
                "way": generator.describe_decoding(),
            }
        )
    else:
        sys.stdout.write("\n")
        report_timing(generator, timing, len(tokens))
    return 0
