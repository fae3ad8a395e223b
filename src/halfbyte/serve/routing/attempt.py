"""One model's attempt at a request: buffers its first tokens, monitors it, enforces timeouts."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Backend, Call, Delta, Event, Usage
from halfbyte.serve.fault import Fault, classify_error
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.breaker import CircuitBreaker
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.time_limit import TimeLimit
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import AttemptRecord, Role

log = logging.getLogger(__name__)

IDLE_POLL_SECONDS = 0.05

CLOSE_SECONDS = 5.0
"""Timeout for a model to cancel a request."""


@dataclass(slots=True, eq=False)
class Route:
    """A model that requests can be sent to, with its circuit breaker."""

    backend: Backend
    role: Role
    name: str
    """The backend's name, made unique within the server."""
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    running: int = 0
    """Attempts that have started and are not closed."""

    async def retire(self) -> None:
        """Close the backend after its last attempt. No new attempts may be started.

        If it were closed earlier, it could refuse a request that has not reached it yet.
        """
        while self.running:
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await self.backend.close()


@dataclass(slots=True, kw_only=True)
class HoldBack:
    """How much of an answer is buffered and checked before the client gets its first event."""

    tokens: int | None = 0
    """Number of tokens; None: the whole answer."""
    causes: frozenset[str] = frozenset()
    """Failed checks that cause a fallback."""
    confidence: Confidence | None = None


class Attempt:
    """One request sent to one model."""

    def __init__(
        self,
        route: Route,
        call: Call,
        config: QualityConfig,
        *,
        hold_back: HoldBack,
        clock: Callable[[], float],
    ) -> None:
        """Start the attempt. The route's breaker must have allowed it.

        Args:
            route: The model.
            call: The request.
            config: The timeouts.
            hold_back: What is buffered and checked.
            clock: Returns monotonic seconds.
        """
        self.route = route
        route.running += 1
        self.record = AttemptRecord(backend=route.name, role=route.role, started=clock())
        self.error: ServeError | None = None
        self._hold_back = hold_back
        self._config = config
        self._clock = clock
        self._buffer: deque[Event] = deque()
        self._ended = False
        self._is_settled = False
        """Whether the breaker has been given a result."""
        self._closed = False
        self._hides_logprobs = False
        self._call = self._adapt(call)
        # Read together: a moment later the backend may have switched to another version.
        self.version = str(getattr(route.backend, "version", ""))
        self._events = route.backend.stream(self._call)
        self._time_limit = TimeLimit()

    def _adapt(self, call: Call) -> Call:
        """Use this model's name, and request logprobs if the confidence statistic needs them."""
        body = dict(call.body)
        models = self.route.backend.models
        if models and body.get("model") not in models:
            body["model"] = models[0]
        confidence, requested = self._hold_back.confidence, body.get("logprobs")
        needed = confidence is not None and confidence.needs_logprobs
        # In a completion, 0 requests logprobs too: those of the sampled tokens only.
        if needed and (requested is None or requested is False):
            body["logprobs"] = True if call.kind == "chat" else 1
            self._hides_logprobs = True
        return replace(call, body=body)

    @property
    def model(self) -> str:
        """The model's name at its own server, which may be known only after the first answer."""
        requested, models = str(self._call.body.get("model", "")), self.route.backend.models
        return requested if requested in models or not models else models[0]

    async def fill_buffer(self) -> str:
        """Read until enough of the answer is there to accept or reject it.

        Returns:
            The cause for a fallback to the next model; empty if there is none. For ``error``,
            ``timeout`` and ``overload`` the exception is in :attr:`error`.
        """
        limit = self._hold_back.tokens
        try:
            while not self._ended:
                is_full = limit is not None and self.record.num_tokens >= limit
                if self._buffer and is_full and self._is_confidence_known():
                    break
                event = await self._read_event()
                if event is not None:
                    self._buffer.append(event)
        except ServeError as error:
            self.error = error
            self._record_error(error)
            return self.record.cause
        self.record.cause = self._find_cause()
        return self.record.cause

    def _is_confidence_known(self) -> bool:
        """Return whether reading more tokens would not help to compute the confidence."""
        confidence = self._hold_back.confidence
        if confidence is None or confidence.first_tokens is None:
            return True
        values = self.record.logprobs if confidence.needs_logprobs else self.record.entropies
        return confidence.has_enough_tokens(self.record) or not values

    def _find_cause(self) -> str:
        """Return why the buffered answer is rejected; empty if it is accepted."""
        hold_back = self._hold_back
        if not hold_back.causes:
            return ""
        for failure in find_failures(self._call, self.record, whole=self._ended):
            if failure in hold_back.causes:
                return f"check:{failure}"
        confidence = hold_back.confidence
        if confidence is not None and (self._ended or confidence.has_enough_tokens(self.record)):
            return "confidence" if confidence.is_unsure(self.record) else ""
        return ""

    async def next(self) -> Event | None:
        """Return the next event, those in the buffer first.

        Returns:
            The event; None at the end.

        Raises:
            ServeError: The model failed or timed out.
        """
        self.record.cause = ""
        if self._buffer:
            return self._buffer.popleft()
        if self._ended:
            return None
        try:
            return await self._read_event()
        except ServeError as error:
            self._record_error(error)
            raise

    def _record_error(self, error: ServeError) -> None:
        """Record an error's cause and fault; only faults of the model count for the breaker."""
        self.record.cause, self.record.fault = classify_error(error)
        if self.record.fault is Fault.MODEL:
            self._settle(failed=True)

    async def _read_event(self) -> Event | None:
        """Read the model's next event; None at the end."""
        seconds, subject = self._find_timeout()
        loop = asyncio.get_running_loop()
        deadline = None if seconds is None else loop.time() + seconds
        try:
            event = await self._time_limit.wait(anext(self._events), deadline)
        except StopAsyncIteration:
            self._end()
            return None
        except ServeError:
            raise
        except TimeoutError as error:
            if not self._time_limit.has_expired:
                raise self._make_failure(error) from error
            raise self._make_timeout(seconds, subject) from error
        except Exception as error:
            # A backend may raise anything; another one may still answer.
            raise self._make_failure(error) from error
        if self.record.first is None and self.route.breaker.state == "half-open":
            self._settle(failed=False)
        self.record.add(event, self._clock())
        if type(event) is Usage:
            # Checked before it is passed on: for the client this is the end of the answer.
            self._check_finished()
        if self._hides_logprobs and type(event) is Delta and event.logprobs is not None:
            return replace(event, logprobs=None)
        return event

    def _end(self) -> None:
        self._ended = True
        self.record.ended = self._clock()
        self._check_finished()
        self._settle(failed=False)

    def _check_finished(self) -> None:
        """Raise if no choice of the answer was finished."""
        if not self.record.finished:
            raise ServeError(
                f"The model behind '{self.record.backend}' stopped after "
                f"{self.record.num_tokens} tokens without finishing its answer. Try again.",
                status=502,
                kind="server_error",
                code="incomplete_answer",
            )

    def _find_timeout(self) -> tuple[float | None, str]:
        """Return the seconds allowed for the next event, and which limit that is."""
        config, now = self._config, self._clock()
        if self.record.first is None:
            limits = [(config.first_token_timeout, "first token")]
        else:
            limits = [(config.idle_timeout, "next token")]
        if config.answer_timeout is not None:
            elapsed = now - self.record.started
            limits.append((config.answer_timeout - elapsed, "whole answer"))
        left = self._call.seconds_left
        if left is not None:
            limits.append((left, "deadline"))
        return min(limits)

    def _make_timeout(self, seconds: float | None, subject: str) -> ServeError:
        if subject == "deadline":
            return ServeError(
                "The request's deadline passed before the answer was complete, after "
                f"{self.record.num_tokens} tokens. Request fewer tokens or allow more time.",
                status=408,
                kind="timeout_error",
                code="deadline_exceeded",
            )
        return ServeError(
            f"Timed out waiting for the {subject} from the model behind '{self.record.backend}': "
            f"more than {seconds:.3g} s, after {self.record.num_tokens} tokens. Try again later.",
            status=504,
            kind="server_error",
            code="timeout",
        )

    def _make_failure(self, error: Exception) -> ServeError:
        log.error("backend %s failed: %r", self.record.backend, error, exc_info=error)
        return ServeError(
            f"The model behind '{self.record.backend}' failed. Try again.",
            status=500,
            kind="server_error",
            code="backend_failure",
        )

    def _settle(self, *, failed: bool) -> None:
        """Give the breaker this attempt's result: success once, failure always."""
        if failed:
            self.route.breaker.record_failure()
        elif not self._is_settled:
            self.route.breaker.record_success()
        self._is_settled = True

    async def close(self) -> None:
        """Cancel the attempt if it is still running."""
        if self._closed:
            return
        self._closed = True
        self._time_limit.close()
        try:
            await self._close()
        finally:
            self.route.running -= 1

    async def _close(self) -> None:
        if not self._is_settled:
            self.route.breaker.release()
            self._is_settled = True
        if not (self._ended or self.record.usage or self.record.cause):
            # The model did nothing wrong: the client disconnected.
            self.record.fault = Fault.CLIENT
        if self.record.ended is None:
            self.record.ended = self._clock()
        if not self._ended:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._events.aclose()
            except Exception:
                # The client has its answer; a failed cancellation must not fail the request.
                log.exception("backend %s could not cancel a request", self.record.backend)
