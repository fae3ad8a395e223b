"""Everything around the models, put together: the API asks this, and this asks the models.

::

    quality = open_quality(primary, config, connect)
    await quality.start()                      # what runs beside the requests
    async for event in quality.router.stream(call, served): ...
    quality.metrics.render()                   # for Prometheus
    quality.snapshot()                         # for the dashboard
    await quality.close()
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from halfbyte.errors import HalfbyteError
from halfbyte.serve.exchange import Backend
from halfbyte.serve.metrics import PREFIX, Metrics, peak_bytes
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.canary import Canary
from halfbyte.serve.rollout.shadow import Shadow
from halfbyte.serve.rollout.store_models import (
    Connect,
    StoreBackend,
    StoreModel,
    is_store_reference,
    record_verdict,
    resolve_store_model,
)
from halfbyte.serve.routing.attempt import Route
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.confidence import read_confidence
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.drift import Drift, read_reference
from halfbyte.serve.watch.history import History
from halfbyte.serve.watch.observation import Observation
from halfbyte.serve.watch.oracle import Oracle
from halfbyte.serve.watch.probes import Probes, read_probes
from halfbyte.serve.watch.request_log import RequestLog
from halfbyte.store.store import CHAMPION
from halfbyte.version import __version__

if TYPE_CHECKING:
    from prometheus_client.core import Metric

log = logging.getLogger(__name__)

HEALTH_SECONDS = 1.0
"""Between two looks at models, budget and memory."""
MEMORY_SLACK = 1.1
"""Of the plan that the process may take before it is an alert."""

CANARY_STATES = ("running", "promoted", "rolled back")


class Quality:
    """A router with all that watches it."""

    def __init__(
        self,
        primary: Backend,
        config: QualityConfig,
        connect: Connect,
        *,
        clock: Clock = time.monotonic,
    ) -> None:
        """Make everything that the settings ask for; nothing runs yet.

        Args:
            primary: The model that is served; stays its owner's, until a canary takes its place.
            config: What is asked for.
            connect: Opens the other models: an address, a folder.
            clock: The time.
        """
        self.config = config
        self._connect = connect
        self._clock = clock
        self._started = clock()
        self._owned: list[Backend] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._promoted_before: Backend | None = None
        confidence = None if config.confidence is None else read_confidence(Path(config.confidence))
        self.router = Router(
            primary,
            fallbacks=[self._open(place) for place in config.fallback],
            config=config,
            confidence=confidence,
            clock=clock,
        )
        self.metrics = Metrics(lambda: self.router.routes)
        self.metrics.add_source(self._families)
        self.alerts = Alerts(webhook=config.webhook, count=self.metrics.count, clock=clock)
        reference = None if config.reference is None else read_reference(Path(config.reference))
        self.drift = Drift(self.alerts, reference=reference, alert_share=config.alert_share)
        self.history = History(clock)
        self.request_log: RequestLog | None = None
        self.probes: Probes | None = None
        self.oracle: Oracle | None = None
        self.shadow: Shadow | None = None
        self.canary: Canary | None = None
        self._looked = clock()
        for observer in (
            self.metrics.observe,
            self.drift.observe,
            self.history.observe,
            self._watch_health,
        ):
            self.router.add_observer(observer)
        self._open_watchers()
        self._open_candidates()

    def _open(self, place: str, model: StoreModel | None = None) -> Backend:
        """Open a model that is closed with this one."""
        backend: Backend
        if is_store_reference(place):
            model = model or resolve_store_model(place)
            inner = self._connect(str(model.folder))
            backend = StoreBackend(model, inner, self._connect, tell=self._tell)
        else:
            backend = self._connect(place)
        self._owned.append(backend)
        return backend

    def _tell(self, name: str, message: str) -> None:
        self.alerts.tell(name, message)

    def _watch_health(self, seen: Observation) -> None:
        """Raise alerts about models that are left alone, a spent budget, and too much memory."""
        now = self._clock()
        if now - self._looked < HEALTH_SECONDS:
            return
        self._looked = now
        for route in self.router.routes:
            self.alerts.set(
                f"model {route.backend.name}",
                route.breaker.state != "closed",
                f"the {route.role} model '{route.backend.name}' failed "
                f"{self.config.breaker_failures} times in a row and is left alone",
            )
        self.alerts.set(
            "fallback budget",
            not self.router.budget.has_left,
            "the larger model's budget is spent: no request falls back until it comes back",
        )
        planned, peak = self.metrics.planned.get("total"), peak_bytes()
        if planned:
            self.alerts.set(
                "memory",
                peak > MEMORY_SLACK * planned,
                f"the process had {peak / 1e9:.2f} GB at its peak; {planned / 1e9:.2f} GB are "
                "planned",
                float(peak),
            )

    def _open_watchers(self) -> None:
        config = self.config
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
            self.oracle = Oracle(self._open(config.oracle), config.oracle_share, self.drift)
            self.router.add_observer(self.oracle.observe)

    def _open_candidates(self) -> None:
        config = self.config
        if config.shadow is not None:
            candidate = self._open(config.shadow)
            self.shadow = Shadow(
                candidate,
                config,
                alarm=lambda message: self.alerts.tell("shadow", message),
                clock=self._clock,
            )
            self.router.add_observer(self.shadow.observe)
        if config.canary is not None:
            self._open_canary(config.canary)

    def _open_canary(self, place: str) -> None:
        """Begin a trial, or act on its end before a restart."""
        model = resolve_store_model(place) if is_store_reference(place) else None
        self.canary = Canary(
            place if model is None else f"{place} {model.version}",
            self.config,
            decide=self._decided,
            clock=self._clock,
        )
        primary = self.router.routes[0].backend
        in_use = model is not None and getattr(primary, "version", "") == model.version
        if self.canary.status == "rolled back" or in_use:
            log.warning("canary %s is not tried: %s", place, self.canary.reason or "it is in use")
            return
        candidate = self._open(place, model)
        if self.canary.status == "running":
            self.router.add_observer(self.canary.observe)
            self.router.set_canary(candidate, self.canary)
        else:
            log.warning("canary %s was promoted before: it is asked first", place)
            self._promoted_before = candidate

    def _decided(self, canary: Canary) -> None:
        """Act on the end of a trial, beside the request that brought it."""
        self.alerts.tell(f"canary {canary.status}", f"{canary.candidate}: {canary.reason}")
        self._spawn(self._apply(canary))

    async def _apply(self, canary: Canary) -> None:
        route = next((r for r in self.router.routes if r.role == "canary"), None)
        if route is None:
            return
        candidate = route.backend
        self.router.set_canary(None)
        promoted = canary.status == "promoted"
        primary = self.router.routes[0].backend
        changing = primary.changing if isinstance(primary, StoreBackend) else asyncio.Lock()
        async with changing:
            await self._record(candidate, canary, promoted=promoted)
            if promoted:
                await self._take_over(candidate)
                return
        self._owned.remove(candidate)
        await candidate.close()

    async def _take_over(self, candidate: Backend) -> None:
        """Let a candidate be asked first; the model that was finishes what it has and is closed."""
        primary = self.router.routes[0].backend
        if isinstance(primary, StoreBackend) and isinstance(candidate, StoreBackend):
            # It goes on following its own alias, which points to the candidate's version now.
            self._owned.remove(candidate)
            primary.adopt(candidate.model, candidate.current)
        else:
            await self.router.set_primary(candidate).close()

    async def _record(self, candidate: Backend, canary: Canary, *, promoted: bool) -> None:
        """Tell the store, where the candidate comes from one."""
        if not isinstance(candidate, StoreBackend):
            return
        primary = self.router.routes[0].backend
        alias = primary.model.alias if isinstance(primary, StoreBackend) else None
        target = (alias or CHAMPION) if promoted else None
        try:
            await asyncio.to_thread(
                record_verdict, candidate.model, canary.evidence(), promote_to=target
            )
        except (HalfbyteError, OSError) as error:
            self.alerts.tell("store", f"the end of the trial is not in the store: {error}")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def start(self) -> None:
        """Begin what runs beside the requests. Needs a running event loop."""
        await self.alerts.start()
        if self._promoted_before is not None:
            await self._take_over(self._promoted_before)
        if self.probes is not None:
            await self.probes.start()
        for route in self.router.routes:
            # A candidate is tried as the version that it was; a model in use follows its alias.
            if isinstance(route.backend, StoreBackend) and route.role != "canary":
                await route.backend.start()

    async def close(self) -> None:
        """End it, write down what is to be kept, and close the models that this opened."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for part in (self.probes, self.oracle, self.shadow):
            if part is not None:
                await part.close()
        if self.canary is not None:
            self.canary.save(wait=True)
        for backend in self._owned:
            await backend.close()
        await self.alerts.close()
        if self.request_log is not None:
            await asyncio.to_thread(self.request_log.close)

    def snapshot(self) -> dict[str, Any]:
        """Give what the dashboard shows, as plain values."""
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
        """Give Prometheus what is not counted by requests: alerts, canary, shadow."""
        from prometheus_client.core import GaugeMetricFamily

        alerts = GaugeMetricFamily(
            PREFIX + "alert_active", "1 while an alert is on.", labels=("name",)
        )
        for alert in self.alerts.active:
            alerts.add_metric((alert.name,), 1)
        yield alerts
        if self.canary is None:
            return
        found = self.canary.summary()
        state = GaugeMetricFamily(PREFIX + "canary_state", "Of the trial.", labels=("state",))
        for name in CANARY_STATES:
            state.add_metric((name,), float(self.canary.status == name))
        yield state
        evidence = GaugeMetricFamily(
            PREFIX + "canary_evidence_nats", "Against it, for it, and needed.", labels=("of",)
        )
        for of in ("worse", "as_good", "needed"):
            evidence.add_metric((of,), found[f"evidence_{of}"])
        yield evidence
        requests = GaugeMetricFamily(
            PREFIX + "canary_requests", "Of each arm.", labels=("arm", "outcome")
        )
        for arm, counts in found["arms"].items():
            requests.add_metric((arm, "failed"), counts["failures"])
            requests.add_metric((arm, "good"), counts["requests"] - counts["failures"])
        yield requests


def open_quality(
    primary: Backend,
    config: QualityConfig,
    connect: Connect,
    *,
    clock: Clock = time.monotonic,
) -> Quality:
    """Make everything that the settings ask for around a model.

    Args:
        primary: The model that is served.
        config: What is asked for.
        connect: Opens the other models.
        clock: The time.

    Returns:
        All of it; nothing runs yet.
    """
    return Quality(primary, config, connect, clock=clock)


def _describe(route: Route) -> dict[str, Any]:
    load = route.backend.load()
    return {
        "name": route.backend.name,
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
    """Add up what differs in the first label only."""
    found: dict[str, float] = {}
    for labels, count in counts.items():
        found[labels[0]] = found.get(labels[0], 0.0) + count
    return found
