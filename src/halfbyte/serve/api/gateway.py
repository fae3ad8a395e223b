"""The gateway: turns a validated request into a call, routes it and sends the answer."""

from __future__ import annotations

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
from halfbyte.serve.api.answers import AnswerFormatter, collect_answer
from halfbyte.serve.api.error_responses import error_body, internal_error
from halfbyte.serve.api.streaming import (
    CancelOnDisconnect,
    ClientDisconnected,
    EventStream,
    write_event,
    write_json,
)
from halfbyte.serve.backend import Backend, Call, Delta, Event, Kind, Served, TextTools, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.keys import ApiKeys
from halfbyte.serve.limits import Limits, Tally
from halfbyte.serve.routing.router import Router
from halfbyte.serve.text.choice_requests import count_choices, estimate_prompt_tokens, read_limit

logger = logging.getLogger(__name__)

CLIENT_CLOSED_REQUEST = 499
"""Status of a request whose client has disconnected; it only appears in logs."""
_PREFIXES: dict[Kind, str] = {"chat": "chatcmpl", "completion": "cmpl"}


class AdapterControl(Protocol):
    """Loads and unloads adapters by name."""

    async def load(self, name: str) -> None:
        """Load an adapter."""

    async def unload(self, name: str) -> None:
        """Unload an adapter."""


@dataclass(kw_only=True)
class Gateway:
    """Answers chats and completions, within the server's limits."""

    backend: Backend
    """The primary backend at the start, closed at shutdown."""
    router: Router
    config: ServeConfig
    keys: ApiKeys = field(default_factory=ApiKeys)
    adapters: AdapterControl | None = None
    metrics: Callable[[], str | bytes] | None = None
    """Returns the metrics in Prometheus' text format."""
    on_rejection: Callable[[str], None] = lambda limit: None
    """Called with the name of the limit for every request that exceeds one."""
    routes: Sequence[BaseRoute] = ()
    """Additional pages, such as a dashboard."""
    open_paths: Sequence[str] = ()
    """Paths of those pages that need no key."""
    draining: bool = False
    """Whether new requests are rejected while running ones finish."""

    def __post_init__(self) -> None:
        self.limits = Limits(
            max_requests=self.config.max_requests,
            max_requests_per_key=self.config.max_requests_per_key,
            tokens_per_minute=self.config.tokens_per_minute_per_key,
            on_rejection=self.on_rejection,
        )
        self.started = int(time.time())

    @property
    def models(self) -> tuple[str, ...]:
        """Model names that clients may use; a replaced model keeps its name."""
        return tuple(dict.fromkeys((*self.backend.models[:1], *self.current.models)))

    @property
    def current(self) -> Backend:
        """The primary backend now, which a swap or a promotion may have replaced."""
        return self.router.primary

    @property
    def text_tools(self) -> TextTools | None:
        """The current backend if it answers /tokenize and /detokenize; else None."""
        current = self.current
        return current if isinstance(current, TextTools) else None

    async def is_ready(self) -> bool:
        """Return whether new requests would be answered."""
        return not self.draining and await self.current.is_ready()

    async def answer(self, request: Request, kind: Kind, body: Mapping[str, Any]) -> ASGIApp:
        """Answer a chat or a completion.

        Args:
            request: The HTTP request; its body has been read.
            kind: Whether it is a chat or a completion.
            body: The validated body.

        Returns:
            A JSON response or a stream.
        """
        call = self._make_call(request, kind, body)
        request.state.request_id = call.id
        served = Served()
        self._check(call)
        formatter = AnswerFormatter(call, str(body["model"]))
        try:
            async with AsyncExitStack() as stack:
                prompt = estimate_prompt_tokens(body)
                tally = stack.enter_context(self.limits.enter(call.key, prompt=prompt))
                events = await stack.enter_async_context(aclosing(self.router.stream(call, served)))
                await stack.enter_async_context(CancelOnDisconnect(request.receive))
                if not body.get("stream"):
                    choices, usage = await collect_answer(events, tally.note)
                    answer = formatter.format_answer(choices, usage)
                    return JSONResponse(answer, headers=self._headers(call, served))
                # An error before the first event can still be reported by the HTTP status.
                first = await anext(events)
                pieces = self._write_events(formatter, tally, first, events)
                await stack.enter_async_context(aclosing(pieces))
                return EventStream(pieces, self._headers(call, served), stack.pop_all())
        except ClientDisconnected:
            return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def _write_events(
        self,
        formatter: AnswerFormatter,
        tally: Tally,
        first: Event,
        events: AsyncGenerator[Event, None],
    ) -> AsyncGenerator[bytes, None]:
        """Write a stream; an error after its start becomes its last event.

        Everything after the last token is sent as one piece, because each piece costs a system call
        and wakes the client. Usage completes the piece: the router runs its monitors when the next
        event is requested, which is after the client has received the answer.
        """
        parts: list[bytes] = []
        event: Event | None = first
        try:
            while event is not None:
                tally.note(event)
                parts += formatter.format_chunks(event)
                is_complete = type(event) is Delta and not event.is_last
                if type(event) is Usage:
                    parts.append(write_event("[DONE]"))
                    is_complete = True
                if is_complete:
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
        """Return the timeout: the server's, or the client's if that is shorter."""
        timeout = request.headers.get("x-halfbyte-timeout")
        try:
            seconds = self.config.request_timeout if timeout is None else float(timeout)
        except ValueError:
            seconds = -1.0
        if not 0 < seconds < float("inf"):
            raise ServeError(
                f"The header X-Halfbyte-Timeout is '{str(timeout)[:40]}'; it must be a number of "
                "seconds above 0.",
                code="invalid_value",
            )
        return min(seconds, self.config.request_timeout)

    def _check(self, call: Call) -> None:
        if self.draining:
            raise ServeError(
                "The server is shutting down and accepts no new requests.",
                status=503,
                kind="server_error",
                code="shutting_down",
                retry_after=5.0,
            )
        model = call.body["model"]
        models = self.models
        # The models of an upstream server are unknown until it was first reached.
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
                f"The model '{str(model)[:80]}' does not exist on this server. Available: "
                f"{', '.join(models[:20])}.",
                status=404,
                code="model_not_found",
                param="model",
            )
        param, wanted = read_limit(call)
        max_tokens = self.config.max_tokens
        if max_tokens is not None and wanted is not None and wanted > max_tokens:
            raise ServeError(
                f"{param} is {wanted}; this server allows at most {max_tokens}.",
                code="invalid_value",
                param=param,
            )
        choices = count_choices(call)
        if choices > self.config.max_choices:
            prompts = choices // call.body.get("n", 1)
            raise ServeError(
                f"The request asks for {choices} choices ({prompts} prompts); this server allows "
                f"at most {self.config.max_choices}.",
                code="invalid_value",
                param="n" if prompts == 1 else "prompt",
            )

    def _headers(self, call: Call, served: Served) -> dict[str, str]:
        headers = {
            "X-Request-Id": call.id,
            "X-Halfbyte-Model": served.model,
            "X-Halfbyte-Backend": served.backend,
            "X-Halfbyte-Reason": served.reason,
            "X-Halfbyte-Version": served.version,
        }
        return {name: _sanitize_header(value) for name, value in headers.items() if value}


def _sanitize_header(value: str) -> str:
    """Replace characters that a header cannot contain, and truncate to 200 characters."""
    return "".join(c if c.isascii() and c.isprintable() else "?" for c in value)[:200]
