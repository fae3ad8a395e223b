"""One model's try at a request: held back as far as asked, watched, timed, cut off when late."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Backend, Call, Delta, Event, Usage
from halfbyte.serve.fault import Blame, find_blame
from halfbyte.serve.quality_config import QualityConfig
from halfbyte.serve.routing.breaker import CircuitBreaker
from halfbyte.serve.routing.confidence import Confidence
from halfbyte.serve.time_limit import TimeLimit
from halfbyte.serve.watch.monitors import find_failures
from halfbyte.serve.watch.observation import Role, Seen

log = logging.getLogger(__name__)

IDLE_POLL_SECONDS = 0.05

CLOSE_SECONDS = 5.0
"""That a model may take to cancel a request."""


@dataclass(slots=True, eq=False)
class Route:
    """A model that may be asked, and what is known of its health."""

    backend: Backend
    role: Role
    name: str
    """Of the backend, made unique among those of one server."""
    breaker: CircuitBreaker = field(default_factory=CircuitBreaker)
    running: int = 0
    """Attempts that have begun and are not closed."""

    async def retire(self) -> None:
        """Close the model when its last attempt is over; nobody sends it new ones any more.

        A backend that is closed earlier may refuse a request that is on its way to it.
        """
        while self.running:
            await asyncio.sleep(IDLE_POLL_SECONDS)
        await self.backend.close()


@dataclass(slots=True, kw_only=True)
class Demands:
    """What an attempt must stand up to before its first event is let out."""

    tokens: int | None = 0
    """So many are held back; None: the whole answer."""
    causes: frozenset[str] = frozenset()
    confidence: Confidence | None = None


class Attempt:
    """A request on its way through one model."""

    def __init__(
        self,
        route: Route,
        call: Call,
        config: QualityConfig,
        *,
        demands: Demands,
        clock: Callable[[], float],
    ) -> None:
        """Start it; the breaker has let it through.

        Args:
            route: Who is asked.
            call: What is asked.
            config: The timeouts.
            demands: What is held back and looked at.
            clock: The time.
        """
        self.route = route
        route.running += 1
        self.seen = Seen(backend=route.name, role=route.role, started=clock())
        self.error: ServeError | None = None
        self._demands = demands
        self._config = config
        self._clock = clock
        self._held: deque[Event] = deque()
        self._ended = False
        self._settled = False
        """Whether the breaker has been told."""
        self._closed = False
        self._hides_logprobs = False
        self._call = self._adapt(call)
        # Together: a moment later the backend may serve another version.
        self.version = str(getattr(route.backend, "version", ""))
        self._events = route.backend.stream(self._call)
        self._time = TimeLimit()

    def _adapt(self, call: Call) -> Call:
        """Name this model, and ask for logprobs where confidence needs them."""
        body = dict(call.body)
        models = self.route.backend.models
        if models and body.get("model") not in models:
            body["model"] = models[0]
        confidence, asked = self._demands.confidence, body.get("logprobs")
        needed = confidence is not None and confidence.needs_logprobs
        # 0 is an answer too: of the drawn tokens, and of no others.
        if needed and (asked is None or asked is False):
            body["logprobs"] = True if call.kind == "chat" else 1
            self._hides_logprobs = True
        return replace(call, body=body)

    @property
    def model(self) -> str:
        """Its name as this model's server knows it, which some tell with their first answer."""
        asked, known = str(self._call.body.get("model", "")), self.route.backend.models
        return asked if asked in known or not known else known[0]

    async def hold(self) -> str:
        """Read until enough is there to be sure of this answer.

        Returns:
            Why the next model should be asked: a cause; empty: nothing against this one. With
            ``error``, ``timeout`` and ``overload`` the exception is in :attr:`error`.
        """
        limit = self._demands.tokens
        try:
            while not self._ended:
                enough = limit is not None and self.seen.num_tokens >= limit
                if self._held and enough and self._is_decided():
                    break
                event = await self._next()
                if event is not None:
                    self._held.append(event)
        except ServeError as error:
            self.error = error
            self._note(error)
            return self.seen.cause
        self.seen.cause = self._find_cause()
        return self.seen.cause

    def _is_decided(self) -> bool:
        confidence = self._demands.confidence
        if confidence is None or confidence.first_tokens is None:
            return True
        return confidence.is_decided(self.seen) or not self._tells(confidence)

    def _tells(self, confidence: Confidence) -> bool:
        """Whether the model gives what confidence is computed of."""
        return bool(self.seen.logprobs if confidence.needs_logprobs else self.seen.entropies)

    def _find_cause(self) -> str:
        demands = self._demands
        if not demands.causes:
            return ""
        for failure in find_failures(self._call, self.seen, whole=self._ended):
            if failure in demands.causes:
                return f"check:{failure}"
        confidence = demands.confidence
        if confidence is not None and (self._ended or confidence.is_decided(self.seen)):
            return "confidence" if confidence.doubts(self.seen) else ""
        return ""

    async def next(self) -> Event | None:
        """Let out what was held back, then what follows.

        Returns:
            The next event; None at the end.

        Raises:
            ServeError: The model failed, or was late.
        """
        self.seen.cause = ""
        if self._held:
            return self._held.popleft()
        if self._ended:
            return None
        try:
            return await self._next()
        except ServeError as error:
            self._note(error)
            raise

    def _note(self, error: ServeError) -> None:
        """Note whose fault an error is; the breaker is told of the model's own only."""
        self.seen.cause, self.seen.blame = find_blame(error)
        if self.seen.blame is Blame.OURS:
            self._settle(failed=True)

    async def _next(self) -> Event | None:
        """Give the next event; None at the end."""
        limit, what = self._limit()
        late = None if limit is None else asyncio.get_running_loop().time() + limit
        try:
            event = await self._time.wait(anext(self._events), late)
        except StopAsyncIteration:
            self._end()
            return None
        except ServeError:
            raise
        except TimeoutError as error:
            if not self._time.has_expired:
                raise self._failed(error) from error
            raise self._late(limit, what) from error
        except Exception as error:
            # A backend is somebody else's code: whatever it raises, another one may still answer.
            raise self._failed(error) from error
        if self.seen.first is None and self.route.breaker.state == "half-open":
            self._settle(failed=False)
        self.seen.feed(event, self._clock())
        if type(event) is Usage:
            # Before it is passed on: to a client it is the end.
            self._check_finished()
        if self._hides_logprobs and type(event) is Delta and event.logprobs is not None:
            return replace(event, logprobs=None)
        return event

    def _end(self) -> None:
        self._ended = True
        self.seen.ended = self._clock()
        self._check_finished()
        self._settle(failed=False)

    def _check_finished(self) -> None:
        """Raise where the answer has no end."""
        if not self.seen.finished:
            raise ServeError(
                f"The model behind '{self.seen.backend}' stopped after {self.seen.num_tokens} "
                "tokens without finishing its answer. Try again.",
                status=502,
                kind="server_error",
                code="incomplete_answer",
            )

    def _limit(self) -> tuple[float | None, str]:
        """Give the seconds that the next event may take, and what ends with them."""
        config, now = self._config, self._clock()
        waits = config.first_token_timeout if self.seen.first is None else config.idle_timeout
        limits = [(waits, "first token" if self.seen.first is None else "next token")]
        if config.answer_timeout is not None:
            limits.append((config.answer_timeout - (now - self.seen.started), "whole answer"))
        left = self._call.seconds_left
        if left is not None:
            limits.append((left, "deadline"))
        return min(limits)

    def _late(self, limit: float | None, what: str) -> ServeError:
        if what == "deadline":
            return ServeError(
                "The answer was not finished before the request's deadline, after "
                f"{self.seen.num_tokens} tokens. Ask for fewer tokens or allow more time.",
                status=408,
                kind="timeout_error",
                code="deadline_exceeded",
            )
        return ServeError(
            f"The model behind '{self.seen.backend}' took too long for the {what}: more than "
            f"{limit:.3g} s, after {self.seen.num_tokens} tokens. Try again later.",
            status=504,
            kind="server_error",
            code="timeout",
        )

    def _failed(self, error: Exception) -> ServeError:
        log.error("backend %s failed: %r", self.seen.backend, error, exc_info=error)
        return ServeError(
            f"The model behind '{self.seen.backend}' failed. Try again.",
            status=500,
            kind="server_error",
            code="backend_failure",
        )

    def _settle(self, *, failed: bool) -> None:
        """Tell the breaker, once."""
        if not self._settled or failed:
            (self.route.breaker.fail if failed else self.route.breaker.succeed)()
        self._settled = True

    async def close(self) -> None:
        """Cancel what still runs."""
        if self._closed:
            return
        self._closed = True
        self._time.close()
        try:
            await self._close()
        finally:
            self.route.running -= 1

    async def _close(self) -> None:
        if not self._settled:
            self.route.breaker.leave()
            self._settled = True
        if not (self._ended or self.seen.usage or self.seen.cause):
            # Nothing was wrong with it: nobody waits for the rest.
            self.seen.blame = Blame.CLIENT
        if self.seen.ended is None:
            self.seen.ended = self._clock()
        if not self._ended:
            try:
                async with asyncio.timeout(CLOSE_SECONDS):
                    await self._events.aclose()
            except Exception:
                # What the model does with the work is its own affair; the client has its answer.
                log.exception("backend %s could not cancel a request", self.seen.backend)
