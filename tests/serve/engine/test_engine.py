"""The embedded engine through its interface: real threads, real asyncio, a real (tiny) model."""

from __future__ import annotations

import asyncio
import math
import time
import weakref

import pytest
import torch
from tests.serve.helpers_engine import (
    VOCABULARY,
    all_tokens,
    ask,
    collect,
    generate_greedily,
    load_float32,
    mixed_requests,
    open_tiny,
    runners,
    tokens_of,
    write_model,
)

from halfbyte.errors import ServeError
from halfbyte.serve.engine.contract import Ended, Generated

pytestmark = pytest.mark.parametrize("runner", runners())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def model(folder):
    return load_float32(folder)


def test_sixteen_concurrent_requests_match_generate(folder, model, runner):
    requests = mixed_requests(16)
    expected = [generate_greedily(model, request) for request in requests]

    async def run():
        async with open_tiny(folder, runner, max_batched_tokens=24) as engine:
            return await all_tokens(engine, requests)

    assert asyncio.run(run()) == expected


def test_sequential_and_concurrent_answers_match(folder, runner):
    requests = mixed_requests(8, seed=3, temperature=1.0, top_p=0.9)
    requests = [
        type(request)(**{**_values(request), "seed": i}) for i, request in enumerate(requests)
    ]

    async def run():
        async with open_tiny(folder, runner, max_batched_tokens=16, share_prefixes=False) as engine:
            together = await all_tokens(engine, requests)
            one_by_one = [await tokens_of(engine, request) for request in requests]
            return together, one_by_one

    together, one_by_one = asyncio.run(run())
    assert together == one_by_one


def _values(request):
    return {name: getattr(request, name) for name in request.__slots__}


def test_concurrent_identical_prompts_are_prefilled_once(folder, runner):
    prompt = list(range(10, 80))

    async def run():
        async with open_tiny(folder, runner, max_batched_tokens=16) as engine:
            requests = [ask(prompt, 8, temperature=1.0, seed=seed) for seed in range(4)]
            answers = await asyncio.gather(*(collect(engine, request) for request in requests))
            return [events[0].cached_tokens for events in answers]

    assert asyncio.run(run()) == [0, 64, 64, 64]


def test_long_prompt_does_not_stall_a_running_answer(folder, runner):
    async def run():
        async with open_tiny(folder, runner, max_batched_tokens=16, max_sequences=4) as engine:
            times = {}

            async def note(name, request):
                async for events in engine.generate(request):
                    for event in events:
                        times.setdefault(name, []).append(type(event).__name__)
                        order.append((name, type(event).__name__))

            order = []
            first = asyncio.create_task(note("short", ask([5, 6, 7], 60)))
            while not any(kind == "Generated" for _, kind in order):
                await asyncio.sleep(0)
            long = asyncio.create_task(note("long", ask(range(3, 203), 4)))
            await asyncio.gather(first, long)
            read = order.index(("long", "Prefilled"))
            began = order.index(("short", "Generated"))
            return order[began:read].count(("short", "Generated"))

    # 200 tokens in pieces of 15 beside one of the answer: 14 steps.
    assert asyncio.run(run()) >= 12


def test_prompt_logprobs_match_the_model(folder, model, runner):
    prompt = list(range(10, 50))
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0].float()
    logprobs = torch.log_softmax(logits, -1)

    async def run():
        async with open_tiny(folder, runner, max_batched_tokens=16) as engine:
            await tokens_of(engine, ask(prompt, 1))
            return await collect(engine, ask(prompt, 0, prompt_logprobs=3)), await collect(
                engine, ask(prompt, 1, prompt_logprobs=0, top_logprobs=2)
            )

    (prefilled, ended), (again, generated, _) = asyncio.run(run())
    assert ended == Ended(reason="length")
    assert prefilled.scored_prompt[0] is None
    assert len(prefilled.scored_prompt) == len(prompt) == len(again.scored_prompt)
    for place, scored in enumerate(prefilled.scored_prompt[1:]):
        assert scored.token == prompt[place + 1]
        assert math.isclose(scored.logprob, logprobs[place, scored.token], abs_tol=2e-3)
        values, ids = logprobs[place].topk(3)
        assert [token for token, _ in scored.top] == ids.tolist()
        assert [p for _, p in scored.top] == pytest.approx(values.tolist(), abs=2e-3)
    assert all(scored.top == () for scored in again.scored_prompt[1:])
    assert generated.scored.logprob == pytest.approx(float(logprobs[-1].max()), abs=2e-3)
    assert generated.scored.top[0] == (generated.scored.token, generated.scored.logprob)
    entropy = float(-(logprobs[-1].exp() * logprobs[-1]).sum())
    assert generated.entropy == pytest.approx(entropy, abs=5e-3)


def test_the_models_end_of_text_and_stop_tokens_end_an_answer(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            free = await tokens_of(engine, ask([7, 8, 9], 12))
            stop = free[5]
            cut = await collect(engine, ask([7, 8, 9], 12, stop_tokens=frozenset([stop])))
            # A bias that makes the end of text the likeliest.
            bias = {2: 100.0}
            over = await collect(engine, ask([7, 8, 9], 12, logit_bias=bias, ignore_end=False))
            on = await tokens_of(engine, ask([7, 8, 9], 3, logit_bias=bias))
            return free, stop, cut, over, on

    free, stop, cut, over, on = asyncio.run(run())
    before = free[: free.index(stop)]
    assert [event.scored.token for event in cut[1:-1]] == before
    assert cut[-1] == Ended(reason="stop_token", stop_token=stop)
    assert over[1:] == [Ended(reason="end")]
    assert on == [2, 2, 2]


def test_invalid_requests_are_rejected_and_others_unaffected(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            good = asyncio.create_task(tokens_of(engine, ask([5, 6], 40)))
            errors = {}
            for name, request in {
                "long": ask(range(3, 203), 100),
                "empty": ask([], 4),
                "unknown": ask([5, VOCABULARY], 4),
                "bias": ask([5], 4, logit_bias={-1: 1.0}),
                "cold": ask([5], 4, temperature=-1.0),
                "nan": ask([5], 4, top_p=math.nan),
                "adapter": ask([5], 4, adapter="mine"),
            }.items():
                with pytest.raises(ServeError) as caught:
                    await collect(engine, request)
                errors[name] = caught.value
            return errors, await good

    errors, good = asyncio.run(run())
    assert len(good) == 40
    assert errors["long"].code == "context_length_exceeded"
    assert "needs 300 tokens (200 of the prompt, 100 of the answer)" in str(errors["long"])
    assert "the model's context is 256 tokens" in str(errors["long"])
    assert errors["unknown"].param == "prompt"
    assert "the model's vocabulary of 0 to 383" in str(errors["unknown"])
    assert errors["bias"].param == "logit_bias"
    assert "temperature is -1.0; it must be from 0 to 100" in str(errors["cold"])
    assert errors["nan"].param == "top_p"
    assert errors["adapter"].status == 404
    assert all(error.status == 400 for name, error in errors.items() if name != "adapter")


def test_requests_wait_for_cache_space(folder, model, runner):
    requests = mixed_requests(24, seed=5)
    expected = [generate_greedily(model, request) for request in requests]

    async def run():
        # 256 tokens of cache: about four of the requests at the same time.
        async with open_tiny(folder, runner, cache_gb=256 * 512 / 1e9) as engine:
            assert engine.info.bytes_per_token == 512
            most = 0

            async def watch():
                nonlocal most
                while True:
                    most = max(most, engine.load().cache_used_bytes)
                    await asyncio.sleep(0)

            watcher = asyncio.create_task(watch())
            found = await all_tokens(engine, requests)
            watcher.cancel()
            return found, most, engine.info.cache_bytes, engine.load()

    found, most, whole, load = asyncio.run(run())
    assert found == expected
    assert 0 < most <= whole == 256 * 512
    assert (load.running, load.waiting, load.cache_used_bytes) == (0, 0, 0)


def test_closing_an_answer_frees_its_pages(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            answer = engine.generate(ask([5, 6], 200))
            async for events in answer:
                if any(isinstance(event, Generated) for event in events):
                    break
            during = engine.load().cache_used_bytes
            await answer.aclose()
            start = time.monotonic()
            while engine.load().cache_used_bytes and time.monotonic() - start < 5:
                await asyncio.sleep(0.001)
            return during, engine.load()

    during, after = asyncio.run(run())
    assert during == 208 * 512
    assert (after.running, after.cache_used_bytes) == (0, 0)


def test_a_deadline_ends_an_answer_with_408(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            with pytest.raises(ServeError) as caught:
                await collect(engine, ask([5, 6], 250, deadline=time.monotonic() + 0.02))
            later = await tokens_of(engine, ask([5, 6], 4))
            return caught.value, later

    error, later = asyncio.run(run())
    assert (error.status, error.code) == (408, "deadline_exceeded")
    assert len(later) == 4


def test_full_queue_is_rejected_with_retry_after(folder, runner):
    async def run():
        async with open_tiny(folder, runner, max_sequences=1, max_queue=2) as engine:
            tasks = [asyncio.create_task(tokens_of(engine, ask([5], 60))) for _ in range(12)]
            return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(run())
    refused = [error for error in found if isinstance(error, ServeError)]
    assert 1 <= len(refused) <= 10
    assert all((error.status, error.code) == (429, "queue_full") for error in refused)
    assert all(1 <= error.retry_after <= 60 for error in refused)
    assert all(len(answer) == 60 for answer in found if isinstance(answer, list))


def test_closing_finishes_requests_and_rejects_new_ones(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            answer = asyncio.create_task(tokens_of(engine, ask([5, 6], 100)))
            while not engine.load().running:
                await asyncio.sleep(0)
            closing = asyncio.create_task(engine.close())
            await asyncio.sleep(0)
            with pytest.raises(ServeError, match="shutting down") as caught:
                await collect(engine, ask([5], 4))
            await closing
            return caught.value.status, await answer

    status, answer = asyncio.run(run())
    assert status == 503
    assert len(answer) == 100


def test_closed_engine_rejects_adapters_and_frees_its_model(folder, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            await tokens_of(engine, ask([5, 6], 4))
            runner_of_it = weakref.ref(engine._runner)
        for change in (engine.load_adapter("red", "."), collect(engine, ask([5], 4))):
            with pytest.raises(ServeError, match="shutting down"):
                await asyncio.wait_for(change, 5)
        await engine.close()
        return runner_of_it()

    assert asyncio.run(run()) is None
