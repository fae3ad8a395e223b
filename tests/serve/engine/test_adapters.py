"""LoRA adapters that are loaded and unloaded while the engine serves."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.serve.helpers_engine import (
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
from halfbyte.serve.engine.contract import Generated, Prefilled

peft = pytest.importorskip("peft")

pytestmark = [
    pytest.mark.parametrize("runner", runners()),
    # PEFT calls what Transformers has deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning"),
    pytest.mark.filterwarnings("ignore:Adapter .* was active which is now deleted:UserWarning"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def adapters(folder, tmp_path_factory):
    """Two random adapters: their folders."""
    made = {}
    for seed, (name, targets) in enumerate(
        {"red": "all-linear", "blue": ["q_proj", "down_proj"]}.items()
    ):
        settings = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
        model = peft.get_peft_model(load_float32(folder), settings)
        generator = torch.Generator().manual_seed(seed)
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.data = torch.randn(parameter.shape, generator=generator) / 6
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
    return made


def expect(folder, adapters, name, requests):
    model = load_float32(folder)
    if name:
        model = peft.PeftModel.from_pretrained(model, adapters[name])
    return [generate_greedily(model, request) for request in requests]


def test_rows_of_different_adapters_in_one_batch(folder, adapters, runner):
    names = [None, "red", "blue", "red", None, "blue", "red", None]
    base = mixed_requests(8, seed=4, longest=20)
    requests = [ask(r.prompt, 10, adapter=n) for r, n in zip(base, names, strict=True)]
    expected = [
        expect(folder, adapters, name, [request])[0]
        for request, name in zip(requests, names, strict=True)
    ]

    async def run():
        async with open_tiny(folder, runner) as engine:
            before = await tokens_of(engine, requests[0])
            for name in ("red", "blue"):
                await engine.load_adapter(name, str(adapters[name]))
            assert engine.adapters == ("red", "blue")
            return before, await all_tokens(engine, requests)

    before, found = asyncio.run(run())
    assert found == expected
    assert before == expected[0]


def test_prefixes_are_not_shared_between_adapters(folder, adapters, runner):
    prompt = list(range(10, 60))

    async def run():
        async with open_tiny(folder, runner) as engine:
            await engine.load_adapter("red", str(adapters["red"]))
            cached = []
            for name in (None, "red", None, "red"):
                events = await collect(engine, ask(prompt, 2, adapter=name))
                assert isinstance(events[0], Prefilled)
                cached.append(events[0].cached_tokens)
            await engine.unload_adapter("red")
            # Another adapter under the same name has other keys and values.
            await engine.load_adapter("red", str(adapters["blue"]))
            events = await collect(engine, ask(prompt, 2, adapter="red"))
            return cached, events

    cached, events = asyncio.run(run())
    assert cached == [0, 0, 48, 48]
    assert events[0].cached_tokens == 0
    found = [event.scored.token for event in events if isinstance(event, Generated)]
    assert found == expect(folder, adapters, "blue", [ask(prompt, 2)])[0]


def test_unloading_waits_for_running_answers(folder, adapters, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            await engine.load_adapter("red", str(adapters["red"]))
            answer = asyncio.create_task(tokens_of(engine, ask([5, 6], 60, adapter="red")))
            while not engine.load().running:
                await asyncio.sleep(0)
            leaving = asyncio.create_task(engine.unload_adapter("red"))
            await asyncio.sleep(0)
            with pytest.raises(ServeError) as caught:
                await collect(engine, ask([5], 4, adapter="red"))
            await leaving
            assert engine.load().running == 0
            with pytest.raises(ServeError) as again:
                await engine.unload_adapter("red")
            return caught.value, again.value, len(await answer), engine.adapters

    refused, again, length, left = asyncio.run(run())
    assert (refused.status, again.status) == (404, 404)
    assert "Loaded adapters: none" in str(refused)
    assert (length, left) == (60, ())


def test_unsuitable_adapters_are_rejected(folder, adapters, tmp_path, runner):
    async def run():
        async with open_tiny(folder, runner) as engine:
            await engine.load_adapter("red", str(adapters["red"]))
            errors = []
            for name, place in (("red", adapters["blue"]), ("none", tmp_path)):
                with pytest.raises(ServeError) as caught:
                    await engine.load_adapter(name, str(place))
                errors.append(caught.value)
            return errors, engine.adapters, await tokens_of(engine, ask([5], 4, adapter="red"))

    errors, names, answer = asyncio.run(run())
    assert [(error.status, error.code) for error in errors] == [
        (409, "adapter_exists"),
        (400, "invalid_adapter"),
    ]
    assert "has no adapter_config.json" in str(errors[1])
    assert names == ("red",)
    assert len(answer) == 4


def spoil(source, target, change):
    """Copy an adapter, with a changed first tensor; None leaves the tensor out."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(target / "adapter_model.safetensors")
    name = max(tensors)
    changed = change(tensors.pop(name))
    tensors |= {} if changed is None else {name: changed}
    save_file(tensors, target / "adapter_model.safetensors")
    return name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor[:, :2].contiguous(), "size mismatch for {}"),
        (lambda tensor: None, "its file has no weights for {}"),
    ],
    ids=["other shape", "missing weights"],
)
def test_adapter_that_does_not_fit_leaves_no_trace(
    folder, adapters, tmp_path, runner, change, reason
):
    name = spoil(adapters["red"], tmp_path, change).rpartition(".")[0]
    requests = mixed_requests(3, seed=5, longest=20)

    async def run():
        async with open_tiny(folder, runner) as engine:
            # First before PEFT has changed the model, then beside a loaded adapter.
            answers = [await all_tokens(engine, requests)]
            for loaded in ("red", "blue"):
                with pytest.raises(ServeError) as caught:
                    await engine.load_adapter("bad", str(tmp_path))
                assert reason.format(name) in str(caught.value)
                answers.append(await all_tokens(engine, requests))
                await engine.load_adapter(loaded, str(adapters[loaded]))
            # The same name, now with files that fit.
            await engine.load_adapter("bad", str(adapters["blue"]))
            request = ask([5, 6], 6, adapter="bad")
            return answers, engine.adapters, await tokens_of(engine, request)

    (before, *after), names, answer = asyncio.run(run())
    assert after == [before, before]
    assert names == ("red", "blue", "bad")
    assert answer == expect(folder, adapters, "blue", [ask([5, 6], 6)])[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": list(range(3, 200))},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "norm", "lm_head"]},
    ],
    ids=lambda settings: list(settings)[-1],
)
def test_adapter_outside_of_the_blocks_leaves_the_base_as_it_is(folder, tmp_path, runner, settings):
    model = peft.get_peft_model(
        load_float32(folder), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn(parameter.shape, generator=generator) / 3
    model.save_pretrained(tmp_path)
    requests = mixed_requests(4, seed=5, longest=20)
    adapted = [replace(request, adapter="x") for request in requests]

    async def run():
        async with open_tiny(folder, runner) as engine:
            before = await all_tokens(engine, requests)
            await engine.load_adapter("x", str(tmp_path))
            found = await all_tokens(engine, adapted)
            return before, found, await all_tokens(engine, requests)

    before, found, after = asyncio.run(run())
    assert found == expect(folder, {"x": tmp_path}, "x", requests)
    assert after == before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"init_lora_weights": "pissa"}, "its initialization 'pissa' changes the base"),
        ({"layer_replication": [[0, 1], [0, 2]]}, "it repeats layers"),
        ({}, "its file replaces model.norm.weight of the base"),
    ],
    ids=["initialization", "layer replication", "other weights"],
)
def test_adapter_that_would_change_the_base_is_rejected(
    folder, adapters, tmp_path, runner, settings, reason
):
    spoil(adapters["red"], tmp_path, lambda tensor: tensor)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    if not settings:
        tensors["base_model.model.model.norm.weight"] = torch.full((64,), 3.0)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    requests = mixed_requests(3, seed=5, longest=20)

    async def run():
        async with open_tiny(folder, runner) as engine:
            before = await all_tokens(engine, requests)
            with pytest.raises(ServeError, match=reason) as caught:
                await engine.load_adapter("x", str(tmp_path))
            return caught.value.code, engine.adapters, before, await all_tokens(engine, requests)

    code, names, before, after = asyncio.run(run())
    assert (code, names) == ("invalid_adapter", ())
    assert after == before


def test_adapter_of_prompts_is_rejected(folder, tmp_path, runner):
    settings = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(load_float32(folder), settings).save_pretrained(tmp_path)

    async def run():
        async with open_tiny(folder, runner) as engine:
            before = await tokens_of(engine, ask([5], 4))
            with pytest.raises(ServeError, match="PROMPT_TUNING changes prompts instead of layers"):
                await engine.load_adapter("prompts", str(tmp_path))
            return before, await tokens_of(engine, ask([5], 4)), engine.adapters

    before, after, names = asyncio.run(run())
    assert before == after
    assert names == ()
