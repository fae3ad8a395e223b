"""A router with scripted models."""

from __future__ import annotations

import asyncio
import time

from tests.serve.helpers_quality import ScriptedBackend, answer, collect, make_call

from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.router import Router

GOOD = answer("a good answer of several words")
BETTER = answer("the larger model says this")
LOOP = answer("again and again " + "so it goes " * 12)


def make(primary, *fallbacks, observers=(), confidence=None, clock=time.monotonic, **config):
    backends = [ScriptedBackend("small", primary)]
    backends += [
        ScriptedBackend(f"large{n}", script, models=(f"large-model-{n}",))
        for n, script in enumerate(fallbacks)
    ]
    router = Router(
        backends[0],
        fallbacks=backends[1:],
        config=QualityConfig(**config),
        observers=observers,
        confidence=confidence,
        clock=clock,
    )
    return router, *backends


def ask(router, call=None):
    return asyncio.run(collect(router, call or make_call()))
