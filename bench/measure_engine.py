"""How fast the serving engine is with several requests at the same time, and whether it errs.

Greedy answers of equal length to prompts that share nothing, as many at the same time as the arm
says; arms in turn. Then the memory of the process while requests of mixed lengths come and go,
beside what was planned. Then answers to pieces of the shipped evaluation text, all at once, beside
those of `halfbyte generate` one by one; in float32 beside those of generate() as well.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import AutoTokenizer

from halfbyte.data import evaluation_text
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.integrations.load import load_model
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Generated, TokenRequest
from halfbyte.serve.engine.engine import EmbeddedEngine
from halfbyte.serve.engine.loading import open_engine
from record import save_result

PROMPT_TOKENS = 32
SAME_REQUESTS = 16
CONCURRENT = (1, 2, 4, 8, 16)


def main() -> None:
    """Measure all arms in turn, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mixed-seconds", type=float, default=60)
    parser.add_argument("--runner", default="auto")
    arguments = parser.parse_args()
    asyncio.run(measure(arguments))


async def measure(arguments: argparse.Namespace) -> None:
    """Take all measurements with one engine."""
    engine = open_engine(arguments.model, EngineConfig(runner=arguments.runner, cache_gb=0.5))
    rates: dict[int, list[float]] = {count: [] for count in CONCURRENT}
    for turn in range(arguments.rounds + 1):
        for count in CONCURRENT:
            rate = await run_together(engine, count, arguments.tokens, turn)
            if turn:  # the first one warms up
                rates[count].append(rate)
    memory = await run_mixed(engine, arguments.mixed_seconds)
    planned = engine.info.planned_bytes
    await engine.close()
    same = {dtype: await count_same(arguments.model, dtype) for dtype in ("bfloat16", "float32")}
    gains = [
        statistics.median(a / b for a, b in zip(rates[c], rates[1], strict=True)) for c in rates
    ]
    peak = max(memory) if memory else 0
    save_result(
        "engine",
        columns=["requests at the same time", "tokens/s, all together", "of one's"],
        rows=[
            [count, statistics.median(rates[count]), gain]
            for count, gain in zip(rates, gains, strict=True)
        ],
        note=f"{engine.info.runner}; {torch.get_num_threads()} threads; greedy, {PROMPT_TOKENS} "
        f"prompt tokens and {arguments.tokens} generated each, prompts in the time; medians "
        f"of {arguments.rounds} rounds, arms in turn, gains paired. Memory over "
        f"{arguments.mixed_seconds:.0f} s of mixed requests: "
        f"{peak / 1e6:.0f} MB at most, {planned / 1e6:.0f} planned. Of {SAME_REQUESTS} answers at "
        f"the same time, the same as alone: {same}.",
        data={
            "rates": {str(count): found for count, found in rates.items()},
            "memory": memory,
            "planned": planned,
            "same": same,
            "load": psutil.getloadavg(),
        },
    )
    for count, gain in zip(rates, gains, strict=True):
        print(f"{count}: {statistics.median(rates[count]):.1f} tokens/s, {gain:.2f} times one's")
    print(f"the same: {same}")
    print(f"memory {[round(value / 1e6) for value in memory]} MB, planned {planned / 1e6:.0f}")


def make_request(generator: random.Random, prompt_tokens: int, tokens: int) -> TokenRequest:
    """Give a request whose prompt nobody had."""
    prompt = tuple(generator.randrange(100, 40000) for _ in range(prompt_tokens))
    return TokenRequest(prompt=prompt, max_new_tokens=tokens, temperature=0.0, ignore_end=True)


async def count_tokens(engine: EmbeddedEngine, request: TokenRequest) -> int:
    """Take an answer."""
    events = [event async for some in engine.generate(request) for event in some]
    return sum(isinstance(event, Generated) for event in events)


async def run_together(engine: EmbeddedEngine, count: int, tokens: int, turn: int) -> float:
    """Give tokens per second of so many requests together."""
    generator = random.Random(1000 * turn + count)
    requests = [make_request(generator, PROMPT_TOKENS, tokens) for _ in range(count)]
    start = time.perf_counter()
    found = await asyncio.gather(*(count_tokens(engine, request) for request in requests))
    return sum(found) / (time.perf_counter() - start)


async def run_mixed(engine: EmbeddedEngine, seconds: float) -> list[int]:
    """Let 16 clients ask for mixed lengths, a tenth of them leaving; give memory over time."""
    end = time.monotonic() + seconds
    memory = []

    async def ask(seed: int) -> None:
        generator = random.Random(seed)
        while time.monotonic() < end:
            lengths = generator.randrange(1, 400), generator.randrange(1, 100)
            answer = engine.generate(make_request(generator, *lengths))
            leaves = generator.random() < 0.1
            async for events in answer:
                if leaves and any(isinstance(event, Generated) for event in events):
                    break
            await answer.aclose()

    async def watch() -> None:
        while time.monotonic() < end:
            memory.append(psutil.Process().memory_info().rss)
            await asyncio.sleep(seconds / 20)

    await asyncio.gather(watch(), *(ask(seed) for seed in range(16)))
    return memory


async def count_same(folder: Path, dtype: str) -> dict[str, int]:
    """Count answers, asked for all at once, that are those of other ways, asked one by one."""
    ids = AutoTokenizer.from_pretrained(folder)(evaluation_text())["input_ids"]
    draw = random.Random(5)
    requests = []
    for _ in range(SAME_REQUESTS):
        start, length = draw.randrange(len(ids) - 200), draw.randrange(1, 200)
        requests.append(
            TokenRequest(
                prompt=tuple(ids[start : start + length]),
                max_new_tokens=draw.randrange(1, 40),
                temperature=0.0,
                ignore_end=True,
            )
        )

    async def answer(request: TokenRequest) -> list[int]:
        events = [event async for some in engine.generate(request) for event in some]
        return [event.scored.token for event in events if isinstance(event, Generated)]

    engine = open_engine(folder, EngineConfig(dtype=dtype, cache_gb=0.4))
    found = await asyncio.gather(*(answer(request) for request in requests))
    await engine.close()
    model = load_model(folder, dtype=dtype)
    model.generation_config.eos_token_id = None
    generator = Generator(model)
    ways = {
        "halfbyte generate": [
            list(generator.stream(r.prompt, Sampling(max_new_tokens=r.max_new_tokens)))
            for r in requests
        ]
    }
    if dtype == "float32":
        ways["generate()"] = [generate_alone(model, request) for request in requests]
    return {
        name: sum(ours == theirs for ours, theirs in zip(found, expected, strict=True))
        for name, expected in ways.items()
    }


def generate_alone(model: Any, request: TokenRequest) -> list[int]:
    """Let Transformers answer."""
    prompt = torch.tensor([request.prompt])
    text = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=request.max_new_tokens,
        do_sample=False,
    )
    return text[0, prompt.shape[1] :].tolist()


if __name__ == "__main__":
    main()
