from __future__ import annotations

import asyncio
import json
import math

import pytest
from tests.serve.helpers_quality import ScriptedBackend, answer, collect, failure, make_call

from halfbyte.errors import ServeError
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.shadow import MAX_RUNNING, Shadow, agreement
from halfbyte.serve.routing.router import Router

GOOD = answer("a good answer of several words")


def shadowed(script, *, requests=30, tmp_path=None, pause=0.0, **settings):
    settings.setdefault("shadow_share", 1.0)
    config = QualityConfig(evidence=str(tmp_path) if tmp_path else None, **settings)
    candidate = ScriptedBackend("new", script, models=("new-model",))
    alarms = []
    shadow = Shadow(candidate, config, alarm=alarms.append, seed=1)
    router = Router(ScriptedBackend("small", GOOD), config=config, observers=[shadow.observe])

    async def run():
        for _ in range(requests):
            text, served = await collect(router, make_call())
            assert (text, served.backend) == ("a good answer of several words", "small")
            await asyncio.sleep(pause)
        for _ in range(20):
            await asyncio.sleep(0.002)
        running = candidate.running
        await shadow.close()
        return running

    return shadow, candidate, alarms, asyncio.run(run())


def test_copies_are_compared_and_discarded(tmp_path):
    other = answer("a good answer of other words")
    shadow, candidate, alarms, _ = shadowed(other, tmp_path=tmp_path, pause=0.001)
    assert shadow.counts["compared"] == len(candidate.calls) == 30
    assert candidate.calls[0].body["model"] == "new-model"
    found = json.loads((tmp_path / "shadow.json").read_text())
    assert found["agreement"] == pytest.approx(4 / 6)
    assert found["identical"] == 0
    assert found["counts"]["compared"] == 30
    assert alarms == []


def test_comparison_resumes_after_a_restart(tmp_path):
    first, _, alarms, _ = shadowed([failure()], tmp_path=tmp_path, pause=0.001)
    assert len(alarms) == 1
    again, _, alarms, _ = shadowed([failure()], tmp_path=tmp_path, requests=1, pause=0.001)
    before, after = first.evidence(), again.evidence()
    assert (after["counts"]["compared"], after["counts"]["candidate_failed"]) == (31, 31)
    assert after["agreement"] == before["agreement"]
    assert after["mean_seconds"]["base"] > 0
    assert after["started"] == before["started"]
    assert after["evidence_worse"] > before["evidence_worse"] > 0
    assert alarms == []


def test_comparison_with_other_settings_starts_anew(tmp_path):
    shadowed(GOOD, tmp_path=tmp_path, pause=0.001)
    again, *_ = shadowed(GOOD, tmp_path=tmp_path, requests=2, pause=0.001, canary_margin=0.1)
    assert again.counts["compared"] == 2
    kept = [path for path in tmp_path.iterdir() if path.name != "shadow.json"]
    assert [json.loads(path.read_text())["counts"]["compared"] for path in kept] == [30]


def test_only_a_share_is_copied():
    shadow, *_ = shadowed(GOOD, requests=400, shadow_share=0.25, pause=0.0005)
    assert 60 < shadow.counts["compared"] < 140
    assert shadow.evidence()["identical"] == 1.0


def test_hung_candidate_blocks_two_copies_and_no_request():
    shadow, candidate, _, running = shadowed([math.inf], requests=50, idle_timeout=30.0)
    assert running == MAX_RUNNING
    assert shadow.counts["skipped"] == 48
    assert (candidate.running, candidate.cancelled) == (0, MAX_RUNNING)


def test_failing_candidate_raises_one_alarm():
    shadow, _, alarms, _ = shadowed([failure()], pause=0.001)
    assert shadow.counts["candidate:error"] == 30
    assert len(alarms) == 1
    assert "of the same" in alarms[0]


def test_refusal_of_the_candidate_alone_is_a_failure():
    shadow, _, alarms, _ = shadowed([ServeError("too long", status=400)], pause=0.001)
    assert (shadow.counts["candidate:refused"], shadow.counts["candidate_failed"]) == (30, 30)
    assert len(alarms) == 1


def test_copy_that_takes_too_long_is_not_compared(monkeypatch):
    monkeypatch.setattr("halfbyte.serve.rollout.shadow.TIMEOUT_SECONDS", 0.01)
    shadow, _, alarms, _ = shadowed([*GOOD[:1], 0.1, *GOOD[1:]], requests=3, pause=0.02)
    assert (dict(shadow.counts), alarms) == ({"late": 3}, [])


def test_agreement_is_the_share_of_equal_leading_words():
    assert agreement("a b c d", "a b x d") == 0.5
    assert agreement("", "") == 1.0
    assert agreement("a", "") == 0.0
    assert agreement("a b", "a b c d") == 0.5
