"""Counters, gauges and histograms for Prometheus, with vLLM's stems and our own prefix.

Numbers are kept as plain Python and turned into families only when somebody asks: a token costs a
list entry, a request some dictionary updates.

Source:
    Names and buckets: vLLM 0.32, docs/design/metrics.md and vllm/v1/metrics/loggers.py.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
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
NOBODY = "none"
"""Stands for the model of a request that none answered; what clients ask for is no label."""

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
"""Gives further families when somebody asks."""


class Histogram:
    """How often a value fell into which bucket."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value. Unit: seconds."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        """Give (upper bound, values up to it), as Prometheus wants them."""
        found, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            below += count
            found.append(("+Inf" if bound == float("inf") else str(bound), float(below)))
        return found


class Metrics:
    """Everything that is counted about one server."""

    def __init__(
        self,
        routes: Callable[[], Sequence[Route]],
        beside: Callable[[], Sequence[Backend]] = list,
    ) -> None:
        """Start with zeros.

        Args:
            routes: Gives the models that may be asked now.
            beside: Gives those that are in memory beside them, such as a shadow.
        """
        self._prometheus = prometheus_client = _load_prometheus()
        self._routes = routes
        self._beside = beside
        self._counters: dict[str, Counter[Labels]] = {name: Counter() for name in COUNTERS}
        self._histograms: dict[str, dict[Labels, Histogram]] = {name: {} for name in HISTOGRAMS}
        self._planned: dict[str, int] = {}
        self._sources: list[Source] = []
        self.registry: CollectorRegistry = prometheus_client.CollectorRegistry(auto_describe=False)
        self.registry.register(self)
        prometheus_client.ProcessCollector(registry=self.registry)

    def render(self) -> bytes:
        """Give everything in Prometheus' text form (``text/plain; version=1.0.0``)."""
        return cast(bytes, self._prometheus.generate_latest(self.registry))

    def count(self, name: str, *labels: str, by: float = 1) -> None:
        """Add to a counter.

        Args:
            name: One of ``COUNTERS``.
            *labels: Its labels' values.
            by: How much.
        """
        self._counters[name][labels] += by  # type: ignore[assignment]

    def value(self, name: str, *labels: str) -> float:
        """Give a counter's value."""
        return self._counters[name][labels]

    def counts(self, name: str) -> Mapping[Labels, float]:
        """Give a counter's values by its labels."""
        return dict(self._counters[name])

    def count_rejection(self, reason: str) -> None:
        """Note that a request was refused before any model saw it.

        Args:
            reason: A word of the server's own, as in :class:`halfbyte.serve.limits.Limits`.
        """
        self.count("admission_rejections", reason)

    def set_plan(self, **planned_bytes: int) -> None:
        """Note what the plan says.

        Args:
            **planned_bytes: ``weights``, ``cache`` and ``total`` (the process at its peak).
        """
        self._planned = dict(planned_bytes)

    def add_source(self, source: Source) -> None:
        """Let somebody give further families."""
        self._sources.append(source)

    def observe(self, seen: Observation) -> None:
        """Count a request that is over."""
        model = seen.served.model or NOBODY
        answer = seen.answer
        for attempt in seen.attempts:
            self._observe_attempt(attempt)
        for before, _ in pairwise(seen.attempts):
            self.count("fallbacks", before.cause, before.backend)
        if answer is not None and answer.role == "fallback" and len(seen.attempts) == 1:
            # Nobody had to fail for this one: critical, or a breaker is open.
            self.count("fallbacks", seen.served.reason, answer.backend)
        if seen.status != 200 or answer is None:
            self.count("request_failure", str(seen.status), model)
            return
        for reason in answer.finished.values():
            self.count("request_success", reason, model)
        if answer.usage is not None:
            self.count("prompt_tokens", model, by=answer.usage.prompt_tokens)
            self.count("generation_tokens", model, by=answer.usage.completion_tokens)
            self.count("prefix_cache_queries", model, by=answer.usage.prompt_tokens)
            self.count("prefix_cache_hits", model, by=answer.usage.cached_tokens)
        if seen.first is not None:
            self._histogram("time_to_first_token_seconds", model).observe(seen.first - seen.started)
        if seen.ended is not None:
            self._histogram("e2e_request_latency_seconds", model).observe(seen.ended - seen.started)
        between = self._histogram("inter_token_latency_seconds", model)
        for gap in answer.gaps:
            between.observe(gap)

    def _observe_attempt(self, attempt: AttemptRecord) -> None:
        if attempt.finished:
            self.count("monitored_answers", attempt.backend)
        for check in attempt.failures:
            self.count("monitor_failures", check, attempt.backend)

    def _histogram(self, name: str, model: str) -> Histogram:
        found = self._histograms[name].get((model,))
        if found is None:
            found = self._histograms[name][model,] = Histogram(HISTOGRAMS[name][1])
        return found

    def collect(self) -> Iterator[Metric]:
        """Give all families; called by the registry."""
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
        """What the plan says, in bytes; empty where there is none."""
        return self._planned

    def memory(self) -> dict[str, int]:
        """Give what is in memory now: weights, cache, the process and its peak. Unit: bytes."""
        backends = {id(b): b for b in (*(r.backend for r in self._routes()), *self._beside())}
        loads = [backend.load() for backend in backends.values()]
        return {
            "weights": sum(load.weight_bytes for load in loads),
            "cache": sum(load.cache_bytes for load in loads),
            "cache_used": sum(load.cache_used_bytes for load in loads),
            "process": resident_memory_bytes(),
            "process_peak": peak_memory_bytes(),
        }


def _load_prometheus() -> Any:
    """Import prometheus-client, which the extra ``serve`` brings."""
    with require_extra("prometheus_client", "serve", "Counting what is served"):
        import prometheus_client
    return prometheus_client


COUNTERS: Mapping[str, tuple[str, Labels]] = {
    "request_success": (
        "Choices that were answered, by how they ended.",
        ("finished_reason", "model_name"),
    ),
    "request_failure": ("Requests that were not answered.", ("status", "model_name")),
    "prompt_tokens": ("Prompt tokens of answered requests.", ("model_name",)),
    "generation_tokens": ("Tokens of given answers.", ("model_name",)),
    "prefix_cache_queries": ("Prompt tokens looked up in the cache.", ("model_name",)),
    "prefix_cache_hits": ("Prompt tokens found in the cache.", ("model_name",)),
    "admission_rejections": ("Requests refused before any model saw them.", ("reason",)),
    "fallbacks": ("Times that the next model was asked.", ("cause", "backend")),
    "monitored_answers": ("Answers that the monitors looked at.", ("backend",)),
    "monitor_failures": ("Answers that a monitor objected to.", ("check", "backend")),
    "alerts_raised": ("Alerts that were raised.", ("name",)),
    "dropped": ("What was dropped so that no request waits.", ("what",)),
}
HISTOGRAMS: Mapping[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": (
        "From the request to its first token out, what is held back included.",
        FIRST_TOKEN_BUCKETS,
    ),
    "inter_token_latency_seconds": ("Between two tokens of an answer.", BETWEEN_TOKENS_BUCKETS),
    "e2e_request_latency_seconds": ("From the request to the end of its answer.", WHOLE_BUCKETS),
}
GAUGES: Mapping[str, tuple[str, Labels]] = {
    "num_requests_running": ("Requests that a model works on.", ("backend", "role")),
    "num_requests_waiting": ("Requests that wait in line.", ("backend", "role")),
    "kv_cache_usage_perc": ("Share of the cache in use; 1 is full.", ("backend", "role")),
    "breaker_state": ("0 closed, 1 half-open, 2 open.", ("backend", "role")),
    "memory_bytes": ("In memory now.", ("what",)),
    "memory_planned_bytes": ("What the plan says.", ("what",)),
    "version_info": ("Of halfbyte.", ("version",)),
}
