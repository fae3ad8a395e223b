"""The compiled decoder gives the same results in the engine as by itself, bit by bit."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.helpers.native import NEEDS_LIBRARY
from tests.serve.helpers_engine import (
    all_tokens,
    ask,
    collect,
    load_float32,
    mixed_requests,
    open_tiny,
    write_model,
)

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.engine.contract import Generated
from halfbyte.serve.engine.loading import make_engine

pytestmark = NEEDS_LIBRARY


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("head_bits", [16, 8])
def test_sixteen_concurrent_requests_match_generate_in_bfloat16(folder, head_bits):
    requests = mixed_requests(16, seed=11, longest=60)
    generator = Generator(halfbyte.load(folder, dtype=torch.bfloat16), head_bits=head_bits)
    generator.ends = frozenset()
    expected = [
        list(generator.stream(r.prompt, Sampling(max_new_tokens=r.max_new_tokens)))
        for r in requests
    ]

    async def run():
        model = halfbyte.load(folder, dtype=torch.bfloat16)
        config = EngineConfig(cache_gb=0.002, step_tokens=32, head_bits=head_bits)
        engine = make_engine(model, folder, config)
        assert engine.info.runner.startswith("compiled decoder")
        found = await all_tokens(engine, requests)
        await engine.close()
        return found

    assert asyncio.run(run()) == expected


def test_results_are_bitwise_independent_of_cache_batch_and_failures(folder):
    shared = list(range(20, 75))
    requests = [ask([*shared, 100 + i], 12, top_logprobs=5) for i in range(6)]

    async def run(*, kill=(), **settings):
        async with open_tiny(folder, "native", **settings) as engine:
            steps = iter(range(10**6))
            run_pieces = engine._runner.run

            def broken(pieces):
                if next(steps) in kill:
                    raise RuntimeError("killed")
                return run_pieces(pieces)

            engine._runner.run = broken
            answers = await asyncio.gather(*(collect(engine, r) for r in requests))
            again = await asyncio.gather(*(collect(engine, r) for r in requests))
            cached = [events[0].cached_tokens for events in again]
            found = [[e for e in events if isinstance(e, Generated)] for events in answers]
            twice = [[e for e in events if isinstance(e, Generated)] for events in again]
            return found, twice, cached, engine.load().restarts

    one, _, none, _ = asyncio.run(run(sequences=1, share_prefixes=False))
    many, twice, cached, _ = asyncio.run(run(sequences=6, step_tokens=16))
    killed, _, _, restarts = asyncio.run(run(sequences=6, kill=(3, 9)))
    # Logprobs and entropies among them, which are not rounded to tokens.
    assert one == many == twice == killed
    assert none == [0] * 6
    assert cached == [48] * 6
    assert restarts == 2


def test_unsupported_settings_are_rejected_with_the_reason(folder, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    model = load_float32(folder)
    for settings, words in (
        ({"runner": "native"}, "Cannot use the compiled decoder with this model: q_proj"),
        ({"head_bits": 8}, "Cannot use a rounded head with this model: q_proj does not run"),
    ):
        with pytest.raises(ConfigError, match=words):
            make_engine(model, folder, EngineConfig(cache_gb=0.002, **settings))

    async def run():
        engine = make_engine(model, folder, EngineConfig(cache_gb=0.002))
        await engine.close()
        return engine.info.runner

    assert asyncio.run(run()) == (
        "Transformers' forward on cpu: no compiled decoder: q_proj does not run on cpu_native"
    )
