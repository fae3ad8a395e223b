from __future__ import annotations

import asyncio

import pytest
from tests.helpers.stores import make_champion_and_candidate, write_verdict
from tests.serve.helpers_quality import ScriptedBackend, answer, collect, make_call

from halfbyte.errors import ConfigError, StoreError
from halfbyte.serve import assembly
from halfbyte.serve.backend import Served
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.store_models import (
    StoreBackend,
    is_store_reference,
    record_verdict,
    resolve_store_model,
)
from halfbyte.serve.routing.router import Router


@pytest.fixture
def store(tmp_path):
    return make_champion_and_candidate(tmp_path)


def location(store):
    return str(store.backend.root)


def test_reference_is_resolved_to_a_verified_folder(store, monkeypatch):
    first, second = store.history("tiny").versions
    assert is_store_reference("store:tiny")
    assert not is_store_reference("./tiny")
    champion = resolve_store_model("store:tiny", location=location(store))
    assert (champion.version, champion.alias) == (first, "champion")
    assert (champion.folder / "model.safetensors").is_file()
    monkeypatch.setenv("HALFBYTE_STORE", location(store))
    candidate = resolve_store_model("store:tiny@candidate")
    assert (candidate.version, candidate.alias) == (second, "candidate")
    assert resolve_store_model(f"store:tiny@{second[:10]}").alias is None
    with pytest.raises(StoreError, match="no such version"):
        resolve_store_model("store:tiny@nobody")
    monkeypatch.delenv("HALFBYTE_STORE")
    with pytest.raises(ConfigError, match=r"no store is configured\. Set HALFBYTE_STORE"):
        resolve_store_model("store:tiny")


def follower(store, connect, **more):
    model = resolve_store_model("store:tiny", location=location(store))
    old = ScriptedBackend("old", [0.05, *answer("old answer")])
    return StoreBackend(model, old, connect, **more), old


def test_promotion_is_followed_without_dropping_a_request(store, tmp_path):
    told, opened = [], []
    new = ScriptedBackend("new", answer("new answer"))

    def connect(folder):
        opened.append(folder)
        return new

    backend, old = follower(
        store, connect, report=lambda *words: told.append(words), poll_seconds=0.02
    )
    second = store.history("tiny").versions[1]
    router = Router(backend)

    async def run():
        await backend.start()
        begun = [asyncio.ensure_future(collect(router, make_call())) for _ in range(3)]
        await asyncio.sleep(0.01)
        store.judge(f"tiny@{second}", write_verdict(tmp_path / "v2.json", "pass"))
        store.promote(f"tiny@{second}")
        served = Served()
        while served.version != second:
            served = (await collect(router, make_call(), Served()))[1]
        old_answers = [(await task) for task in begun]
        for _ in range(100):
            await asyncio.sleep(0 if old.closed else 0.01)
        closed = old.closed
        await backend.close()
        return old_answers, closed

    first = store.history("tiny").versions[0]
    old_answers, closed = asyncio.run(run())
    assert {(text, served.version) for text, served in old_answers} == {("old answer", first)}
    assert closed
    assert new.closed
    assert opened[0].endswith(second)
    assert [name for name, _ in told] == ["version changed"]


def test_repeated_switches_under_load_drop_no_request(store):
    model = resolve_store_model("store:tiny", location=location(store))
    made = []

    def another():
        number = len(made)
        made.append(ScriptedBackend(str(number), answer(f"version {number}"), begins_after=0.003))
        return made[-1]

    backend = StoreBackend(model, another(), pytest.fail)
    router = Router(backend)

    async def ask():
        texts = []
        for _ in range(50):
            texts.append((await collect(router, make_call()))[0])
        return texts

    async def swap():
        for _ in range(40):
            await asyncio.sleep(0.002)
            backend.switch(model, another())

    async def run():
        found = await asyncio.gather(*(ask() for _ in range(6)), swap())
        await backend.close()
        return found[:-1]

    texts = [text for own in asyncio.run(run()) for text in own]
    assert len(texts) == 300
    assert all(text.startswith("version ") for text in texts)
    assert len(set(texts)) > 10
    assert all(one.closed for one in made)


def test_version_that_cannot_be_opened_is_reported_once(store, tmp_path):
    told = []

    def connect(folder):
        raise ConfigError("it does not fit")

    backend, _ = follower(store, connect, report=lambda *words: told.append(words))
    second = store.history("tiny").versions[1]
    store.judge(f"tiny@{second}", write_verdict(tmp_path / "v2.json", "pass"))
    store.promote(f"tiny@{second}")

    async def run():
        return [await backend.poll() for _ in range(3)], await collect(Router(backend), make_call())

    looks, (text, _) = asyncio.run(run())
    assert (looks, text) == ([False] * 3, "old answer")
    assert len(told) == 1
    assert "it does not fit" in told[0][1]
    assert second[:12] in told[0][1]
    # When the cause is mended, moving the alias back and forth tries it again.
    store.rollback("tiny")
    asyncio.run(backend.poll())
    store.promote(f"tiny@{second}")
    asyncio.run(backend.poll())
    assert len(told) == 2


def test_unreachable_store_does_not_stop_the_poller(store, monkeypatch, caplog):
    backend, _ = follower(store, pytest.fail, poll_seconds=0.01)
    monkeypatch.setattr(
        type(store), "resolve", lambda *_: (_ for _ in ()).throw(StoreError("away"))
    )

    async def run():
        await backend.start()
        await asyncio.sleep(0.05)
        alive = not backend._poller.done()
        await backend.close()
        return alive

    assert asyncio.run(run())
    assert "away" in caplog.text


def test_evidence_becomes_the_verdict_and_moves_the_alias(store):
    second = store.history("tiny").versions[1]
    model = resolve_store_model("store:tiny@candidate", location=location(store))
    record_verdict(model, {"verdict": "fail", "requests": 70}, promote_to=None)
    assert store.verdict("tiny", second) == "fail"
    with pytest.raises(StoreError, match="the verdict of its trial is fail"):
        record_verdict(model, {"verdict": "fail"}, promote_to="champion")
    record_verdict(model, {"verdict": "pass", "requests": 900}, promote_to="champion")
    assert store.resolve("tiny") == ("tiny", second)


def test_tokenize_follows_a_switch_and_a_promotion(store):
    class Tokenizing(ScriptedBackend):
        async def tokenize(self, body):
            return {"by": self.name}

        async def detokenize(self, body):
            return {"by": self.name}

    backend, _ = follower(store, pytest.fail)
    service = assembly._wrap(backend, ServeConfig(), EngineConfig(), QualityConfig(), ApiKeys())
    gateway = service.gateway

    async def run():
        backend.switch(backend.model, Tokenizing("swapped", answer("good")))
        found = [await gateway.text_tools.tokenize({})]
        service.quality.router.set_primary(Tokenizing("promoted", answer("good")))
        found.append(await gateway.text_tools.tokenize({}))
        service.quality.router.set_primary(ScriptedBackend("plain", answer("good")))
        await service.stop()
        return found

    assert asyncio.run(run()) == [{"by": "swapped"}, {"by": "promoted"}]
    assert gateway.text_tools is None


def test_replaced_models_name_stays_known_but_not_its_adapters():
    old = ScriptedBackend("old", answer("good"), models=("old", "law"))
    service = assembly._wrap(old, ServeConfig(), EngineConfig(), QualityConfig(), ApiKeys())
    assert service.gateway.models == ("old", "law")
    service.quality.router.set_primary(ScriptedBackend("new", answer("good"), models=("new",)))
    assert service.gateway.models == ("old", "new")
