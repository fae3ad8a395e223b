"""Everything around the models, put together: the API asks this, and this asks the models.

::

    quality = open_quality(primary, config, connect)
    await quality.start()                      # what runs beside the requests
    async for event in quality.router.stream(call, served): ...
    quality.metrics.render()                   # for Prometheus
    quality.snapshot()                         # for the dashboard
    await quality.close()                      # not the primary model, which is its owner's
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from halfbyte.serve.exchange import Backend
from halfbyte.serve.metrics import Metrics
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.breaker import Clock
from halfbyte.serve.routing.confidence import read_confidence
from halfbyte.serve.routing.router import Router

Connect = Callable[[str], Backend]
"""Makes a backend of an address, a folder or a version in a store."""


class Quality:
    """A router with all that watches it."""

    def __init__(
        self,
        router: Router,
        metrics: Metrics,
        *,
        owned: Sequence[Backend] = (),
    ) -> None:
        """Keep the parts; :func:`open_quality` makes them.

        Args:
            router: Answers calls.
            metrics: Counts them.
            owned: Models that are closed with this.
        """
        self.router = router
        self.metrics = metrics
        self._owned = list(owned)

    async def start(self) -> None:
        """Begin what runs beside the requests. Needs a running event loop."""

    async def close(self) -> None:
        """End it, and close the models that this opened."""
        for backend in self._owned:
            await backend.close()

    def snapshot(self) -> dict[str, Any]:
        """Give what the dashboard shows, as plain values."""
        return {}


def open_quality(
    primary: Backend,
    config: QualityConfig,
    connect: Connect,
    *,
    clock: Clock = time.monotonic,
) -> Quality:
    """Make everything that the settings ask for around a model.

    Args:
        primary: The model that is served; stays its owner's.
        config: What is asked for.
        connect: Opens the other models.
        clock: The time.

    Returns:
        All of it; nothing runs yet.
    """
    confidence = None if config.confidence is None else read_confidence(Path(config.confidence))
    fallbacks = [connect(place) for place in config.fallback]
    router = Router(primary, fallbacks=fallbacks, config=config, confidence=confidence, clock=clock)
    metrics = Metrics(lambda: router.routes)
    router.add_observer(metrics.observe)
    return Quality(router, metrics, owned=fallbacks)
