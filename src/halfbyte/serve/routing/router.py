"""Chooses the model that answers a request, and the next one if it fails.

Usually the primary model is asked first. A canary gets its share of the requests; a critical
request goes to the fallback model first. If an attempt fails before the client got a token, or its
buffered beginning (for an answer that is not streamed: all of it) fails a check, the next model is
asked. An answer that only failed a check is kept until another model has started to answer, and is
given to the client if no other model can.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Backend, Call, Event, Served
from halfbyte.serve.fault import Fault
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.rollout.store_models import find_current
from halfbyte.serve.routing.attempt import Attempt, HoldBack, Route
from halfbyte.serve.routing.breaker import CircuitBreaker, Clock
from halfbyte.serve.routing.budget import FallbackBudget, RetryBudget
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.text.choice_requests import estimate_prompt_tokens
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import AttemptRecord, Observation, Role

log = logging.getLogger(__name__)

CRITICAL = "critical"
CLIENT_LEFT = 499
"""nginx's status for a client that closed the connection."""

Observer = Callable[[Observation], None]
"""Called with each finished request, on the event loop: it must return quickly."""


class Rollout(Protocol):
    """Decides which requests a candidate model answers."""

    def pick(self, call: Call) -> bool:
        """Return whether this request goes to the candidate."""


class Router:
    """Answers requests with the first model that can."""

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
        """Set up the models.

        Args:
            primary: Asked first.
            fallbacks: Asked next, in this order.
            config: Causes for a fallback, timeouts and budgets.
            confidence: Threshold for confident answers; None: confidence is not checked.
            observers: Called with each finished request.
            clock: Returns monotonic seconds.
        """
        self.config = config or QualityConfig()
        self._clock = clock
        self._confidence = confidence if "confidence" in self.config.fallback_on else None
        self._causes = frozenset(self.config.fallback_on)
        self._observers = list(observers)
        self.budget = FallbackBudget.from_config(self.config, clock)
        # Two budgets, so that failed checks do not use up the retries that an outage needs.
        self._error_retries = RetryBudget(self.config.retry_share)
        self._check_retries = RetryBudget(self.config.retry_share)
        self._primary = self._make_route(primary, "primary", [])
        self._fallbacks: list[Route] = []
        for backend in fallbacks:
            others = [self._primary, *self._fallbacks]
            self._fallbacks.append(self._make_route(backend, "fallback", others))
        self._canary: Route | None = None
        self._rollout: Rollout | None = None

    def _make_route(self, backend: Backend, role: Role, others: Sequence[Route]) -> Route:
        """Give a model a circuit breaker and a name that none of the others has."""
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
        """All models: the primary, the canary if there is one, the fallbacks."""
        return [self._primary, *([self._canary] if self._canary else []), *self._fallbacks]

    @property
    def primary(self) -> Backend:
        """The backend that takes the primary model's new requests; a swap may replace it."""
        return find_current(self._primary.backend)

    def add_observer(self, observer: Observer) -> None:
        """Call another observer with each finished request."""
        self._observers.append(observer)

    def set_primary(self, backend: Backend) -> Route:
        """Replace the primary model for new requests; running ones are not affected.

        Args:
            backend: The new primary model.

        Returns:
            The route of the old one, which the caller must retire.
        """
        old = self._primary
        self._primary = self._make_route(backend, "primary", self.routes[1:])
        return old

    def set_canary(self, backend: Backend | None, rollout: Rollout | None = None) -> None:
        """Let a candidate answer some of the requests; None ends that."""
        others = [self._primary, *self._fallbacks]
        self._canary = None if backend is None else self._make_route(backend, "canary", others)
        self._rollout = rollout

    async def stream(self, call: Call, served: Served) -> AsyncGenerator[Event, None]:
        """Answer a request.

        Args:
            call: The request.
            served: Filled in before the first event.

        Yields:
            The answer's events.

        Raises:
            ServeError: No model can answer, or the model failed after the first event.
        """
        observation = Observation(call=call, served=served, started=self._clock())
        attempt: Attempt | None = None
        try:
            attempt = await self._choose_attempt(observation)
            served.backend, served.model = attempt.record.backend, attempt.model
            served.version = attempt.version
            observation.first = self._clock()
            while (event := await attempt.next()) is not None:
                yield event
        except ServeError as error:
            observation.status, observation.error = error.status, str(error)
            raise
        except BaseException:
            # Cancelled, or the generator was closed: the client disconnected.
            if attempt is None or attempt.record.usage is None:
                observation.status = CLIENT_LEFT
            raise
        finally:
            if attempt is not None:
                await attempt.close()
            self._finish(observation)

    async def _choose_attempt(self, observation: Observation) -> Attempt:
        """Return the attempt whose answer the client gets; all others are closed."""
        call, served = observation.call, observation.served
        routes = self._order_routes(observation)
        self._error_retries.add_request()
        self._check_retries.add_request()
        kept: Attempt | None = None
        first_error: ServeError | None = None
        canary_error: ServeError | None = None
        cause = served.reason
        attempt: Attempt | None = None
        try:
            for number, route in enumerate(routes):
                attempt = None
                blocked_by = self._acquire(route, observation.attempts)
                if blocked_by:
                    log.info("%s: %s not asked: %s", call.id, route.name, blocked_by)
                    cause = blocked_by if cause in ("", CRITICAL) else cause
                    continue
                # An error of a later model hides neither the first one's error nor its answer.
                has_earlier_result = first_error is not None or kept is not None
                has_next = number + 1 < len(routes)
                attempt = self._start_attempt(observation, route, has_next=has_next)
                found = await attempt.fill_buffer()
                if not self._needs_fallback(attempt) and not (attempt.error and has_earlier_result):
                    if attempt.error is not None:
                        raise attempt.error
                    served.reason = self._find_reason(route, routes, cause)
                    if kept is not None:
                        await kept.close()
                    return attempt
                log.info("%s: %s by %s", call.id, found, route.name)
                cause = found
                if route.role == "canary":
                    # Clients do not see a canary's error if another model can be asked.
                    canary_error = attempt.error
                else:
                    first_error = first_error or attempt.error
                if attempt.error is None and kept is None:
                    kept, attempt = attempt, None
                else:
                    await attempt.close()
        except BaseException:
            for unfinished in (attempt, kept):
                if unfinished is not None:
                    await unfinished.close()
            raise
        if kept is not None:
            served.reason = self._find_reason(kept.route, routes, "")
            # The last attempt is the answer.
            observation.attempts.remove(kept.record)
            observation.attempts.append(kept.record)
            return kept
        raise first_error or canary_error or self._no_model_error(routes)

    def _order_routes(self, observation: Observation) -> list[Route]:
        """Return the models in the order in which they are asked, and draw the canary's arm."""
        usual = [self._primary, *self._fallbacks]
        if CRITICAL in observation.call.tags and CRITICAL in self._causes and self._fallbacks:
            observation.served.reason = CRITICAL
            return [*self._fallbacks, self._primary]
        if self._canary is None or self._rollout is None:
            return usual
        model = observation.call.body.get("model")
        others = self._primary.backend.models[1:]
        if model in others and model not in self._canary.backend.models:
            # An adapter, or another model of the same server: the candidate does not have it.
            return usual
        observation.arm = "canary" if self._rollout.pick(observation.call) else "primary"
        return [self._canary, *usual] if observation.arm == "canary" else usual

    def _acquire(self, route: Route, earlier: Sequence[AttemptRecord]) -> str:
        """Acquire permission to ask a model, which may use up a retry.

        Args:
            route: The model.
            earlier: Failed attempts at this request. After a canary's attempt the next one is not
                a retry: without the canary that model would have been asked first.

        Returns:
            What blocks the model: ``breaker``, ``budget`` or ``retries``; empty if it may be asked.
        """
        if not route.breaker.allows_request:
            return "breaker"
        if route.role == "fallback" and not self.budget.has_left:
            return "budget"
        failed = [record for record in earlier if record.role != "canary"]
        if failed:
            retries = self._check_retries if failed[-1].fault is None else self._error_retries
            if not retries.try_spend():
                return "retries"
        return "" if route.breaker.try_acquire() else "breaker"

    def _start_attempt(self, observation: Observation, route: Route, *, has_next: bool) -> Attempt:
        hold_back = HoldBack()
        if has_next:
            body = observation.call.body
            tokens = self.config.hold_back * (body.get("n") or 1)
            hold_back.tokens = tokens if body.get("stream") else None
            hold_back.causes = self._causes
            hold_back.confidence = None if route.role == "fallback" else self._confidence
        if route.role == "fallback":
            self.budget.spend_request()
        attempt = Attempt(
            route, observation.call, self.config, hold_back=hold_back, clock=self._clock
        )
        observation.attempts.append(attempt.record)
        return attempt

    def _needs_fallback(self, attempt: Attempt) -> bool:
        """Return whether the next model should be asked after this attempt."""
        cause, fault = attempt.record.cause, attempt.record.fault
        if attempt.route.role == "canary" and fault is not None:
            # A refusal may be the candidate's own limit: the present model decides.
            return fault is not Fault.CLIENT
        return bool(cause) and cause.removeprefix("check:") in self._causes

    def _find_reason(self, route: Route, routes: list[Route], cause: str) -> str:
        """Return what `X-Halfbyte-Reason` says; empty for an answer of the first model."""
        if route.role == "canary":
            return "canary"
        return cause if cause else ("" if route is routes[0] else "fallback")

    def _no_model_error(self, routes: list[Route]) -> ServeError:
        left = min((route.breaker.seconds_left for route in routes), default=0.0)
        return ServeError(
            f"None of the {len(routes)} models can answer now: they failed too often, or their "
            f"budget is used up. Try again in {left:.0f} s.",
            status=503,
            kind="server_error",
            code="no_model_available",
            retry_after=max(1.0, left),
        )

    def _finish(self, observation: Observation) -> None:
        """Check the whole answer, record fallback tokens, and call the observers."""
        observation.ended = self._clock()
        for record in observation.attempts:
            if record.role == "fallback" and record.first is not None:
                # Usage is the last event: a client that leaves before it has used the prompt too.
                prompt = estimate_prompt_tokens(observation.call.body)
                if record.usage is not None and record.usage.is_reported:
                    prompt = record.usage.prompt_tokens
                self.budget.spend_tokens(prompt + record.num_tokens)
        for observer in (_check_answers, *self._observers):
            try:
                observer(observation)
            except Exception:
                # An observer that fails must not fail the request, nor hide it from the others.
                log.exception("observing %s failed", observation.call.id)


def _check_answers(observation: Observation) -> None:
    """Run the monitors on every finished answer."""
    for record in observation.attempts:
        if record.finished:
            record.failures = find_failures(observation.call, record)
