"""A canary from start to end: opens the candidate, promotes or closes it, and updates the store."""

from __future__ import annotations

import asyncio
import logging
import math

from halfbyte.errors import HalfbyteError, ServeError
from halfbyte.serve.backend import Backend, Call
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.adapter_transfer import transfer_adapters
from halfbyte.serve.rollout.canary import Canary
from halfbyte.serve.rollout.store_models import (
    OpenModels,
    StoreBackend,
    find_current,
    is_store_reference,
    record_verdict,
    resolve_store_model,
)
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.router import Router
from halfbyte.serve.watch.alerts import Alerts
from halfbyte.serve.watch.oracle import can_be_rated, rate_answer
from halfbyte.store.store import CHAMPION

log = logging.getLogger(__name__)


class Trial:
    """The trial of one candidate, and the actions that follow from its decision."""

    def __init__(
        self,
        location: str,
        config: QualityConfig,
        router: Router,
        models: OpenModels,
        alerts: Alerts,
        clock: Clock,
    ) -> None:
        """Start the trial, or resume it after a restart.

        A candidate that was rolled back is not opened again. One that was promoted becomes the
        primary model at the start, unless it is served already.

        Args:
            location: The candidate: an address, a folder, or a store reference.
            config: Share, margin, alpha, and where the evidence is saved.
            router: Sends requests to the candidate.
            models: Opens and closes the candidate.
            alerts: Where the decision is reported.
            clock: Returns monotonic seconds.
        """
        self._router = router
        self._models = models
        self._alerts = alerts
        self._ending: asyncio.Task[None] | None = None
        self._promoted_earlier: Backend | None = None
        model = resolve_store_model(location) if is_store_reference(location) else None
        self.canary = Canary(
            location if model is None else f"{location} {model.version}",
            config,
            decide=self._on_decision,
            rate=self._rate if config.canary_rating else None,
            clock=clock,
        )
        in_use = model is not None and getattr(self._primary, "version", "") == model.version
        if self.canary.status == "rolled back" or in_use:
            reason = self.canary.reason or "it is in use"
            log.warning("canary %s is not tried: %s", location, reason)
            return
        candidate = models.open(location, model)
        if self.canary.status == "running":
            router.add_observer(self.canary.observe)
            router.set_canary(candidate, self.canary)
        else:
            log.warning("canary %s was promoted before a restart: it becomes the primary", location)
            self._promoted_earlier = candidate

    @property
    def _primary(self) -> Backend:
        return self._router.routes[0].backend

    async def start(self) -> None:
        """Promote a candidate whose trial was decided before a restart."""
        if self._promoted_earlier is not None:
            await self._promote(self._promoted_earlier)

    async def close(self) -> None:
        """Finish a promotion or rollback that is running, and save the evidence."""
        if self._ending is not None:
            await asyncio.gather(self._ending, return_exceptions=True)
        await self.canary.close()

    async def _rate(self, call: Call, answer: str) -> float | None:
        """Let the present model rate an answer; NaN if it is empty or too long."""
        if not can_be_rated(call.body, answer):
            return math.nan
        try:
            return await rate_answer(self._primary, f"rate-{call.id}", call.body, answer)
        except ServeError as error:
            log.info("cannot rate the answer to %s: %s", call.id, error)
            return None

    def _on_decision(self, canary: Canary) -> None:
        """Report the decision, and act on it in the background."""
        self._alerts.report_event(f"canary {canary.status}", f"{canary.candidate}: {canary.reason}")
        self._ending = asyncio.get_running_loop().create_task(self._end(canary))

    async def _end(self, canary: Canary) -> None:
        route = next(r for r in self._router.routes if r.role == "canary")
        candidate = route.backend
        self._router.set_canary(None)
        primary = self._primary
        lock = primary.switch_lock if isinstance(primary, StoreBackend) else asyncio.Lock()
        async with lock:
            await self._record(candidate, canary)
            if canary.status == "promoted":
                await self._promote(candidate)
                return
        self._models.release(candidate)
        await route.retire()

    async def _promote(self, candidate: Backend) -> None:
        """Make a candidate the primary model; the old one is closed after its running requests."""
        primary = self._primary
        lost = await transfer_adapters(find_current(primary), find_current(candidate))
        for name, reason in lost.items():
            self._alerts.report_event("adapter lost", f"{name}: {reason}")
        if isinstance(primary, StoreBackend) and isinstance(candidate, StoreBackend):
            # The primary keeps following its own alias, which now points to this version.
            self._models.release(candidate)
            primary.switch(candidate.model, candidate.current)
        else:
            await self._router.set_primary(candidate).retire()

    async def _record(self, candidate: Backend, canary: Canary) -> None:
        """Record the verdict in the store, if the candidate is from one."""
        if not isinstance(candidate, StoreBackend):
            return
        primary = self._primary
        alias = primary.model.alias if isinstance(primary, StoreBackend) else None
        target = (alias or CHAMPION) if canary.status == "promoted" else None
        try:
            await asyncio.to_thread(
                record_verdict, candidate.model, canary.evidence(), promote_to=target
            )
        except (HalfbyteError, OSError) as error:
            self._alerts.report_event("store", f"cannot record the trial in the store: {error}")
