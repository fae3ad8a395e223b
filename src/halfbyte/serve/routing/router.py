"""The way of a request: which model is asked first, and which next where that was not good enough.

Usually the primary model. A canary gets its share, a critical request goes to the larger model at
once. An attempt that fails before its first token is out, or whose held-back beginning (of an
answer that is not streamed: all of it) does not pass the checks, is followed by the next model. An
answer that only failed a check stays at hand until another one has begun, and is given after all
where no other model can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Backend, Call, Event, Served
from halfbyte.serve.fault import Blame
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.attempt import Attempt, Demands, Route
from halfbyte.serve.routing.breaker import CircuitBreaker, Clock
from halfbyte.serve.routing.budget import FallbackBudget, RetryBudget
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import Observation, Role, Seen

log = logging.getLogger(__name__)

CRITICAL = "critical"
CLIENT_LEFT = 499
"""nginx's number for a client that closed the connection."""

Observer = Callable[[Observation], None]
"""Told of every request when it is over. Must be quick."""


class Rollout(Protocol):
    """Who decides whether a candidate answers."""

    def pick(self, call: Call) -> bool:
        """Tell whether this request goes to the candidate."""


class Router:
    """Answers calls, by whichever model can."""

    def __init__(
        self,
        primary: Backend,
        *,
        fallbacks: Sequence[Backend] = (),
        config: QualityConfig | None = None,
        confidence: Confidence | None = None,
        observers: Sequence[Observer] = (),
        clock: Clock = time.monotonic,
    ) -> None:
        """Put the models in order.

        Args:
            primary: Asked first.
            fallbacks: Asked next, in this order.
            config: When, and how much.
            confidence: What counts as sure; None: nobody asks.
            observers: Told of every request when it is over.
            clock: The time; never that of day.
        """
        self.config = config or QualityConfig()
        self._clock = clock
        self._confidence = confidence if "confidence" in self.config.fallback_on else None
        self._causes = frozenset(self.config.fallback_on)
        self._observers = list(observers)
        self.budget = FallbackBudget.of(self.config, clock)
        # Apart: answers that fail a check must not use up what saves requests from an outage.
        self._retries = {fault: RetryBudget(self.config.retry_share) for fault in (False, True)}
        self._primary = self._route(primary, "primary", [])
        self._fallbacks: list[Route] = []
        for backend in fallbacks:
            others = [self._primary, *self._fallbacks]
            self._fallbacks.append(self._route(backend, "fallback", others))
        self._canary: Route | None = None
        self._rollout: Rollout | None = None

    def _route(self, backend: Backend, role: Role, others: Sequence[Route]) -> Route:
        """Give a model a breaker and a name that none of the others has."""
        breaker = CircuitBreaker(
            failures=self.config.breaker_failures,
            seconds=self.config.breaker_seconds,
            clock=self._clock,
        )
        taken = {route.name for route in others}
        names = [backend.name, *(f"{backend.name}-{role}{n or ''}" for n in range(len(taken) + 1))]
        return Route(backend, role, next(n for n in names if n not in taken), breaker)

    @property
    def routes(self) -> list[Route]:
        """Every model that may be asked, the primary first."""
        return [self._primary, *([self._canary] if self._canary else []), *self._fallbacks]

    def add_observer(self, observer: Observer) -> None:
        """Tell one more of every request."""
        self._observers.append(observer)

    def set_primary(self, backend: Backend) -> Route:
        """Ask another model first from now on; requests on their way are not touched.

        Args:
            backend: The new one.

        Returns:
            The old one, to be retired.
        """
        old = self._primary
        self._primary = self._route(backend, "primary", self.routes[1:])
        return old

    def set_canary(self, backend: Backend | None, rollout: Rollout | None = None) -> None:
        """Let a candidate answer some requests; None: no more."""
        others = [self._primary, *self._fallbacks]
        self._canary = None if backend is None else self._route(backend, "canary", others)
        self._rollout = rollout

    async def stream(self, call: Call, served: Served) -> AsyncGenerator[Event, None]:
        """Answer a call.

        Args:
            call: What is asked.
            served: Filled in before the first event.

        Yields:
            The answer's events.

        Raises:
            ServeError: No model can answer; after the first event, the one that began failed.
        """
        seen = Observation(call=call, served=served, started=self._clock())
        attempt: Attempt | None = None
        try:
            attempt = await self._choose(seen)
            served.backend, served.model = attempt.seen.backend, attempt.model
            served.version = attempt.version
            seen.first = self._clock()
            while (event := await attempt.next()) is not None:
                yield event
        except ServeError as error:
            seen.status, seen.error = error.status, str(error)
            raise
        except BaseException:
            # Cancelled, or the generator was closed: nobody waits for the rest.
            if attempt is None or attempt.seen.usage is None:
                seen.status = CLIENT_LEFT
            raise
        finally:
            if attempt is not None:
                await attempt.close()
            self._finish(seen)

    async def _choose(self, seen: Observation) -> Attempt:
        """Give the attempt that the client gets, its beginning checked; the others are closed."""
        call, served = seen.call, seen.served
        routes = self._order(seen)
        for retries in self._retries.values():
            retries.add_request()
        kept: Attempt | None = None
        first_error: ServeError | None = None
        candidates_error: ServeError | None = None
        cause = served.reason
        attempt: Attempt | None = None
        try:
            for number, route in enumerate(routes):
                attempt = None
                why_not = self._blocked(route, seen.attempts)
                if why_not:
                    served.notes.append(f"{route.role} {route.name} not asked: {why_not}")
                    cause = why_not if cause in ("", CRITICAL) else cause
                    continue
                # An error of a later model hides neither the first one's nor its answer.
                seen_before = first_error is not None or kept is not None
                attempt = self._start(seen, route, has_next=number + 1 < len(routes))
                found = await attempt.hold()
                if not self._goes_on(attempt) and not (attempt.error and seen_before):
                    if attempt.error is not None:
                        raise attempt.error
                    served.reason = self._reason(route, routes, cause)
                    if kept is not None:
                        await kept.close()
                    return attempt
                log.info("%s: %s by %s", call.id, found, route.name)
                cause = found
                if route.role == "canary":
                    # The client is not told that there was one, where another model can be asked.
                    candidates_error = attempt.error
                else:
                    first_error = first_error or attempt.error
                if attempt.error is None and kept is None:
                    kept, attempt = attempt, None
                else:
                    await attempt.close()
        except BaseException:
            for one in (attempt, kept):
                if one is not None:
                    await one.close()
            raise
        if kept is not None:
            served.notes.append(f"{cause}, and no other model could answer")
            served.reason = self._reason(kept.route, routes, "")
            # Its place as the answer is the last one.
            seen.attempts.remove(kept.seen)
            seen.attempts.append(kept.seen)
            return kept
        raise first_error or candidates_error or self._nobody(routes)

    def _order(self, seen: Observation) -> list[Route]:
        """Give the models in the order in which they are asked."""
        usual = [self._primary, *self._fallbacks]
        if CRITICAL in seen.call.tags and CRITICAL in self._causes and self._fallbacks:
            seen.served.reason = CRITICAL
            return [*self._fallbacks, self._primary]
        if self._canary is None or self._rollout is None:
            return usual
        asked = seen.call.body.get("model")
        others = self._primary.backend.models[1:]
        if asked in others and asked not in self._canary.backend.models:
            # An adapter, or another model of the same server: the candidate would answer as itself.
            return usual
        seen.arm = "canary" if self._rollout.pick(seen.call) else "primary"
        return [self._canary, *usual] if seen.arm == "canary" else usual

    def _blocked(self, route: Route, before: Sequence[Seen]) -> str:
        """Tell why a model may not be asked now; empty: it may. What it takes is taken.

        Args:
            route: The model.
            before: Attempts that were not enough. One of a candidate makes no second try of the
                next: without the trial that model would have been asked at once.

        Returns:
            A word for it.
        """
        if not route.breaker.allows:
            return "breaker"
        if route.role == "fallback" and not self.budget.has_left:
            return "budget"
        tried = [attempt for attempt in before if attempt.role != "canary"]
        if tried and not self._retries[tried[-1].blame is not None].take():
            return "retries"
        return "" if route.breaker.enter() else "breaker"

    def _start(self, seen: Observation, route: Route, *, has_next: bool) -> Attempt:
        demands = Demands()
        if has_next:
            streamed = bool(seen.call.body.get("stream"))
            tokens = self.config.hold_back * (seen.call.body.get("n") or 1)
            demands.tokens = tokens if streamed else None
            demands.causes = self._causes
            demands.confidence = None if route.role == "fallback" else self._confidence
        if route.role == "fallback":
            self.budget.spend_request()
        attempt = Attempt(route, seen.call, self.config, demands=demands, clock=self._clock)
        seen.attempts.append(attempt.seen)
        return attempt

    def _goes_on(self, attempt: Attempt) -> bool:
        """Tell whether another model should be asked because of what was found."""
        found, blame = attempt.seen.cause, attempt.seen.blame
        if attempt.route.role == "canary" and blame is not None:
            # What it refuses may be its own limit: the present model tells.
            return blame is not Blame.CLIENT
        return bool(found) and found.removeprefix("check:") in self._causes

    def _reason(self, route: Route, routes: list[Route], cause: str) -> str:
        if route.role == "canary":
            return "canary"
        return cause if cause else ("" if route is routes[0] else "fallback")

    def _nobody(self, routes: list[Route]) -> ServeError:
        left = min((route.breaker.seconds_left for route in routes), default=0.0)
        return ServeError(
            f"None of {len(routes)} models can be asked now: they failed too often, or their "
            f"budget is spent. Try again in {left:.0f} s.",
            status=503,
            kind="server_error",
            code="no_model_available",
            retry_after=max(1.0, left),
        )

    def _finish(self, seen: Observation) -> None:
        """Look at the whole answer, settle what it took, and tell everybody."""
        seen.ended = self._clock()
        for attempt in seen.attempts:
            if attempt.role == "fallback":
                prompt = attempt.usage.prompt_tokens if attempt.usage else 0
                self.budget.spend_tokens(prompt + attempt.num_tokens)
        for observer in (_note_failures, *self._observers):
            try:
                observer(seen)
            except Exception:
                # A request that was answered is not lost to somebody who only watches.
                log.exception("watching %s failed", seen.call.id)


def _note_failures(seen: Observation) -> None:
    """Let the monitors look at every answer that came to an end."""
    for attempt in seen.attempts:
        if attempt.finished:
            attempt.failures = find_failures(seen.call, attempt)
