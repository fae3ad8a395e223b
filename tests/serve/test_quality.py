from __future__ import annotations

import asyncio
import json
import time
from contextlib import suppress
from types import SimpleNamespace

import pytest
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from tests.helpers.stores import make_champion_and_candidate
from tests.helpers.tiny_llama import build_tokenizer
from tests.serve.helpers_quality import Clock, ScriptedBackend, answer, collect, failure, make_call
from tests.serve.helpers_scripted import ScriptedEngine
from tests.serve.helpers_servers import serving

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.backend import Call
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout import evidence
from halfbyte.serve.rollout.evidence import EvidenceFile
from halfbyte.serve.rollout.store_models import StoreBackend, resolve_store_model
from halfbyte.serve.routing import spending_file
from halfbyte.serve.watch import alerts as alerts_module
from halfbyte.serve.watch import health

GOOD = answer("a good answer of several words")
NEW = answer("the new model's good answer")


def opening(**scripts):
    """Return a connect() that creates scripted backends, and what it created by place."""
    made = {}

    def connect(place):
        found = next(name for name in scripts if name in place)
        made[place] = ScriptedBackend(found, scripts[found])
        return made[place]

    return connect, made


async def ask_until(quality, done, limit=20_000):
    for _ in range(limit):
        if done():
            await asyncio.sleep(0.05)
            return
        text, _ = await collect(quality.router, make_call())
        assert text
    pytest.fail("it never came to that")


def wide(tmp_path, **more):
    return QualityConfig(
        canary_share=0.3, canary_margin=0.1, evidence=str(tmp_path / "evidence"), **more
    )


def test_newest_evidence_is_written_although_the_disk_is_slow(tmp_path, monkeypatch):
    written = []

    def write(path, parts):
        time.sleep(0.05)
        written.append(json.loads(b"".join(parts))["number"])

    monkeypatch.setattr(evidence, "write_atomically", write)
    file = EvidenceFile(tmp_path / "evidence.json")
    for number in range(20):
        file.write({"number": number})
    for _ in range(100):
        if written and written[-1] == 19:
            break
        time.sleep(0.02)
    assert written[-1] == 19
    assert len(written) <= 3


def test_fallback_budget_survives_a_restart_and_expires(tmp_path, monkeypatch):
    day = [1_800_000_000.0]
    monkeypatch.setattr(spending_file.time, "time", lambda: day[0])
    connect, _ = opening(large=GOOD)
    config = QualityConfig(
        fallback=("large",), fallback_requests_per_day=3, evidence=str(tmp_path / "evidence")
    )

    def reasons(count, *, killed=False):
        """As in a new process, whose monotonic clock starts anywhere."""

        async def run():
            small = ScriptedBackend("small", GOOD)
            quality = Quality(small, config, connect, clock=Clock(day[0] % 977))
            call = make_call(tags=["critical"])
            told = [(await collect(quality.router, call))[1].reason for _ in range(count)]
            if killed:  # what is on the disk by then has to do
                await asyncio.sleep(0.3)
            else:
                await quality.close()
            return told

        return asyncio.run(run())

    assert reasons(2) == ["critical", "critical"]
    day[0] += 3600
    assert reasons(1, killed=True) == ["critical"]
    day[0] += 3600
    assert reasons(1) == ["budget"]
    day[0] -= 10_000  # set back: nothing comes back by that
    assert reasons(1) == ["budget"]
    day[0] += 23 * 3600
    assert reasons(2) == ["critical", "critical"]
    (tmp_path / "evidence" / "budget.json").write_text('{"time": 0}')
    with pytest.raises(
        ConfigError, match=r"Cannot restore the fallback budget from .*budget\.json"
    ):
        reasons(1)


def test_good_candidate_replaces_the_primary(tmp_path):
    connect, made = opening(new=NEW)
    old = ScriptedBackend("old", GOOD)
    quality = Quality(old, wide(tmp_path, canary="new"), connect)

    async def run():
        await quality.start()
        await ask_until(quality, lambda: quality.canary.status != "running")
        after = await collect(quality.router, make_call())
        text = quality.metrics.render().decode()
        await quality.close()
        return after, text

    (text, served), metrics = asyncio.run(run())
    assert quality.canary.status == "promoted"
    assert (text, served.backend, served.reason) == ("the new model's good answer", "new", "")
    assert old.closed
    assert [route.role for route in quality.router.routes] == ["primary"]
    assert 'halfbyte:canary_state{state="promoted"} 1.0' in metrics
    assert 'halfbyte:alerts_raised_total{name="canary promoted"} 1.0' in metrics
    assert made["new"].closed
    # After a restart the same candidate is asked first at once.
    again = Quality(ScriptedBackend("old", GOOD), wide(tmp_path, canary="new"), connect)

    async def once():
        await again.start()
        found = await collect(again.router, make_call())
        await again.close()
        return found

    assert asyncio.run(once())[1].backend == "new"


def test_bad_candidate_is_closed_and_not_opened_after_a_restart(tmp_path):
    connect, made = opening(new=[failure()])
    old = ScriptedBackend("old", GOOD)
    quality = Quality(old, wide(tmp_path, canary="new"), connect)
    asyncio.run(ask_until(quality, lambda: quality.canary.status != "running"))
    assert quality.canary.status == "rolled back"
    assert made.pop("new").closed
    assert not old.closed
    again = Quality(old, wide(tmp_path, canary="new"), connect)
    assert made == {}
    assert again.snapshot()["canary"]["status"] == "rolled back"


@pytest.fixture
def store(tmp_path, monkeypatch):
    store = make_champion_and_candidate(tmp_path)
    monkeypatch.setenv("HALFBYTE_STORE", str(store.backend.root))
    return store


@pytest.mark.parametrize("good", [True, False])
def test_trial_of_a_version_is_recorded_in_the_store(tmp_path, store, good):
    first, second = store.history("tiny").versions
    connect, made = opening(**{second: NEW if good else [failure()]})
    old = ScriptedBackend("old", GOOD)
    primary = StoreBackend(resolve_store_model("store:tiny"), old, connect, poll_seconds=0.02)
    quality = Quality(primary, wide(tmp_path, canary="store:tiny@candidate"), connect)

    async def run():
        await quality.start()
        await ask_until(quality, lambda: quality.canary.status != "running")
        await asyncio.sleep(0.1)
        found = await collect(quality.router, make_call())
        await quality.close()
        await primary.close()
        return found

    text, served = asyncio.run(run())
    assert store.verdict("tiny", second) == ("pass" if good else "fail")
    assert store.resolve("tiny")[1] == (second if good else first)
    assert served.version == (second if good else first)
    assert (text == "the new model's good answer") is good
    assert old.closed
    # Opened once: the model that was tried is the one that goes on.
    assert len(made) == 1
    assert next(iter(made.values())).closed
    restarted = Quality(
        StoreBackend(resolve_store_model("store:tiny"), old, connect),
        wide(tmp_path, canary="store:tiny@candidate"),
        connect,
    )
    assert len(made) == 1
    assert len(restarted.router.routes) == 1


def test_alerts_reach_a_webhook_and_a_broken_one_slows_nothing(monkeypatch):
    monkeypatch.setattr(alerts_module, "MAX_TRIES", 2)
    got, broken = [], [True]

    async def hook(request):
        if broken[0]:
            broken[0] = False
            return Response(status_code=500)
        got.append(await request.json())
        return Response()

    loop = answer("again and again " + "so it goes " * 12)
    with serving(Starlette(routes=[Route("/hook", hook, methods=["POST"])])) as address:
        config = QualityConfig(webhook=address + "/hook")
        quality = Quality(ScriptedBackend("small", loop), config, pytest.fail)

        async def run():
            await quality.start()
            for _ in range(60):
                await collect(quality.router, make_call())
            await quality.close()

        asyncio.run(run())
    assert [(one["name"], one["state"]) for one in got] == [("repetition", "raised")]
    assert "100% of the last 32 answers" in got[0]["message"]
    # Nobody listens any more.
    quality = Quality(ScriptedBackend("small", loop), config, pytest.fail)
    start = time.perf_counter()

    async def again():
        await quality.start()
        for _ in range(60):
            await collect(quality.router, make_call())
        seconds = time.perf_counter() - start
        await quality.close()
        return seconds

    assert asyncio.run(again()) < 1.0
    assert quality.metrics.value("dropped", "webhook") == 1


def test_all_features_work_together(tmp_path):
    (tmp_path / "probes.jsonl").write_text('{"id": "p", "prompt": "a", "answer": "b"}\n')
    connect, made = opening(larger=GOOD, shade=GOOD, base=GOOD, new=GOOD)
    config = QualityConfig(
        fallback=("larger",), shadow="shade", shadow_share=1.0, canary="new", oracle="base",
        oracle_share=1.0, probes=str(tmp_path / "probes.jsonl"), evidence=str(tmp_path / "e"),
        request_log=str(tmp_path / "log.sqlite"),
    )  # fmt: skip
    quality = Quality(ScriptedBackend("small", GOOD), config, connect)

    async def run():
        await quality.start()
        for _ in range(50):
            await collect(quality.router, make_call(stream=True))
            await asyncio.sleep(0)
        await asyncio.sleep(0.1)
        snapshot = quality.snapshot()
        tasks = len(asyncio.all_tasks())
        await quality.close()
        return snapshot, tasks

    snapshot, _ = asyncio.run(run())
    assert snapshot["probes"] == {"p": False}
    assert snapshot["shadow"]["counts"]["compared"] > 0
    assert all(backend.closed for backend in made.values())
    assert set(made) == {"larger", "shade", "base", "new"}
    assert json.loads((tmp_path / "e" / "canary.json").read_text())["requests"] == 50


def test_memory_alert_is_cleared_when_the_memory_is_free_again(monkeypatch):
    clock, used = Clock(), [3e9]
    monkeypatch.setattr(health, "resident_memory_bytes", lambda: used[0])
    quality = Quality(ScriptedBackend("small", GOOD), QualityConfig(), None, clock=clock)
    quality.metrics.set_plan(total=10**9)

    def alerts_after_a_request():
        clock.now += 1.1
        asyncio.run(collect(quality.router, make_call()))
        return [alert.name for alert in quality.alerts.active]

    # Two versions are in memory while one replaces the other.
    assert alerts_after_a_request() == ["memory"]
    used[0] = 1.2e9
    assert alerts_after_a_request() == []


def test_dead_model_used_up_budget_and_high_memory_raise_alerts():
    clock = Clock()
    connect, _ = opening(larger=GOOD)
    config = QualityConfig(
        fallback=("larger",), breaker_seconds=600.0, fallback_requests_per_minute=20
    )
    small = ScriptedBackend("small", [failure()])
    quality = Quality(small, config, connect, clock=clock)
    quality.metrics.set_plan(total=1000)

    async def run():
        for _ in range(20):
            clock.now += 1.1
            await collect(quality.router, make_call())
        raised = {alert.name for alert in quality.alerts.active}
        quality.metrics.set_plan(total=10**13)
        small.script = GOOD
        clock.now += 700
        await collect(quality.router, make_call())
        return raised

    assert asyncio.run(run()) == {"model small", "fallback budget", "memory"}
    assert quality.alerts.active == []


def test_alert_of_a_candidate_is_cleared_with_the_candidate():
    clock = Clock()
    quality = Quality(ScriptedBackend("small", GOOD), QualityConfig(), opening()[0], clock=clock)
    always = SimpleNamespace(pick=lambda call: True)

    async def run():
        quality.router.set_canary(ScriptedBackend("new", [failure()]), always)
        for _ in range(20):
            clock.now += 1.1
            with suppress(ServeError):
                await collect(quality.router, make_call())
        raised = [alert.name for alert in quality.alerts.active]
        quality.router.set_canary(None)
        clock.now += 1.1
        await collect(quality.router, make_call())
        return raised

    assert asyncio.run(run()) == ["model new"]
    assert quality.alerts.active == []


def test_engine_failure_in_mid_answer_falls_back(tmp_path):
    connect, _ = opening(larger=GOOD)
    tokenizer = build_tokenizer()
    engine = ScriptedEngine(tokenizer=tokenizer, script={"": "w1 w2 w3 w4 w5 w6"}, fail_after=3)
    backend = EmbeddedBackend(engine, tokenizer, model="small", config=ServeConfig())
    quality = Quality(backend, QualityConfig(fallback=("larger",)), connect)

    async def ask(stream):
        call = Call(
            kind="completion",
            body={"model": "small", "prompt": "w1 w2", "max_tokens": 6, "stream": stream},
            id="cmpl-1",
        )
        return await collect(quality.router, call)

    async def run():
        broken = [await ask(stream) for stream in (False, True)]
        engine.fail_after = None
        return broken, await ask(True)

    broken, well = asyncio.run(run())
    assert [(text, served.reason) for text, served in broken] == [
        ("a good answer of several words", "error")
    ] * 2
    assert (well[0].split(), well[1].backend) == (["w1", "w2", "w3", "w4", "w5", "w6"], "embedded")
