from __future__ import annotations

import asyncio
import json
import random

import pytest
import torch
from tests.serve.helpers_engine import load_float32, open_tiny, write_model
from tests.serve.helpers_quality import Clock, ScriptedBackend, answer, collect, failure, make_call
from tests.serve.helpers_server import serve
from transformers import AutoTokenizer

from halfbyte.errors import ConfigError
from halfbyte.serve.api.gateway import Gateway
from halfbyte.serve.backend import Delta, Finish, Served, TokenLogprob, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.embedded import EmbeddedBackend
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.router import Router
from halfbyte.serve.upstream import UpstreamBackend
from halfbyte.serve.watch.alerts import REPEAT_SECONDS, Alerts
from halfbyte.serve.watch.drift import MIN_ANSWERS, Drift, RollingMoments, read_reference
from halfbyte.serve.watch.history import NUM_SLICES, History, percentile
from halfbyte.serve.watch.observation import AttemptRecord, Observation
from halfbyte.serve.watch.oracle import Oracle, plain_text, rate_answer, select_by_bytes
from halfbyte.serve.watch.probes import MIN_WRONG_ROUNDS, Probes, read_probes


def observed(tokens=10, entropy=1.0, failures=(), *, ended=100.0, started=99.0, reason=""):
    seen = AttemptRecord(
        backend="small",
        role="primary",
        started=started,
        first=started + 0.5,
        ended=ended,
        num_tokens=tokens,
        texts={0: ["x"]},
        finished={0: "stop"},
        entropies=[entropy],
        failures=failures,
    )
    return Observation(
        call=make_call(),
        served=Served(reason=reason),
        started=started,
        first=started + 0.5,
        ended=ended,
        attempts=[seen],
    )


def names(alerts):
    return [alert.name for alert in alerts.active]


def test_rate_of_failed_checks_raises_and_clears_an_alert():
    alerts = Alerts(clock=Clock())
    drift = Drift(alerts, alert_share=0.2)
    for n in range(MIN_ANSWERS - 1):
        drift.observe(observed(failures=("repetition",) if n % 4 == 0 else ()))
    assert names(alerts) == []
    drift.observe(observed(failures=("repetition",)))
    assert names(alerts) == ["repetition"]
    assert "28% of the last 32 answers fail the check repetition; 20%" in alerts.active[0].message
    for _ in range(200):
        drift.observe(observed())
    assert names(alerts) == []
    assert drift.rates["repetition"] == pytest.approx(9 / 232)


@pytest.mark.parametrize(
    ("change", "raised"),
    [
        ({}, []),
        ({"entropy": 1.6}, ["entropy drift"]),
        ({"length": 3.0}, ["length drift"]),
        ({"entropy": 1.1}, []),  # beyond chance some day, but small
    ],
    ids=str,
)
def test_lengths_and_entropies_are_compared_with_the_first_answers(change, raised):
    rng = random.Random(2)
    alerts = Alerts(clock=Clock())
    drift = Drift(alerts)

    def some(count, entropy=1.0, length=1.0):
        for _ in range(count):
            tokens = int(length * rng.lognormvariate(4.0, 0.5))
            drift.observe(observed(tokens, rng.gauss(entropy, 0.5)))

    some(800)
    assert names(alerts) == []
    some(300, **change)
    assert names(alerts) == raised


def write_report(path, count=100, entropy=1.0):
    rng = random.Random(4)
    items = [
        {
            "name": f"item:{n}",
            "candidate_text": "I'm sorry, I cannot." if n % 10 == 0 else "A fine answer.",
            "candidate_entropies": [rng.gauss(entropy, 0.3) for _ in range(20 + n % 9)],
        }
        for n in range(count)
    ]
    path.write_text(json.dumps({"items": items}))
    return path


def test_reference_comes_from_a_comparison(tmp_path):
    reference = read_reference(write_report(tmp_path / "report.json"))
    assert reference.failures["refusal"] == 0.1
    assert reference.moments["entropy"].mean == pytest.approx(1.0, abs=0.05)
    alerts = Alerts(clock=Clock())
    drift = Drift(alerts, reference=reference)
    for _ in range(MIN_ANSWERS):
        drift.observe(observed(24, 2.0, failures=("refusal",)))
    assert set(names(alerts)) == {"refusal", "entropy drift"}
    assert "30% are allowed" in next(a.message for a in alerts.active if a.name == "refusal")


def test_unusable_reference_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"has 5 generated answers; at least 32 are needed"):
        read_reference(write_report(tmp_path / "few.json", 5))
    (tmp_path / "old.json").write_text('{"outcome": "pass"}')
    with pytest.raises(ConfigError, match=r"Cannot read .*old\.json.*KeyError\('items'\)"):
        read_reference(tmp_path / "old.json")


def test_rolling_moments_are_exact():
    rng = random.Random(1)
    values = [rng.gauss(0, 1) for _ in range(1000)]
    window = RollingMoments(100)
    for value in values:
        window.add(value)
    last, moments = values[-100:], window.moments()
    mean = sum(last) / 100
    assert (moments.count, moments.mean) == (100, pytest.approx(mean))
    assert moments.variance == pytest.approx(sum((v - mean) ** 2 for v in last) / 100)


def test_alert_is_not_reported_again_too_soon():
    clock, told = Clock(), []
    alerts = Alerts(count=lambda name, label: told.append((name, label)), clock=clock)
    for _ in range(3):
        alerts.update("json", True, "bad")
        alerts.update("json", False, "")
    assert told == [("alerts_raised", "json")]
    clock.now += REPEAT_SECONDS
    alerts.update("json", True, "bad")
    alerts.update("json", True, "worse")
    assert len(told) == 2
    assert alerts.active[0].message == "worse"


def test_probes_raise_an_alert_when_a_known_answer_is_lost(tmp_path):
    (tmp_path / "probes.jsonl").write_text(
        '{"id": "paris", "prompt": "The capital of France is", "check": {"contains": "Paris"}}\n'
        '{"id": "hard", "messages": [{"role": "user", "content": "?"}], "answer": "never"}\n'
    )
    items = read_probes(tmp_path / "probes.jsonl")
    small = ScriptedBackend("small", answer("It is Paris ."))
    config = QualityConfig()
    alerts = Alerts(clock=Clock())
    probes = Probes(items, Router(small, config=config), config, alerts)

    def ask(times):
        for _ in range(times):
            asyncio.run(probes.ask_all())
        return names(alerts)

    assert ask(3) == []
    assert probes.last == {"paris": True, "hard": False}
    assert [call.kind for call in small.calls[:2]] == ["completion", "chat"]
    small.script = [failure()]
    assert ask(MIN_WRONG_ROUNDS - 1) == []
    assert ask(1) == ["probes"]
    assert "1 of 1 questions" in alerts.active[0].message
    small.script = answer("Paris")
    assert ask(1) == []


def test_probes_use_the_first_answer_even_if_it_comes_late(tmp_path):
    (tmp_path / "probes.jsonl").write_text(
        '{"id": "paris", "prompt": "The capital of France is", "check": {"contains": "Paris"}}\n'
    )
    small = ScriptedBackend("small", [failure()])
    config = QualityConfig()
    alerts = Alerts(clock=Clock())
    items = read_probes(tmp_path / "probes.jsonl")
    probes = Probes(items, Router(small, config=config), config, alerts)
    for said, rounds in (
        (None, MIN_WRONG_ROUNDS),
        ("It is Paris .", 1),
        ("It is Rome .", MIN_WRONG_ROUNDS),
    ):
        assert names(alerts) == []
        small.script = [failure()] if said is None else answer(said)
        for _ in range(rounds):
            asyncio.run(probes.ask_all())
    assert names(alerts) == ["probes"]


def test_probe_with_choices_is_refused(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "2+2=", "choices": ["4", "5"], "answer": 0}\n')
    with pytest.raises(ConfigError, match="has choices"):
        read_probes(tmp_path / "p.jsonl")


def rating_base(nats):
    """A base model that rates every character as one token, and generates one more."""

    def script(call):
        text = call.body["prompt"] + "!"
        tokens = tuple(
            TokenLogprob(token=c, logprob=nats if n else float("nan"), bytes=tuple(c.encode()))
            for n, c in enumerate(text)
        )
        return [Delta(text=text, logprobs=tokens), Finish(reason="length"),
                Usage(prompt_tokens=len(text), completion_tokens=1)]  # fmt: skip

    return ScriptedBackend("base", script, models=("base",))


def test_only_the_answers_tokens_are_rated():
    base = rating_base(-2.0)
    alerts = Alerts(clock=Clock())
    drift = Drift(alerts)
    oracle = Oracle(base, 1.0, drift, seed=0)
    assert asyncio.run(rate_answer(base, "r", {"prompt": "Frage: "}, "Größe")) == -2.0
    body = base.calls[0].body
    assert (body["prompt"], body["echo"], body["model"]) == ("Frage: Größe", True, "base")
    router = Router(ScriptedBackend("small", answer("An answer.")), observers=[oracle.observe])

    async def run(count):
        for _ in range(count):
            await collect(router, make_call())
            await asyncio.sleep(0)
            await asyncio.gather(*oracle._running)

    asyncio.run(run(100))
    assert oracle.counts["rated"] == 100
    assert names(alerts) == []
    base.script = rating_base(-4.0).script
    asyncio.run(run(250))
    assert names(alerts) == ["likelihood drift"]
    base.script = [failure()]
    asyncio.run(run(1))
    assert oracle.counts["failed"] == 1


def test_likelihood_equals_that_of_a_forward_pass(tmp_path):
    folder = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)

    async def run():
        async with open_tiny(folder) as engine:
            backend = EmbeddedBackend(engine, tokenizer, model="base", config=ServeConfig())
            return await rate_answer(backend, "r", {"prompt": "Wie groß? "}, "Größe")

    found = asyncio.run(run())
    ids = tokenizer("Wie groß? Größe")["input_ids"]
    with torch.inference_mode():
        logprobs = load_float32(folder)(torch.tensor([ids])).logits[0].double().log_softmax(1)
    # A token a byte: the answer has seven.
    expected = [float(logprobs[place - 1, ids[place]]) for place in range(len(ids) - 7, len(ids))]
    assert found == pytest.approx(sum(expected) / 7, abs=1e-3)


def test_chat_is_rated_with_the_base_models_template(tmp_path):
    folder = write_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    messages = [{"role": "user", "content": "Wie groß?"}]

    async def run(template, address=None):
        async with open_tiny(folder) as engine:
            backend = EmbeddedBackend(
                engine, tokenizer, model="base", config=ServeConfig(), chat_template=template
            )
            here = await rate_answer(backend, "r", {"messages": messages}, "Größe")
            gateway = Gateway(backend=backend, router=Router(backend), config=ServeConfig())
            with serve(gateway) as running:
                upstream = UpstreamBackend.open([running.v1])
                there = await rate_answer(upstream, "r", {"messages": messages}, "Größe")
                await upstream.close()
            assert there == pytest.approx(here, abs=1e-3)
            return here

    def by_forward(text):
        ids = tokenizer(text + "Größe")["input_ids"]
        with torch.inference_mode():
            logits = load_float32(folder)(torch.tensor([ids])).logits[0].double()
        rated = logits.log_softmax(1)
        places = range(len(ids) - 7, len(ids))
        return sum(float(rated[place - 1, ids[place]]) for place in places) / 7

    found = asyncio.run(run(template))
    assert found == pytest.approx(by_forward("<user>Wie groß?<assistant>"), abs=1e-3)
    # Without a template, as plain text.
    plain = by_forward("user: Wie groß?\nassistant: ")
    assert asyncio.run(run(None)) == pytest.approx(plain, abs=1e-3)
    assert plain != pytest.approx(found, abs=1e-3)


def test_tokens_are_selected_by_bytes():
    tokens = [TokenLogprob(token="?", logprob=0, bytes=(b,)) for b in "äb".encode()]
    assert select_by_bytes(tokens, 2, 3) == tokens[2:]
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    assert plain_text(chat) == "user: Hi\nassistant: "
    assert plain_text({"prompt": [1, 2]}) == ""


def test_history_distributes_tokens_over_time():
    clock = Clock(1000.0)
    history = History(clock)
    seen = observed(100, started=1004.5, ended=1025.0, reason="critical")
    history.observe(seen)
    clock.now = 1031.0
    series = history.series()
    assert len(series["tokens_per_second"]) == NUM_SLICES
    assert series["tokens_per_second"][-3:] == pytest.approx([2.5, 5.0, 2.5])
    assert series["requests_per_second"][-3:] == [0, 0, 0.1]
    assert series["whole"]["p95"][-3:] == [None, None, 20.5]
    assert series["first_token"]["p50"][-1] == 0.5
    assert series["causes"] == {"critical": 1}
    clock.now += 10_000
    assert set(history.series()["tokens_per_second"]) == {0.0}
    history.observe(observed(ended=clock.now, started=clock.now - 1))
    clock.now += 10
    assert history.series()["requests_per_second"][-1] == 0.1
    history.observe(observed(ended=100.0))  # long gone
    json.dumps(series)


def test_percentile_is_one_of_the_values():
    assert percentile([], 50) is None
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile(list(range(100)), 99) == 98
    assert percentile([5.0], 99) == 5.0
