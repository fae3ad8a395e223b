"""Compare Transformers' continuous batching with halfbyte's engine: speed and fault isolation.

Greedy decoding of the same prompts and lengths with 1 and 8 concurrent requests, arms in turn. Then
one invalid request among valid ones: how many of these are answered.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

import halfbyte
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Generated, TokenRequest
from halfbyte.serve.engine.engine import EmbeddedEngine
from halfbyte.serve.engine.loading import open_engine
from record import save_result

PROMPT_TOKENS = 32
PAGE_TOKENS = 32
GOOD = 4
LARGEST_BATCH = 256
"""The default of 8192 tokens allocates gigabytes for a dense mask on a CPU."""


def main() -> None:
    """Measure all arms in turn, save the rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    model = halfbyte.load(arguments.model)
    engine = open_engine(arguments.model, EngineConfig(cache_gb=0.2))
    manager = start_manager(model, 8 * (PROMPT_TOKENS + arguments.tokens) // PAGE_TOKENS + 16)
    engines = {
        "continuous batching": partial(run_manager, manager),
        "halfbyte": partial(run_engine, engine),
    }
    arms = {
        f"{name}, {count}": partial(run, count, arguments.tokens)
        for name, run in engines.items()
        for count in (1, 8)
    }
    rates: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(arguments.rounds + 1):
        for name, run in arms.items():
            rate = run(turn)
            if turn:  # the first round warms up
                rates[name].append(rate)
    manager.stop(block=True)
    asyncio.run(engine.close())
    together, later = count_survivors(model)
    save_result(
        "continuous-batching",
        columns=["engine, requests at the same time", "tokens/s, all together"],
        rows=[[name, statistics.median(found)] for name, found in rates.items()],
        note=f"Greedy, {PROMPT_TOKENS} prompt tokens and {arguments.tokens} generated each, prompt "
        f"and all; medians of {arguments.rounds} rounds, arms in turn. Beside one request that "
        f"does not fit the cache, continuous batching answered {together} of {GOOD} good ones, and "
        f"{later} of {GOOD} that came after it.",
        data={"rates": rates, "beside": together, "later": later},
    )
    for name, found in rates.items():
        print(name, [round(rate, 1) for rate in found])
    print(f"of {GOOD} valid requests answered: {together} with an invalid one, {later} after it")


def make_prompt(index: int, turn: int) -> list[int]:
    """Return a prompt that shares no prefix with another one."""
    return [(7919 * (i + 1) + 31 * index + 1009 * turn) % 40000 + 100 for i in range(PROMPT_TOKENS)]


def start_manager(model: torch.nn.Module, blocks: int):
    """Start the manager with cache and batch sizes that suit a CPU."""
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=64),
        continuous_batching_config=ContinuousBatchingConfig(
            page_size=PAGE_TOKENS, num_blocks=blocks, max_batch_tokens=LARGEST_BATCH
        ),
    )
    manager.start()
    return manager


def run_manager(manager, requests: int, tokens: int, turn: int) -> float:
    """Return the tokens per second of concurrent requests in Transformers."""
    start = time.perf_counter()
    for index in range(requests):
        manager.add_request(make_prompt(index, turn), max_new_tokens=tokens)
    done = 0
    while done < requests:
        result = manager.get_result(timeout=60)
        assert result is not None, "no answer within 60 s"
        assert len(result.generated_tokens) == tokens
        done += 1
    return requests * tokens / (time.perf_counter() - start)


def run_engine(engine: EmbeddedEngine, requests: int, tokens: int, turn: int) -> float:
    """Return the tokens per second of concurrent requests in halfbyte's engine."""

    async def ask(index: int) -> int:
        request = TokenRequest(
            prompt=tuple(make_prompt(index, turn)),
            max_new_tokens=tokens,
            temperature=0.0,
            ignore_end=True,
        )
        events = [event async for some in engine.generate(request) for event in some]
        return sum(isinstance(event, Generated) for event in events)

    async def ask_all() -> list[int]:
        return list(await asyncio.gather(*(ask(index) for index in range(requests))))

    start = time.perf_counter()
    assert asyncio.run(ask_all()) == [tokens] * requests
    return requests * tokens / (time.perf_counter() - start)


def count_survivors(model: torch.nn.Module) -> tuple[int, int]:
    """Count valid requests answered together with one that exceeds the cache, and after it."""
    manager = start_manager(model, 4 * GOOD)

    def ask(index: int) -> str | None:
        return manager.add_request(make_prompt(index, 0), max_new_tokens=40)

    def count(ids: list[str | None]) -> int:
        found = [manager.get_result(timeout=1) for _ in range(15)]
        answers = [result for result in found if result is not None and result.request_id in ids]
        return sum(
            result.error is None and len(result.generated_tokens) == 40 for result in answers
        )

    ids = [ask(index) for index in range(GOOD)]
    manager.add_request(make_prompt(9, 0) * 20, max_new_tokens=4)
    together = count(ids)
    later = count([ask(index) for index in range(GOOD)])
    manager.stop(block=True)
    return together, later


if __name__ == "__main__":
    main()
