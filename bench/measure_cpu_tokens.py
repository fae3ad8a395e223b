"""Compare the tokens of the compiled decoder with those of Transformers' forward.

Greedy, in float32, from pieces of the shipped evaluation text; the reference is the dequantized
model. Where two texts diverge, the gap between the reference's logits shows whether it is a tie
within rounding or an error.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

import halfbyte
from halfbyte.data import evaluation_text
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.nn.replace import dequantize_linears
from record import save_result

PROMPT_TOKENS = 32


def main() -> None:
    """Generate with both, compare, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = tokenizer(evaluation_text())["input_ids"]
    starts = [i * len(ids) // arguments.prompts for i in range(arguments.prompts)]
    prompts = [ids[start : start + PROMPT_TOKENS] for start in starts]
    sampling = Sampling(max_new_tokens=arguments.tokens)
    model = halfbyte.load(arguments.model, dtype=torch.float32)
    found = generate_all(Generator(model), prompts, sampling)
    # The weights that the reference kernel computes with, dequantized once and not per token.
    dequantize_linears(model, torch.float32)
    expected = generate_all(Generator(model, native=False), prompts, sampling)
    divergences = []
    for prompt, ours, theirs in zip(prompts, found, expected, strict=True):
        if ours != theirs:
            position = next(i for i in range(len(ours)) if ours[i] != theirs[i])
            with torch.inference_mode():
                logits = model(torch.tensor([prompt + theirs[:position]])).logits[0, -1]
            gap = float(logits[theirs[position]] - logits[ours[position]])
            divergences.append({"at": position, "gap": gap, "largest": float(logits.abs().max())})
    same = len(prompts) - len(divergences)
    print(f"{same} of {len(prompts)} the same; {divergences}")
    save_result(
        "cpu-tokens",
        columns=["prompts", "tokens each", "the same", "largest gap between the two, logits"],
        rows=[
            [
                len(prompts),
                arguments.tokens,
                same,
                max((found["gap"] for found in divergences), default=0.0),
            ]
        ],
        note="Greedy, float32: the compiled decoder beside the dequantized model under "
        "Transformers' forward; the gap is that of the reference's logits where texts part.",
        data={"partings": divergences},
    )


def generate_all(
    generator: Generator, prompts: list[list[int]], sampling: Sampling
) -> list[list[int]]:
    """Generate after each prompt, ignoring end-of-text tokens."""
    generator.ends = frozenset()
    return [list(generator.stream(prompt, sampling)) for prompt in prompts]


if __name__ == "__main__":
    main()
