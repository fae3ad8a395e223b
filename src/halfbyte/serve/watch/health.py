"""Alerts about the server itself: open circuit breakers, a used-up budget, high memory use."""

from __future__ import annotations

import time

from halfbyte.machine.memory import resident_memory_bytes
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.observation import Observation

CHECK_SECONDS = 1.0
"""Minimum time between two checks, which finished requests trigger."""
MEMORY_FACTOR, MEMORY_EXTRA_BYTES = 1.25, 250e6
"""The process may use the planned memory times the factor plus the extra bytes before an alert: the
plan does not include libraries, nor memory that was freed after loading."""


class Health:
    """Checks the server regularly."""

    def __init__(
        self, router: Router, metrics: Metrics, alerts: Alerts, *, clock: Clock = time.monotonic
    ) -> None:
        self._router = router
        self._metrics = metrics
        self._alerts = alerts
        self._clock = clock
        self._checked_at = clock()
        self._model_alerts: set[str] = set()
        """Alerts of the models at the last check."""

    def observe(self, observation: Observation) -> None:
        """Check the server if the last check is long enough ago."""
        now = self._clock()
        if now - self._checked_at < CHECK_SECONDS:
            return
        self._checked_at = now
        earlier = self._model_alerts
        self._model_alerts = {f"model {route.name}" for route in self._router.routes}
        for name in earlier - self._model_alerts:
            # The model, such as a candidate that was rolled back, gets no requests any more.
            self._alerts.update(name, False, "")
        for route in self._router.routes:
            self._alerts.update(
                f"model {route.name}",
                route.breaker.state != "closed",
                f"the {route.role} model '{route.name}' failed too often and gets no requests now",
            )
        self._alerts.update(
            "fallback budget",
            not self._router.budget.has_left,
            "the fallback budget is used up: no request falls back until some of it is available "
            "again",
        )
        # Not the peak: a version that is replaced is in memory beside the next one, for a moment.
        planned, used = self._metrics.planned.get("total"), resident_memory_bytes()
        if planned:
            self._alerts.update(
                "memory",
                used > MEMORY_FACTOR * planned + MEMORY_EXTRA_BYTES,
                f"the process uses {used / 1e9:.2f} GB; {planned / 1e9:.2f} GB were planned",
                float(used),
            )
