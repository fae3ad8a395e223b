"""Combines router, monitors, metrics and rollouts around the served model.

::

    quality = Quality(primary, config, connect)
    await quality.start()                      # background tasks
    async for event in quality.router.stream(call, served): ...
    quality.metrics.render()                   # for Prometheus
    quality.snapshot()                         # for the dashboard
    await quality.close()
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.serve.backend import Backend
from halfbyte.serve.metrics import PREFIX, Metrics
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.canary import Canary
from halfbyte.serve.rollout.shadow import Shadow
from halfbyte.serve.rollout.store_models import Connect, OpenModels, StoreBackend
from halfbyte.serve.rollout.trial import Trial
from halfbyte.serve.routing.attempt import Route
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.confidence import read_confidence
from halfbyte.serve.routing.router import Router
from halfbyte.serve.routing.spending_file import SpendingFile
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.drift import Drift, read_reference
from halfbyte.serve.watch.health import Health
from halfbyte.serve.watch.history import History
from halfbyte.serve.watch.oracle import Oracle
from halfbyte.serve.watch.probes import Probes, read_probes
from halfbyte.serve.watch.request_log import RequestLog
from halfbyte.version import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric


CANARY_STATES = ("running", "promoted", "rolled back")


class Quality:
    """A router with its monitors, metrics and rollouts."""

    def __init__(
        self,
        primary: Backend,
        config: QualityConfig,
        connect: Connect,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """Create everything that the settings enable; no background task is started yet.

        Args:
            primary: The served model. Its owner closes it, unless a canary replaces it.
            config: The settings.
            connect: Opens further models by address or folder.
            clock: Returns monotonic seconds.
        """
        self.config = config
        self._clock = clock
        self._started = clock()
        self._models = OpenModels(connect, self._report)
        confidence = None if config.confidence is None else read_confidence(Path(config.confidence))
        self.router = Router(
            primary,
            fallbacks=[self._models.open(location) for location in config.fallback],
            config=config,
            confidence=confidence,
            clock=clock,
        )
        self.metrics = Metrics(lambda: self.router.routes, lambda: self._models.owned)
        self.metrics.add_source(self._families)
        self.alerts = Alerts(webhook=config.webhook, count=self.metrics.count, clock=clock)
        reference = None if config.reference is None else read_reference(Path(config.reference))
        self.drift = Drift(self.alerts, reference=reference, alert_share=config.alert_share)
        self.history = History(clock)
        self.spending: SpendingFile | None = None
        self.request_log: RequestLog | None = None
        self.probes: Probes | None = None
        self.oracle: Oracle | None = None
        self.shadow: Shadow | None = None
        self.trial: Trial | None = None
        health = Health(self.router, self.metrics, self.alerts, clock=clock)
        for observer in (
            self.metrics.observe,
            self.drift.observe,
            self.history.observe,
            health.observe,
        ):
            self.router.add_observer(observer)
        if isinstance(primary, StoreBackend):
            primary.report = self._report
        self._open_watchers()
        self._open_candidates()

    @property
    def canary(self) -> Canary | None:
        """The canary trial; None if there is none."""
        return None if self.trial is None else self.trial.canary

    def _report(self, name: str, message: str) -> None:
        self.alerts.report_event(name, message)

    def set_plan(self, *, weights: int, cache: int, total: int) -> None:
        """Set the planned memory, in bytes; that of the other models is added.

        Args:
            weights: The primary model's weights.
            cache: The primary model's KV cache.
            total: Peak of the process with the primary model.
        """
        loads = [backend.load() for backend in self._models.owned]
        other_weights = sum(load.weight_bytes for load in loads)
        other_cache = sum(load.cache_bytes for load in loads)
        self.metrics.set_plan(
            weights=weights + other_weights,
            cache=cache + other_cache,
            total=total + other_weights + other_cache,
        )

    def _open_watchers(self) -> None:
        config = self.config
        if config.evidence is not None and config.fallback:
            self.spending = SpendingFile(Path(config.evidence), self.router.budget)
            self.router.add_observer(self.spending.observe)
        if config.request_log is not None:
            self.request_log = RequestLog(
                Path(config.request_log),
                texts=config.request_log_texts,
                rows=config.request_log_rows,
                dropped=lambda count: self.metrics.count("dropped", "request log", by=count),
            )
            self.router.add_observer(self.request_log.observe)
        if config.probes is not None:
            items = read_probes(Path(config.probes))
            self.probes = Probes(items, self.router, config, self.alerts, clock=self._clock)
        if config.oracle is not None:
            self.oracle = Oracle(self._models.open(config.oracle), config.oracle_share, self.drift)
            self.router.add_observer(self.oracle.observe)

    def _open_candidates(self) -> None:
        config = self.config
        if config.shadow is not None:
            candidate = self._models.open(config.shadow)
            self.shadow = Shadow(
                candidate,
                config,
                name=" ".join(filter(None, (config.shadow, getattr(candidate, "version", "")))),
                alarm=lambda message: self.alerts.report_event("shadow", message),
                clock=self._clock,
            )
            self.router.add_observer(self.shadow.observe)
        if config.canary is not None:
            self.trial = Trial(
                config.canary, config, self.router, self._models, self.alerts, self._clock
            )

    async def start(self) -> None:
        """Start the background tasks. Needs a running event loop."""
        await self.alerts.start()
        if self.trial is not None:
            await self.trial.start()
        if self.probes is not None:
            await self.probes.start()
        for route in self.router.routes:
            # A candidate keeps its version during the trial; the other models follow their aliases.
            if isinstance(route.backend, StoreBackend) and route.role != "canary":
                await route.backend.start()

    async def close(self) -> None:
        """Stop the background tasks, save the evidence, and close the models opened here."""
        for part in (self.trial, self.probes, self.oracle, self.shadow):
            if part is not None:
                await part.close()
        await self._models.close()
        await self.alerts.close()
        for file in (self.spending, self.request_log):
            if file is not None:
                await asyncio.to_thread(file.close)

    def snapshot(self) -> dict[str, Any]:
        """Return what the dashboard shows, as JSON-serializable values."""
        metrics = self.metrics
        return {
            "version": __version__,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "uptime_seconds": self._clock() - self._started,
            "backends": [_describe(route) for route in self.router.routes],
            "totals": {
                name: sum(metrics.counts(name).values())
                for name in (
                    "request_success",
                    "request_failure",
                    "prompt_tokens",
                    "generation_tokens",
                    "prefix_cache_queries",
                    "prefix_cache_hits",
                )
            },
            "series": self.history.series(),
            "memory": metrics.memory(),
            "planned": dict(metrics.planned),
            "fallbacks": _sum_by_first(metrics.counts("fallbacks")),
            "rejections": _sum_by_first(metrics.counts("admission_rejections")),
            "dropped": _sum_by_first(metrics.counts("dropped")),
            "monitors": {
                "answers": sum(metrics.counts("monitored_answers").values()),
                "failures": _sum_by_first(metrics.counts("monitor_failures")),
                "last_rates": self.drift.rates,
                "alert_share": self.config.alert_share,
                "drift": dict(self.drift.scores),
            },
            "alerts": [alert.to_dict() for alert in self.alerts.active],
            "probes": None if self.probes is None else dict(self.probes.last),
            "oracle": None if self.oracle is None else dict(self.oracle.counts),
            "canary": None if self.canary is None else self.canary.summary(),
            "shadow": None if self.shadow is None else self.shadow.evidence(),
        }

    def _families(self) -> Iterator[Metric]:
        """Yield the metric families of alerts and canary."""
        from prometheus_client.core import GaugeMetricFamily

        alerts = GaugeMetricFamily(
            PREFIX + "alert_active", "1 while an alert is active.", labels=("name",)
        )
        for alert in self.alerts.active:
            alerts.add_metric((alert.name,), 1)
        yield alerts
        if self.canary is None:
            return
        summary = self.canary.summary()
        state = GaugeMetricFamily(
            PREFIX + "canary_state", "1 for the state of the trial.", labels=("state",)
        )
        for name in CANARY_STATES:
            state.add_metric((name,), float(self.canary.status == name))
        yield state
        evidence = GaugeMetricFamily(
            PREFIX + "canary_evidence_nats",
            "Evidence that the candidate is worse, that it is as good, and needed for a decision.",
            labels=("of",),
        )
        for of in ("worse", "as_good", "needed"):
            evidence.add_metric((of,), summary[f"evidence_{of}"])
        yield evidence
        requests = GaugeMetricFamily(
            PREFIX + "canary_requests",
            "Requests of the trial by arm and outcome.",
            labels=("arm", "outcome"),
        )
        for arm, counts in summary["arms"].items():
            requests.add_metric((arm, "failed"), counts["failures"])
            requests.add_metric((arm, "good"), counts["requests"] - counts["failures"])
        yield requests


def _describe(route: Route) -> dict[str, Any]:
    load = route.backend.load()
    return {
        "name": route.name,
        "role": route.role,
        "models": list(route.backend.models),
        "version": str(getattr(route.backend, "version", "")),
        "breaker": route.breaker.state,
        "running": load.running,
        "waiting": load.waiting,
        "cache_used_bytes": load.cache_used_bytes,
        "cache_bytes": load.cache_bytes,
    }


def _sum_by_first(counts: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    """Sum counts by their first label."""
    sums: dict[str, float] = {}
    for labels, count in counts.items():
        sums[labels[0]] = sums.get(labels[0], 0.0) + count
    return sums
