from __future__ import annotations

import asyncio
import json
import random

import pytest
from tests.serve.helpers_quality import Clock, ScriptedBackend, answer, collect, failure, make_call

from halfbyte.errors import ConfigError, ServeError
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.canary import Canary
from halfbyte.serve.rollout.sequential import requests_until_rejected
from halfbyte.serve.routing.router import Router

GOOD = answer("a good answer of several words")
LOOP = answer("again and again " + "so it goes " * 12)


def trial(candidate_script, tmp_path=None, *, seed=1, requests=4000, **settings):
    """Run requests through a router with a canary until the trial is decided."""
    config = QualityConfig(
        canary_share=0.2,
        evidence=None if tmp_path is None else str(tmp_path),
        breaker_failures=10**9,
        **settings,
    )
    router = Router(ScriptedBackend("small", GOOD), config=config)
    new = ScriptedBackend("new", candidate_script)
    decisions = []
    canary = Canary("new@1", config, decide=decisions.append, seed=seed, clock=Clock())
    router.set_canary(new, canary)
    router.add_observer(canary.observe)

    async def run():
        texts = set()
        while canary.status == "running" and canary.num_requests < requests:
            texts.add((await collect(router, make_call()))[0])
        return texts

    return canary, decisions, asyncio.run(run()), new


@pytest.mark.parametrize("script", [[failure()], LOOP, GOOD[:3]], ids=["error", "loop", "cut"])
def test_worse_candidate_is_rolled_back_in_time_and_no_client_notices(script):
    canary, decisions, texts, new = trial(script)
    promised = requests_until_rejected((0.0, 1.0), 0.2, 0.05)
    assert canary.status == "rolled back"
    assert decisions == [canary]
    assert canary.num_requests <= promised
    assert texts == {"a good answer of several words"}
    assert canary.arms["canary"].failures == canary.arms["canary"].requests == len(new.calls)
    assert canary.arms["primary"].failures == 0
    # Once it is over, nothing goes to it any more.
    assert not any(canary.pick(make_call()) for _ in range(100))


def test_equally_good_candidate_is_promoted_and_its_evidence_saved(tmp_path):
    canary, decisions, _, new = trial(GOOD, tmp_path)
    assert (canary.status, decisions) == ("promoted", [canary])
    kept = json.loads((tmp_path / "canary.json").read_text())
    assert (kept["verdict"], kept["status"]) == ("pass", "promoted")
    assert kept["requests"] == canary.num_requests < 4000
    assert kept["arms"]["canary"]["requests"] == len(new.calls)
    assert kept["evidence_as_good"] >= kept["evidence_needed"] == pytest.approx(2.9957, abs=1e-4)
    assert kept["reason"].startswith("it fails less than 2 points more often")


def test_slightly_worse_candidate_is_not_promoted():
    rng = random.Random(5)

    def script(call):
        return [failure()] if rng.random() < 0.3 else GOOD

    canary, *_ = trial(script)
    assert canary.status == "rolled back"


def test_undecided_candidate_is_rolled_back_after_the_last_request():
    canary, *_ = trial(GOOD, canary_requests=50)
    assert (canary.status, canary.num_requests) == ("rolled back", 50)
    assert canary.reason == "no decision within 50 requests"


def test_trial_resumes_after_a_restart_and_a_decision_is_final(tmp_path):
    first, _, _, _ = trial(GOOD, tmp_path, requests=300)
    assert first.status == "running"
    first.save(wait=True)
    again, decisions, _, _ = trial(GOOD, tmp_path, seed=2, requests=0)
    assert again.num_requests == 300
    assert again.evidence()["evidence_as_good"] == first.evidence()["evidence_as_good"]
    assert again.started == first.started
    done, decisions, _, _ = trial([failure()], tmp_path, seed=2)
    assert done.status == "rolled back"
    assert done.num_requests > 300
    after, decisions, _, new = trial([failure()], tmp_path)
    assert (after.status, decisions, new.calls) == ("rolled back", [], [])


def test_other_candidate_or_settings_start_anew_and_keep_the_old_evidence(tmp_path):
    trial([failure()], tmp_path)
    canary, *_ = trial(GOOD, tmp_path, canary_margin=0.1)
    assert canary.status == "promoted"
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) == 2
    assert json.loads((tmp_path / files[0]).read_text())["status"] == "rolled back"


def test_damaged_evidence_is_named(tmp_path):
    (tmp_path / "canary.json").write_text('{"candidate": "new@1"')
    with pytest.raises(ConfigError, match=r"canary\.json.*Move the file away"):
        trial(GOOD, tmp_path)


@pytest.mark.parametrize(("likelihood", "status"), [(-3.8, "promoted"), (-11.0, "rolled back")])
def test_candidate_that_writes_nonsense_is_detected_by_rating(likelihood, status):
    # The figures of a real 4-bit model: its own answers -3.5 +- 1, another good model's -3.8,
    # those of one with noise in its scales -11, which look like text to every monitor.
    rng = random.Random(3)
    rated = []

    async def rate(call, said):
        await asyncio.sleep(0)
        rated.append(said)
        return rng.gauss(-3.5 if said.startswith("a good") else likelihood, 1.0)

    config = QualityConfig(canary_share=0.3, canary_margin=0.1)
    router = Router(ScriptedBackend("small", GOOD), config=config)
    canary = Canary("new", config, rate=rate, seed=1)
    router.set_canary(ScriptedBackend("new", answer("another kind of text")), canary)
    router.add_observer(canary.observe)

    async def run():
        while canary.status == "running":
            await collect(router, make_call())
            await asyncio.sleep(0)
        await canary.close()

    asyncio.run(run())
    assert canary.status == status
    assert set(rated) == {"a good answer of several words", "another kind of text"}
    assert canary.arms["primary"].failures <= 1
    if status == "rolled back":
        assert canary.arms["canary"].causes["unlikely"] > 0
        assert canary.num_requests < 300


def test_rating_stops_after_a_few_failures(caplog):
    asked = []

    async def rate(call, said):
        asked.append(said)

    config = QualityConfig(canary_share=0.3, canary_requests=60)
    router = Router(ScriptedBackend("small", GOOD), config=config)
    canary = Canary("new", config, rate=rate, seed=1)
    router.set_canary(ScriptedBackend("new", GOOD), canary)
    router.add_observer(canary.observe)

    async def run():
        while canary.status == "running":
            await collect(router, make_call())
            await asyncio.sleep(0)

    asyncio.run(run())
    assert len(asked) in (5, 6)
    assert canary.num_requests == 60
    assert "without ratings" in caplog.text


def test_slow_ratings_skip_requests_whether_they_failed_or_not():
    async def rate(call, said):
        await asyncio.sleep(3600)

    config = QualityConfig(canary_share=0.5, breaker_failures=10**9)
    router = Router(ScriptedBackend("small", GOOD), config=config)
    canary = Canary("new", config, rate=rate, seed=1)
    router.set_canary(ScriptedBackend("new", [failure()]), canary)
    router.add_observer(canary.observe)

    async def run():
        for _ in range(40):
            await collect(router, make_call())
        await canary.close()

    asyncio.run(run())
    assert canary.skipped + canary.num_requests + 2 == 40
    assert canary.arms["canary"].failures < 10


def leave_early(script, *, requests=10):
    """Run a trial whose clients disconnect, and a critical request that is not part of it."""
    config = QualityConfig(canary_share=0.5)
    router = Router(
        ScriptedBackend("small", script),
        fallbacks=[ScriptedBackend("large", GOOD)],
        config=config,
    )
    canary = Canary("new", config, seed=1)
    router.set_canary(ScriptedBackend("new", script), canary)
    router.add_observer(canary.observe)

    async def run():
        for _ in range(requests):
            task = asyncio.ensure_future(collect(router, make_call()))
            await asyncio.sleep(0.003)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        await collect(router, make_call(tags=["critical"]))

    asyncio.run(run())
    return canary


def test_client_disconnect_before_the_first_token_is_a_failure():
    arms = leave_early([30.0]).arms
    assert [arms[name].causes["left"] for name in arms] == [arms[name].requests for name in arms]
    assert sum(arm.requests for arm in arms.values()) == 10
    assert all(arm.requests for arm in arms.values())


def test_client_disconnect_after_the_first_token_does_not_count():
    assert leave_early([*GOOD[:2], 30.0]).num_requests == 0


@pytest.mark.parametrize(
    ("status", "cause"), [(404, "refused"), (400, "refused"), (429, "overload")]
)
def test_failing_candidate_is_rolled_back_and_no_client_notices(status, cause):
    canary, _, texts, _ = trial([failure(status)])
    assert canary.status == "rolled back"
    assert texts == {"a good answer of several words"}
    assert canary.arms["canary"].causes == {cause: canary.arms["canary"].requests}


def test_request_that_both_models_refuse_does_not_count():
    config = QualityConfig(canary_share=0.5)
    large = ScriptedBackend("large", GOOD)
    router = Router(
        ScriptedBackend("small", [ServeError("Too long.")]), fallbacks=[large], config=config
    )
    canary = Canary("new", config, seed=1)
    new = ScriptedBackend("new", [ServeError("No.", status=404)])
    router.set_canary(new, canary)
    router.add_observer(canary.observe)
    for _ in range(20):
        with pytest.raises(ServeError, match=r"Too long\."):
            asyncio.run(collect(router, make_call()))
    assert len(new.calls) > 5
    assert (canary.num_requests, large.calls) == (0, [])


@pytest.mark.parametrize("status", [500, 429])
def test_refusal_does_not_count_if_the_present_model_fails_too(status):
    config = QualityConfig(canary_share=0.5, breaker_failures=2)
    router = Router(ScriptedBackend("small", [failure(status)]), config=config)
    canary = Canary("new", config)
    canary.pick = lambda call: True
    router.set_canary(ScriptedBackend("new", [ServeError("Too long.")]), canary)
    router.add_observer(canary.observe)
    for _ in range(5):
        with pytest.raises(ServeError):
            asyncio.run(collect(router, make_call()))
    assert canary.num_requests == 0


def test_candidate_gets_no_requests_for_adapters():
    config = QualityConfig(canary_share=0.5)
    present = ScriptedBackend("small", GOOD, models=("small", "law", "tax"))
    router = Router(present, config=config)
    canary = Canary("new", config)
    canary.pick = lambda call: True
    router.set_canary(ScriptedBackend("new", GOOD, models=("small-3bit", "tax")), canary)
    router.add_observer(canary.observe)
    for model, backend in (("law", "small"), ("small", "new"), ("tax", "new")):
        assert asyncio.run(collect(router, make_call(model=model)))[1].backend == backend
    assert canary.num_requests == 2


def test_promotion_needs_enough_requests_of_the_candidate():
    canary = Canary("new", QualityConfig(canary_share=0.5, canary_margin=0.2), seed=1)
    for _ in range(1000):
        canary._count("primary", "")
    assert canary.status == "running"
    # 0.8 ** 14 is below 0.05.
    for _ in range(14):
        assert canary.status == "running"
        canary._count("canary", "")
    assert canary.status == "promoted"


def test_open_breaker_of_the_candidate_counts_as_failure():
    config = QualityConfig(canary_share=0.5, breaker_failures=2, breaker_seconds=1000.0)
    router = Router(ScriptedBackend("small", GOOD), config=config)
    canary = Canary("new", config, seed=1)
    new = ScriptedBackend("new", [failure()])
    router.set_canary(new, canary)
    router.add_observer(canary.observe)

    async def run():
        for _ in range(12):
            await collect(router, make_call())

    asyncio.run(run())
    arm = canary.arms["canary"]
    assert len(new.calls) == 2
    assert arm.requests == arm.failures > 2
    assert arm.causes["breaker"] == arm.failures - 2
