"""A canary from its opening to its end: the candidate asked, promoted or closed, the store told."""

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
    """One candidate on trial, and what follows from its end."""

    def __init__(
        self,
        place: str,
        config: QualityConfig,
        router: Router,
        models: OpenModels,
        alerts: Alerts,
        clock: Clock,
    ) -> None:
        """Begin it, or go on where it was before a restart.

        A candidate that was taken back is not opened again; one that was promoted is asked first
        from the start, unless it is what is served anyway.

        Args:
            place: Of the candidate.
            config: Share, margin, alpha, where evidence is kept.
            router: Asks the models.
            models: Opens the candidate, and closes it.
            alerts: Told of the end.
            clock: The time.
        """
        self._router = router
        self._models = models
        self._alerts = alerts
        self._ending: asyncio.Task[None] | None = None
        self._promoted_before: Backend | None = None
        model = resolve_store_model(place) if is_store_reference(place) else None
        self.canary = Canary(
            place if model is None else f"{place} {model.version}",
            config,
            decide=self._decided,
            rate=self._rate if config.canary_rating else None,
            clock=clock,
        )
        in_use = model is not None and getattr(self._primary, "version", "") == model.version
        if self.canary.status == "rolled back" or in_use:
            log.warning("canary %s is not tried: %s", place, self.canary.reason or "it is in use")
            return
        candidate = models.open(place, model)
        if self.canary.status == "running":
            router.add_observer(self.canary.observe)
            router.set_canary(candidate, self.canary)
        else:
            log.warning("canary %s was promoted before: it is asked first", place)
            self._promoted_before = candidate

    @property
    def _primary(self) -> Backend:
        return self._router.routes[0].backend

    async def start(self) -> None:
        """Act on an end that came before a restart."""
        if self._promoted_before is not None:
            await self._take_over(self._promoted_before)

    async def close(self) -> None:
        """Finish what an end brought, and write the evidence down."""
        if self._ending is not None:
            await asyncio.gather(self._ending, return_exceptions=True)
        await self.canary.close()

    async def _rate(self, call: Call, said: str) -> float | None:
        """Let the present model rate an answer; an empty or very long one is not rated."""
        if not can_be_rated(call.body, said):
            return math.nan
        try:
            return await rate_answer(self._primary, f"rate-{call.id}", call.body, said)
        except ServeError as error:
            log.info("%s is not rated: %s", call.id, error)
            return None

    def _decided(self, canary: Canary) -> None:
        """Act on the end, beside the request that brought it."""
        self._alerts.tell(f"canary {canary.status}", f"{canary.candidate}: {canary.reason}")
        self._ending = asyncio.get_running_loop().create_task(self._end(canary))

    async def _end(self, canary: Canary) -> None:
        route = next(r for r in self._router.routes if r.role == "canary")
        candidate = route.backend
        self._router.set_canary(None)
        primary = self._primary
        changing = primary.changing if isinstance(primary, StoreBackend) else asyncio.Lock()
        async with changing:
            await self._record(candidate, canary)
            if canary.status == "promoted":
                await self._take_over(candidate)
                return
        self._models.release(candidate)
        await route.retire()

    async def _take_over(self, candidate: Backend) -> None:
        """Let a candidate be asked first; the model that was finishes what it has and is closed."""
        primary = self._primary
        lost = await transfer_adapters(find_current(primary), find_current(candidate))
        for name, reason in lost.items():
            self._alerts.tell("adapter lost", f"{name}: {reason}")
        if isinstance(primary, StoreBackend) and isinstance(candidate, StoreBackend):
            # It goes on following its own alias, which points to the candidate's version now.
            self._models.release(candidate)
            primary.adopt(candidate.model, candidate.current)
        else:
            await self._router.set_primary(candidate).retire()

    async def _record(self, candidate: Backend, canary: Canary) -> None:
        """Tell the store, where the candidate comes from one."""
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
            self._alerts.tell("store", f"the end of the trial is not in the store: {error}")
