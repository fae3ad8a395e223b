"""Alerts about the server itself: models left alone, a budget that is spent, too much memory."""

from __future__ import annotations

import time

from halfbyte.machine.memory import peak_memory_bytes
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.observation import Observation

LOOK_SECONDS = 1.0
"""Between two looks, which requests bring about."""
MEMORY_SLACK, MEMORY_BESIDE = 1.25, 250e6
"""Of the plan, and bytes beside it, that the process may take before it is an alert: libraries and
what was freed after loading are in no plan."""


class Health:
    """Looks at the server now and then."""

    def __init__(
        self, router: Router, metrics: Metrics, alerts: Alerts, *, clock: Clock = time.monotonic
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._alerts = alerts
        self._clock = clock
        self._looked = clock()
        self._watched: set[str] = set()
        """Alerts of the models that there were at the last look."""

    def observe(self, seen: Observation) -> None:
        """Look, if it is time to."""
        now = self._clock()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        before, self._watched = self._watched, {f"model {r.name}" for r in self._router.routes}
        for gone in before - self._watched:
            # A candidate that was taken back is nobody's trouble any more.
            self._alerts.set(gone, False, "")
        for route in self._router.routes:
            self._alerts.set(
                f"model {route.name}",
                route.breaker.state != "closed",
                f"the {route.role} model '{route.name}' failed too often and is left alone",
            )
        self._alerts.set(
            "fallback budget",
            not self._router.budget.has_left,
            "the larger model's budget is spent: no request falls back until it comes back",
        )
        planned, peak = self._metrics.planned.get("total"), peak_memory_bytes()
        if planned:
            self._alerts.set(
                "memory",
                peak > MEMORY_SLACK * planned + MEMORY_BESIDE,
                f"the process had {peak / 1e9:.2f} GB at its peak; {planned / 1e9:.2f} GB are "
                "planned",
                float(peak),
            )
