"""Loaded adapters when another version of the model takes over."""

from __future__ import annotations

import asyncio

import httpx2
import pytest
from tests.helpers.stores import write_folder, write_verdict
from tests.helpers.tiny_llama import build_tokenizer
from tests.serve.helpers_quality import ScriptedBackend, answer, collect
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_server import serve

from halfbyte.errors import ServeError
from halfbyte.serve import assembly
from halfbyte.serve.adapters import AdapterFolder
from halfbyte.serve.backend import Call
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.adapter_transfer import transfer_adapters
from halfbyte.serve.rollout.store_models import StoreBackend, resolve_store_model
from halfbyte.store.store import Store

TOKENIZER = build_tokenizer()


class NarrowEngine(ScriptedEngine):
    """Rejects adapters called wide, as a model of another shape does."""

    async def load_adapter(self, name, folder):
        if name == "wide":
            raise ServeError("Cannot load wide: it does not fit this model: 8 x 64.")
        await super().load_adapter(name, folder)


def embedded(engine=ScriptedEngine):
    return EmbeddedBackend(
        engine(tokenizer=TOKENIZER), TOKENIZER, model="tiny", config=ServeConfig()
    )


@pytest.fixture
def versions(tmp_path):
    """A store whose champion is the first of two versions, and a way to promote the second."""
    store = Store(tmp_path / "store")
    for seed in (0, 1):
        store.add(write_folder(tmp_path / str(seed), seed), "tiny")
    first, second = store.history("tiny").versions
    for version in (first, second):
        store.judge(f"tiny@{version}", write_verdict(tmp_path / f"{version}.json", "pass"))
    store.promote(f"tiny@{first}")
    model = resolve_store_model("store:tiny", location=str(store.backend.root))
    return model, lambda: store.promote(f"tiny@{second}")


@pytest.fixture
def adapters(tmp_path):
    for name in ("red", "wide"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_config.json").write_text("{}")
    return tmp_path / "adapters"


def test_adapters_are_loaded_into_the_next_version_and_misfits_are_reported(
    versions, adapters, caplog
):
    model, promote = versions
    backend = StoreBackend(model, embedded(), lambda folder: embedded(NarrowEngine))
    service = assembly._wrap(backend, ServeConfig(), EngineConfig(), QualityConfig(), ApiKeys())
    gateway, alerts = service.gateway, service.quality.alerts
    gateway.adapters = AdapterFolder(adapters, lambda: gateway.current)
    told = []
    alerts._post = lambda alert, state: told.append((alert.name, alert.message))
    with serve(gateway) as server:

        def ask(name):
            body = {"model": name, "prompt": "w1", "max_tokens": 2}
            return httpx2.post(f"{server.v1}/completions", json=body, timeout=10)

        for name in ("red", "wide"):
            server.call(gateway.adapters.load(name))
        assert [ask(name).status_code for name in ("red", "wide")] == [200, 200]
        promote()
        assert server.call(backend.poll())
        assert gateway.models == ("tiny", "red")
        assert ask("red").status_code == 200
        refused = ask("wide")
        assert refused.status_code == 404
        message = refused.json()["error"]["message"]
        assert "The adapter 'wide' is not available any more" in message
        assert "8 x 64. Ask for 'tiny'" in message
        server.call(gateway.adapters.unload("red"))
        assert "'red' does not exist" in ask("red").json()["error"]["message"]
        server.call(service.stop())
    assert [name for name, _ in told] == ["adapter lost", "version changed"]
    assert "8 x 64" in told[0][1]
    assert "adapter wide is not available any more" in caplog.text


@pytest.mark.parametrize("candidate", [embedded, lambda: ScriptedBackend("far", answer("good"))])
def test_promoted_candidate_takes_over_the_adapters(candidate, caplog):
    primary, made = embedded(), []

    def connect(place):
        made.append(candidate())
        return made[-1]

    config = QualityConfig(canary="new", canary_share=0.5)
    quality = Quality(primary, config, connect)

    async def run():
        await primary.load_adapter("red", "/adapters/red")
        await quality.start()
        await quality.trial._promote(made[0])
        body = {"model": "red", "prompt": "w1", "max_tokens": 2}
        call = Call(kind="completion", body=body, id="cmpl-1")
        found = await collect(quality.router, call)
        await quality.close()
        return found

    _, served = asyncio.run(run())
    if made[0].name == "embedded":
        assert made[0].adapter_folders == {"red": "/adapters/red"}
        assert (served.backend, served.model) == ("embedded", "red")
    else:
        assert "adapter red is not available any more: far does not load adapters" in caplog.text


def test_adapter_that_is_loaded_during_the_transfer_is_transferred_too():
    source = embedded()

    class SlowEngine(ScriptedEngine):
        async def load_adapter(self, name, folder):
            await asyncio.sleep(0.02)
            await super().load_adapter(name, folder)

    target = embedded(SlowEngine)

    async def run():
        await source.load_adapter("red", "/r")
        task = asyncio.create_task(transfer_adapters(source, target))
        await asyncio.sleep(0.01)
        await source.load_adapter("blue", "/b")
        return await task

    assert asyncio.run(run()) == {}
    assert target.adapter_folders == {"red": "/r", "blue": "/b"}
