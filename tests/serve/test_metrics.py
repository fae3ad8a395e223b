from __future__ import annotations

import asyncio
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.serve.helpers_quality import Clock, ScriptedBackend, answer, collect, failure, make_call

from halfbyte.errors import MissingExtraError, ServeError
from halfbyte.serve.assembly import open_service
from halfbyte.serve.backend import Delta, Finish, Load, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.config import EngineConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.metrics import Histogram, Metrics
from halfbyte.serve.quality import Quality
from halfbyte.serve.quality_config import QualityConfig


def scrape(metrics):
    text = metrics.render().decode()
    values = {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return lambda name, *labels: values["halfbyte:" + name, *sorted(labels)]


class Ticking:
    """A model whose every event takes half a second of a fake clock."""

    name, models, version = "small", ("small",), ""

    def __init__(self, clock, events):
        self.clock, self.events = clock, events
        self.load = ScriptedBackend("x", []).load

    async def stream(self, call):
        for event in self.events:
            self.clock.now += 0.5
            yield event


def test_latencies_tokens_and_finish_reasons_are_counted():
    clock = Clock()
    quality = Quality(
        Ticking(clock, answer("one two three")), QualityConfig(), pytest.fail, clock=clock
    )
    for _ in range(4):
        asyncio.run(collect(quality.router, make_call()))
    found = scrape(quality.metrics)
    assert found("request_success_total", "stop", "small") == 4
    assert found("prompt_tokens_total", "small") == 20
    assert found("generation_tokens_total", "small") == 12
    assert found("time_to_first_token_seconds_sum", "small") == 4 * 0.5
    # Two gaps between three pieces; the end and the usage are no tokens.
    assert found("inter_token_latency_seconds_count", "small") == 8
    assert found("inter_token_latency_seconds_sum", "small") == 4.0
    assert found("e2e_request_latency_seconds_bucket", "small", "2.5") == 4
    assert found("e2e_request_latency_seconds_bucket", "small", "2.0") == 0
    assert found("e2e_request_latency_seconds_sum", "small") == 4 * 2.5
    assert found("monitored_answers_total", "small") == 4
    assert found("kv_cache_usage_perc", "small", "primary") == 0.1
    assert found("memory_bytes", "process_peak") > 1e6


def test_tokens_that_arrive_together_share_the_time():
    clock = Clock()
    pieces = [
        Delta(text="one", entropies=(1.0,)),
        Delta(text=" two three", entropies=(1.0, 1.0)),
        Finish(),
        Usage(prompt_tokens=5, completion_tokens=3),
    ]
    quality = Quality(Ticking(clock, pieces), QualityConfig(), pytest.fail, clock=clock)
    asyncio.run(collect(quality.router, make_call()))
    found = scrape(quality.metrics)
    assert found("inter_token_latency_seconds_count", "small") == 2
    assert found("inter_token_latency_seconds_sum", "small") == 0.5


def test_fallbacks_failures_and_rejections_are_counted_by_cause():
    backends = {"large": ScriptedBackend("large", answer("larger"), models=("big",))}
    small = ScriptedBackend("small", [failure()])
    config = QualityConfig(fallback=("large",), breaker_failures=2)
    quality = Quality(small, config, backends.pop)
    for _ in range(3):
        asyncio.run(collect(quality.router, make_call()))
    asyncio.run(collect(quality.router, make_call(tags=["critical"])))
    quality.router.routes[1].backend.script = [failure()]
    with pytest.raises(ServeError):
        asyncio.run(collect(quality.router, make_call(model='made "up"\n')))
    quality.metrics.count_rejection("queue")
    quality.metrics.set_plan(weights=5, cache=7, total=20)
    found = scrape(quality.metrics)
    assert found("fallbacks_total", "error", "small") == 2
    assert found("fallbacks_total", "breaker", "large") == 1
    assert found("fallbacks_total", "critical", "large") == 1
    assert found("request_failure_total", "500", "none") == 1
    assert found("request_success_total", "stop", "big") == 4
    assert found("admission_rejections_total", "queue") == 1
    assert found("breaker_state", "small", "primary") == 2
    assert found("memory_planned_bytes", "total") == 20
    asyncio.run(quality.close())
    assert quality.router.routes[1].backend.closed
    assert not small.closed


def test_models_have_unique_names_and_all_count_as_memory():
    class Heavy(ScriptedBackend):
        def load(self):
            return Load(weight_bytes=100, cache_bytes=50)

    config = QualityConfig(fallback=("a", "b"), canary="c", shadow="d")
    quality = Quality(Heavy("here", []), config, lambda place: Heavy("here", []))
    names = [route.name for route in quality.router.routes]
    assert names == ["here", "here-canary", "here-fallback", "here-fallback1"]
    assert len(set(names)) == len(names)
    text = quality.metrics.render().decode()
    samples = [line.split(" ")[0] for line in text.splitlines() if not line.startswith("#")]
    assert len(samples) == len(set(samples))
    assert quality.metrics.memory()["weights"] == 500
    quality.set_plan(weights=100, cache=50, total=1000)
    assert quality.metrics.planned == {"weights": 500, "cache": 250, "total": 1600}


def test_histogram_puts_a_bound_into_its_own_bucket():
    histogram = Histogram((0.1, 1.0))
    for value in (0.05, 0.1, 0.5, 1.0, 7.0):
        histogram.observe(value)
    assert histogram.cumulative() == [("0.1", 2), ("1.0", 4), ("+Inf", 5)]
    assert histogram.total == pytest.approx(8.65)


def test_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(MissingExtraError, match=r'pip install "halfbyte\[serve\]"'):
        Metrics(list)


def test_requests_over_a_limit_are_counted_by_the_limit():
    config = ServeConfig(upstreams=("http://127.0.0.1:9",), max_requests=2, max_requests_per_key=1)
    service = open_service(None, config, EngineConfig(), QualityConfig(), ApiKeys())
    limits = service.gateway.limits
    with limits.enter("ann"):
        with pytest.raises(ServeError), limits.enter("ann"):
            pass
        with limits.enter("bob"), pytest.raises(ServeError), limits.enter("carl"):
            pass
    found = scrape(service.quality.metrics)
    assert found("admission_rejections_total", "max_requests_per_key") == 1
    assert found("admission_rejections_total", "requests") == 1
    assert service.quality.snapshot()["rejections"] == {"max_requests_per_key": 1, "requests": 1}
    asyncio.run(service.stop())
