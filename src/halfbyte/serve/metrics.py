"""Counters, gauges and histograms for Prometheus, named like vLLM's but with our own prefix.

Values are kept in plain Python objects and turned into metric families only when they are scraped:
a token costs a list entry, a request some dictionary updates.

Source:
    Names and buckets: vLLM 0.32, docs/design/metrics.md and vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any, cast

from halfbyte.errors import require_extra
from halfbyte.machine.memory import peak_memory_bytes, resident_memory_bytes
from halfbyte.serve.backend import Backend
from halfbyte.serve.routing.attempt import Route
from halfbyte.serve.watch.observation import AttemptRecord, Observation
from halfbyte.version import __version__

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

PREFIX = "halfbyte:"
NO_MODEL = "none"
"""Label of a request that no model answered. What clients request must not become a label."""

FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
BETWEEN_TOKENS_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
    40.0, 80.0,
)  # fmt: skip
WHOLE_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1920.0, 7680.0,
)  # fmt: skip

BREAKER_STATES = ("closed", "half-open", "open")

Labels = tuple[str, ...]
Source = Callable[[], Iterable["Metric"]]
"""Returns further metric families when they are scraped."""


class Histogram:
    """A histogram with fixed buckets."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value. Unit: seconds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Return (upper bound, cumulative count) for each bucket, as Prometheus expects."""
        labels = [*map(str, self.bounds), "+Inf"]
        return list(zip(labels, map(float, accumulate(self.counts)), strict=True))


class Metrics:
    """All metrics of one server."""

    def __init__(
        self,
        routes: Callable[[], Sequence[Route]],
        further_backends: Callable[[], Sequence[Backend]] = list,
    ) -> None:
        """Start with zeros.

        Args:
            routes: Returns the models that requests can be sent to now.
            further_backends: Returns other models in memory, such as a shadow.
        """
        self._prometheus = prometheus_client = _load_prometheus()
        self._routes = routes
        self._further_backends = further_backends
        self._counters: dict[str, Counter[Labels]] = {name: Counter() for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._planned: dict[str, int] = {}
        self._sources: list[Source] = []
        self.registry: CollectorRegistry = prometheus_client.CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        """Return all metrics in Prometheus' text format (``text/plain; version=1.0.0``)."""
        return cast(bytes, self._prometheus.generate_latest(self.registry))

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter.

        Args:
            name: One of ``COUNTERS``.
            *labels: Values of its labels.
            by: The increment.
        """
        self._counters[name][labels] += by  # type: ignore[assignment]

    def value(self, name: str, *labels: str) -> float:
        """Return a counter's value."""
        return self._counters[name][labels]

    def counts(self, name: str) -> Mapping[Labels, float]:
        """Return a counter's values by label values."""
        return dict(self._counters[name])

    def count_rejection(self, reason: str) -> None:
        """Count a request that was rejected before it reached a model.

        Args:
            reason: The exceeded limit, as in :class:`halfbyte.serve.limits.Limits`.
        """
        self.count("admission_rejections", reason)

    def set_plan(self, **planned_bytes: int) -> None:
        """Set the planned memory.

        Args:
            **planned_bytes: ``weights``, ``cache`` and ``total`` (peak of the process).
        """
        self._planned = dict(planned_bytes)

    def add_source(self, source: Source) -> None:
        """Add a source of further metric families."""
        self._sources.append(source)

    def observe(self, observation: Observation) -> None:
        """Count a finished request."""
        model = observation.served.model or NO_MODEL
        answer, started = observation.answer, observation.started
        for attempt in observation.attempts:
            self._observe_attempt(attempt)
        for failed, _ in pairwise(observation.attempts):
            self.count("fallbacks", failed.cause, failed.backend)
        if answer is not None and answer.role == "fallback" and len(observation.attempts) == 1:
            # Fallback without a failed attempt: a critical request, or an open breaker.
            self.count("fallbacks", observation.served.reason, answer.backend)
        if observation.status != 200 or answer is None:
            self.count("request_failure", str(observation.status), model)
            return
        for reason in answer.finished.values():
            self.count("request_success", reason, model)
        if answer.usage is not None:
            self.count("prompt_tokens", model, by=answer.usage.prompt_tokens)
            self.count("generation_tokens", model, by=answer.usage.completion_tokens)
            self.count("prefix_cache_queries", model, by=answer.usage.prompt_tokens)
            self.count("prefix_cache_hits", model, by=answer.usage.cached_tokens)
        if observation.first is not None:
            seconds = observation.first - started
            self._histogram("time_to_first_token_seconds", model).observe(seconds)
        if observation.ended is not None:
            seconds = observation.ended - started
            self._histogram("e2e_request_latency_seconds", model).observe(seconds)
        gaps = self._histogram("inter_token_latency_seconds", model)
        for gap in answer.gaps:
            gaps.observe(gap)

    def _observe_attempt(self, attempt: AttemptRecord) -> None:
        if attempt.finished:
            self.count("monitored_answers", attempt.backend)
        for check in attempt.failures:
            self.count("monitor_failures", check, attempt.backend)

    def _histogram(self, name: str, model: str) -> Histogram:
        histograms = self._histograms[name]
        if (model,) not in histograms:
            histograms[model,] = Histogram(HISTOGRAMS[name][1])
        return histograms[model,]

    def collect(self) -> Iterator[Metric]:
        """Yield all metric families; called by the registry."""
        from prometheus_client.core import (
            CounterMetricFamily,
            GaugeMetricFamily,
            HistogramMetricFamily,
        )

        for name, (text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(PREFIX + name, text, labels=labels)
            for values, count in list(self._counters[name].items()):
                counter.add_metric(values, count)
            yield counter
        for name, (text, _) in HISTOGRAMS.items():
            family = HistogramMetricFamily(PREFIX + name, text, labels=("model_name",))
            for values, histogram in list(self._histograms[name].items()):
                family.add_metric(values, histogram.cumulative(), histogram.total)
            yield family
        for name, (text, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(PREFIX + name, text, labels=labels)
            for values, number in self._gauges(name):
                gauge.add_metric(values, number)
            yield gauge
        for source in self._sources:
            yield from source()

    def _gauges(self, name: str) -> Iterator[tuple[Labels, float]]:
        if name == "version_info":
            yield (__version__,), 1
        elif name == "memory_bytes":
            yield from (((what,), size) for what, size in self.memory().items())
        elif name == "memory_planned_bytes":
            yield from (((what,), size) for what, size in self._planned.items())
        else:
            for route in self._routes():
                load = route.backend.load()
                values = {
                    "num_requests_running": load.running,
                    "num_requests_waiting": load.waiting,
                    "kv_cache_usage_perc": load.cache_used_bytes / (load.cache_bytes or 1),
                    "breaker_state": BREAKER_STATES.index(route.breaker.state),
                }
                if name != "kv_cache_usage_perc" or load.cache_bytes:
                    yield (route.name, route.role), values[name]

    @property
    def planned(self) -> Mapping[str, int]:
        """The planned memory in bytes; empty if there is no plan."""
        return self._planned

    def memory(self) -> dict[str, int]:
        """Return the memory in use by weights, cache, and the process and its peak, in bytes."""
        backends = [*(route.backend for route in self._routes()), *self._further_backends()]
        unique = {id(backend): backend for backend in backends}
        loads = [backend.load() for backend in unique.values()]
        return {
            "weights": sum(load.weight_bytes for load in loads),
            "cache": sum(load.cache_bytes for load in loads),
            "cache_used": sum(load.cache_used_bytes for load in loads),
            "process": resident_memory_bytes(),
            "process_peak": peak_memory_bytes(),
        }


def _load_prometheus() -> Any:
    """Import prometheus-client, which the extra ``serve`` installs."""
    with require_extra("prometheus_client", "serve", "Collecting metrics"):
        import prometheus_client
    return prometheus_client


COUNTERS: Mapping[str, tuple[str, Labels]] = {
    "request_success": (
        "Answered choices by finish reason.",
        ("finished_reason", "model_name"),
    ),
    "request_failure": ("Failed requests by HTTP status.", ("status", "model_name")),
    "prompt_tokens": ("Prompt tokens of answered requests.", ("model_name",)),
    "generation_tokens": ("Generated tokens of answered requests.", ("model_name",)),
    "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", ("model_name",)),
    "prefix_cache_hits": ("Prompt tokens found in the prefix cache.", ("model_name",)),
    "admission_rejections": (
        "Requests rejected before they reached a model, by limit.",
        ("reason",),
    ),
    "fallbacks": ("Fallbacks to another model, by cause.", ("cause", "backend")),
    "monitored_answers": ("Answers that were checked.", ("backend",)),
    "monitor_failures": ("Answers that failed a check.", ("check", "backend")),
    "alerts_raised": ("Alerts that were raised.", ("name",)),
    "dropped": (
        "Log rows and webhook messages that were dropped so that no request waits.",
        ("what",),
    ),
}
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": (
        "Time from the request to its first token, buffering included.",
        FIRST_TOKEN_BUCKETS,
    ),
    "inter_token_latency_seconds": (
        "Time between two tokens of an answer.",
        BETWEEN_TOKENS_BUCKETS,
    ),
    "e2e_request_latency_seconds": (
        "Time from the request to the end of its answer.",
        WHOLE_BUCKETS,
    ),
}
GAUGES: Mapping[str, tuple[str, Labels]] = {
    "num_requests_running": ("Requests that a model is running.", ("backend", "role")),
    "num_requests_waiting": ("Requests in the queue.", ("backend", "role")),
    "kv_cache_usage_perc": ("Share of the KV cache in use; 1 is full.", ("backend", "role")),
    "breaker_state": (
        "State of the circuit breaker: 0 closed, 1 half-open, 2 open.",
        ("backend", "role"),
    ),
    "memory_bytes": ("Memory in use.", ("what",)),
    "memory_planned_bytes": ("Planned memory.", ("what",)),
    "version_info": ("Version of halfbyte.", ("version",)),
}
