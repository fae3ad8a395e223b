"""What the interface stands on, and a request's way through it."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute
from starlette.types import ASGIApp

from halfbyte.errors import ServeError
from halfbyte.serve.api.answers import AnswerForm, gather
from halfbyte.serve.api.error_responses import error_body, internal_error
from halfbyte.serve.api.streaming import (
    ClientLeft,
    EventStream,
    WhileConnected,
    write_event,
    write_json,
)
from halfbyte.serve.backend import Backend, Call, Delta, Event, Kind, Served, TextTools, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.limits import Limits, Tally
from halfbyte.serve.text.choice_requests import count_characters, count_choices, read_limit
from halfbyte.serve.time_limit import TimeLimit

logger = logging.getLogger(__name__)

CLIENT_LEFT = 499
"""Status in the log of a request whose client did not wait; nobody reads it."""
CHARACTERS_PER_TOKEN = 4
"""Of a prompt whose tokens nobody has told."""
GRACE_SECONDS = 5.0
"""After a deadline, for a backend to notice it by itself."""
_PREFIXES: dict[Kind, str] = {"chat": "chatcmpl", "completion": "cmpl"}


class Router(Protocol):
    """Chooses who answers a call."""

    def stream(self, call: Call, served: Served) -> AsyncGenerator[Event, None]:
        """Answer, within the call's time; `served` is filled in before the first event."""


class AdapterControl(Protocol):
    """Loads and unloads adapters by their names."""

    async def load(self, name: str) -> None:
        """Make one servable."""

    async def unload(self, name: str) -> None:
        """Take one away."""


class DirectRouter:
    """Always the one backend."""

    def __init__(self, backend: Backend) -> None:
        """Take it."""
        self._backend = backend

    async def stream(self, call: Call, served: Served) -> AsyncGenerator[Event, None]:
        """Pass the call on.

        Args:
            call: What is asked.
            served: Filled in before the first event.

        Yields:
            The backend's events.

        Raises:
            ServeError: The backend failed, or goes on long after the deadline.
        """
        served.backend, served.model = self._backend.name, str(call.body.get("model", ""))
        left = call.seconds_left
        loop = asyncio.get_running_loop()
        late = None if left is None else loop.time() + left + GRACE_SECONDS
        limit = TimeLimit()
        async with aclosing(self._backend.stream(call)) as events:
            try:
                while True:
                    yield await limit.wait(anext(events), late)
            except StopAsyncIteration:
                return
            except TimeoutError as error:
                raise ServeError(
                    "The answer was not done in the time that it may take. Ask for fewer tokens or "
                    "allow more time.",
                    status=408,
                    kind="timeout_error",
                    code="request_timeout",
                ) from error
            finally:
                limit.close()


@dataclass(kw_only=True)
class Gateway:
    """What the interface is made of."""

    backend: Backend
    """That is asked first, and closed in the end."""
    config: ServeConfig
    keys: ApiKeys = field(default_factory=ApiKeys)
    router: Router | None = None
    """None: the backend itself."""
    primary: Callable[[], Backend] | None = None
    """Gives the backend that has taken its place since; None: none does."""
    adapters: AdapterControl | None = None
    metrics: Callable[[], str | bytes] | None = None
    """Gives Prometheus' text form."""
    refused: Callable[[str], None] = lambda limit: None
    """Told of every request that is over a limit, before any model sees it."""
    routes: Sequence[BaseRoute] = ()
    """More pages, such as a dashboard."""
    open_paths: Sequence[str] = ()
    """Of those pages the ones that need no key."""
    draining: bool = False
    """New requests are refused, running ones finish."""

    def __post_init__(self) -> None:
        self.limits = Limits(
            most=self.config.most_requests,
            most_per_key=self.config.key_requests,
            tokens_per_minute=self.config.key_tokens,
            refused=self.refused,
        )
        self.started = int(time.time())

    @property
    def models(self) -> tuple[str, ...]:
        """Names that clients may ask for; a replaced model goes on to be known by its own."""
        return tuple(dict.fromkeys((*self.backend.models[:1], *self.current.models)))

    @property
    def current(self) -> Backend:
        """The model that is asked first now, itself: after a swap or a promotion another one."""
        return self.backend if self.primary is None else self.primary()

    @property
    def text_tools(self) -> TextTools | None:
        """Tells texts in that model's token ids; None where it cannot."""
        current = self.current
        return current if isinstance(current, TextTools) else None

    async def is_ready(self) -> bool:
        """Tell whether new requests would be answered."""
        return not self.draining and await self.current.is_ready()

    async def answer(self, request: Request, kind: Kind, body: Mapping[str, Any]) -> ASGIApp:
        """Answer a chat or a completion.

        Args:
            request: Whose body has been read.
            kind: Which.
            body: Checked.

        Returns:
            JSON, a stream, or an error.
        """
        call = self._make_call(request, kind, body)
        served = Served()
        self._check(call)
        form = AnswerForm(call, str(body["model"]))
        router = self.router or DirectRouter(self.backend)
        try:
            async with AsyncExitStack() as stack:
                prompt = count_characters(body) // CHARACTERS_PER_TOKEN
                tally = stack.enter_context(self.limits.enter(call.key, prompt=prompt))
                events = await stack.enter_async_context(aclosing(router.stream(call, served)))
                await stack.enter_async_context(WhileConnected(request.receive))
                if not body.get("stream"):
                    choices, usage = await gather(events, tally.note)
                    told = form.whole(choices, usage)
                    return JSONResponse(told, headers=self._headers(call, served))
                # Until the first event an error can still be told by its status.
                first = await anext(events)
                pieces = self._tell_events(form, tally, first, events)
                await stack.enter_async_context(aclosing(pieces))
                return EventStream(pieces, self._headers(call, served), stack.pop_all())
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)

    async def _tell_events(
        self, form: AnswerForm, tally: Tally, first: Event, events: AsyncGenerator[Event, None]
    ) -> AsyncGenerator[bytes, None]:
        """Write a stream; an error within it is its last event.

        What no token follows goes out in one piece with the end: every piece costs a system call,
        and wakes the client. Usage is the end: whoever watches the answer looks at it when the
        client has it.
        """
        parts: list[bytes] = []
        event: Event | None = first
        try:
            while event is not None:
                tally.note(event)
                parts += form.chunks(event)
                goes_out = type(event) is Delta and not event.is_last
                if type(event) is Usage:
                    parts.append(write_event("[DONE]"))
                    goes_out = True
                if goes_out:
                    yield b"".join(parts)
                    parts.clear()
                event = await anext(events, None)
        except ServeError as error:
            parts.append(write_event(write_json(error_body(error))))
        except Exception:
            logger.exception("A stream failed.")
            parts.append(write_event(write_json(error_body(internal_error()))))
        if parts:
            yield b"".join(parts)

    def _make_call(self, request: Request, kind: Kind, body: Mapping[str, Any]) -> Call:
        tags = request.headers.get("x-halfbyte-tags", "").split(",")
        tags += str((body.get("metadata") or {}).get("tags", "")).split(",")
        return Call(
            kind=kind,
            body=body,
            id=f"{_PREFIXES[kind]}-{secrets.token_hex(14)}",
            key=request.state.key,
            tags=frozenset(tag.strip()[:64] for tag in tags if tag.strip()),
            deadline=time.monotonic() + self._read_seconds(request),
        )

    def _read_seconds(self, request: Request) -> float:
        """Give the time for an answer: the server's, or the client's where it is shorter."""
        asked = request.headers.get("x-halfbyte-timeout")
        try:
            seconds = self.config.request_seconds if asked is None else float(asked)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise ServeError(
                f"The header X-Halfbyte-Timeout is '{str(asked)[:40]}'; it must be seconds above "
                "0.",
                code="invalid_value",
            )
        return min(seconds, self.config.request_seconds)

    def _check(self, call: Call) -> None:
        if self.draining:
            raise ServeError(
                "The server is being stopped and takes no new requests.",
                status=503,
                kind="server_error",
                code="shutting_down",
                retry_after=5.0,
            )
        model = call.body["model"]
        models = self.models
        # Another server that nobody has reached yet has told none: only asking it changes that.
        if models and model not in models:
            if reason := getattr(self.current, "missing_adapters", {}).get(model):
                raise ServeError(
                    f"The adapter '{model}' is not available any more: it could not be loaded into "
                    f"the model version that is served now. {reason} Ask for '{models[0]}', or "
                    "load an adapter that fits.",
                    status=404,
                    code="model_not_found",
                    param="model",
                )
            raise ServeError(
                f"The model '{str(model)[:80]}' does not exist here. There is: "
                f"{', '.join(models[:20])}.",
                status=404,
                code="model_not_found",
                param="model",
            )
        param, wanted = read_limit(call)
        most = self.config.most_tokens
        if most is not None and wanted is not None and wanted > most:
            raise ServeError(
                f"{param} is {wanted}; this server gives {most} at most.",
                code="invalid_value",
                param=param,
            )
        choices = count_choices(call)
        if choices > self.config.most_choices:
            prompts = choices // call.body.get("n", 1)
            raise ServeError(
                f"The request asks for {choices} choices ({prompts} prompts); "
                f"{self.config.most_choices} are allowed.",
                code="invalid_value",
                param="n" if prompts == 1 else "prompt",
            )

    def _headers(self, call: Call, served: Served) -> dict[str, str]:
        told = {
            "X-Request-Id": call.id,
            "X-Halfbyte-Model": served.model,
            "X-Halfbyte-Backend": served.backend,
            "X-Halfbyte-Reason": served.reason,
            "X-Halfbyte-Version": served.version,
        }
        return {name: _header_text(value) for name, value in told.items() if value}


def _header_text(value: str) -> str:
    """Leave what a header can hold."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in value)[:200]
