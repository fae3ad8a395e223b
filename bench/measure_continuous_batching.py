"""Could Transformers' continuous batching be the engine? Its speed beside the compiled decoder.

Greedy, the same prompts and lengths: the manager with 1 and with 8 requests at the same time, and
Generator, one request after the other. Then one bad request beside a good one: who survives it.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import halfbyte
from halfbyte.integrations.generation import Generator, Sampling, Timing
from record import save_result

PROMPT_TOKENS = 32
PAGE_TOKENS = 32
LARGEST_BATCH = 256
"""Its default of 8192 tokens makes a dense mask of gigabytes on a CPU."""


def main() -> None:
    """Measure all arms in turn, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model = halfbyte.load(arguments.model)
    rates: dict[str, list[float]] = {"manager, 1": [], "manager, 8": [], "compiled decoder, 1": []}
    generator = Generator(model)
    generator.ends = frozenset()
    manager = start_manager(
        model, blocks=8 * (PROMPT_TOKENS + arguments.tokens) // PAGE_TOKENS + 16
    )
    for turn in range(arguments.rounds + 1):
        found = {
            "manager, 1": run_manager(manager, 1, arguments.tokens, turn),
            "manager, 8": run_manager(manager, 8, arguments.tokens, turn),
            "compiled decoder, 1": run_generator(generator, arguments.tokens, turn),
        }
        if turn:  # the first one warms up
            for name, rate in found.items():
                rates[name].append(rate)
    manager.stop(block=True)
    survivors = count_survivors(model)
    save_result(
        "continuous-batching",
        columns=["engine, requests at the same time", "tokens/s, all together"],
        rows=[[name, statistics.median(found)] for name, found in rates.items()],
        note=f"Greedy, {PROMPT_TOKENS} prompt tokens and {arguments.tokens} generated each, prompt "
        f"and all; medians of {arguments.rounds} rounds, arms in turn. Beside one request that "
        f"does not fit its cache, {survivors} of 1 good request was answered.",
        data={"rates": rates, "survivors": survivors},
    )
    for name, found in rates.items():
        print(name, [round(rate, 1) for rate in found])
    print("survivors of a bad request:", survivors)


def make_prompt(index: int, turn: int) -> list[int]:
    """Give ids that no other prompt begins with."""
    return [(7919 * (i + 1) + 31 * index + 1009 * turn) % 40000 + 100 for i in range(PROMPT_TOKENS)]


def start_manager(model: torch.nn.Module, blocks: int):
    """Start the manager with a cache and a batch that suit a CPU."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=blocks, max_batch_tokens=LARGEST_BATCH
        ),
    )
    manager.start()
    return manager


def run_manager(manager, requests: int, tokens: int, turn: int) -> float:
    """Give tokens per second of so many requests together."""
    start = time.perf_counter()
    for index in range(requests):
        manager.add_request(make_prompt(index, turn), max_new_tokens=tokens)
    done = 0
    while done < requests:
        result = manager.get_result(timeout=60)
        assert result is not None, "no answer within a minute"
        assert len(result.generated_tokens) == tokens
        done += 1
    return requests * tokens / (time.perf_counter() - start)


def run_generator(generator: Generator, tokens: int, turn: int) -> float:
    """Give tokens per second of one request by `halfbyte generate`'s way."""
    start = time.perf_counter()
    timing = Timing(prompt_tokens=PROMPT_TOKENS)
    list(generator.stream(make_prompt(0, turn), Sampling(max_new_tokens=tokens), timing))
    return tokens / (time.perf_counter() - start)


def count_survivors(model: torch.nn.Module) -> int:
    """Ask one thing that fits the cache and one that does not; count the good answers."""
    manager = start_manager(model, blocks=8)
    good = manager.add_request(make_prompt(0, 0), max_new_tokens=40)
    manager.add_request(make_prompt(1, 0) * 20, max_new_tokens=4)
    answers = 0
    for _ in range(20):
        result = manager.get_result(timeout=1)
        if result is not None and result.request_id == good and result.error is None:
            answers += 1
            break
    manager.stop(block=True)
    return answers


if __name__ == "__main__":
    main()
