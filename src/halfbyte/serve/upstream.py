"""A backend at one or several OpenAI-compatible addresses, which take turns.

::

    Call ──POST, always streamed──> a host in turn ──bytes──> EventParser ──> ChunkReader ──> events
                                    └─ unreachable or busy: the next one is asked for a while

A client's key never goes there: the hosts have a key of this server's own.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any

from halfbyte.errors import ServeError, require_extra
from halfbyte.serve.backend import Call, Event, Load
from halfbyte.serve.config import AnswerLimits
from halfbyte.serve.server_sent_events import EventParser
from halfbyte.serve.text.choice_requests import add_limit, count_choices
from halfbyte.serve.upstream_chunks import (
    ChunkReader,
    broken,
    read_json,
    unreachable,
    upstream_error,
)
from halfbyte.serve.upstream_connections import RetryingTransport
from halfbyte.serve.upstream_hosts import Host, order_hosts, read_addresses

with require_extra("httpx2", "serve", "Asking another server"):
    import httpx2

PATHS = {"chat": "/chat/completions", "completion": "/completions"}
MOST_ERROR_BYTES = 65_536
LONGEST_RETRY_SECONDS = 3600.0
"""That another server may ask to be left alone for."""
BUSY = (429, 502, 503)
"""Statuses of a host that has begun nothing, so that another one may."""
OWN_FIELDS = frozenset({"metadata", "stream", "stream_options"})
"""Of the request; meant for this server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTimeouts:
    """How long another server may take; seconds."""

    connect: float = 5.0
    first: float = 300.0
    """Until the first event."""
    between: float = 60.0
    """From one event to the next."""


@dataclass(slots=True, kw_only=True)
class UpstreamBackend:
    """Other servers that all have the same models."""

    hosts: list[Host]
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    """Asked for where a call names a model that the hosts do not have; None: their first."""
    adapters: tuple[str, ...] = ()
    """Further names, beside `model`, that the hosts answer to."""
    timeouts: UpstreamTimeouts = field(default_factory=UpstreamTimeouts)
    limits: AnswerLimits = field(default_factory=AnswerLimits)
    """Of this server's answers."""
    name: str = "upstream"
    _turn: int = -1
    _closed: bool = False
    _client: httpx2.AsyncClient | None = None

    @classmethod
    def open(
        cls,
        addresses: Sequence[str],
        *,
        key: str | None = None,
        timeouts: UpstreamTimeouts | None = None,
        limits: AnswerLimits | None = None,
    ) -> UpstreamBackend:
        """Take addresses; nobody is asked yet.

        Args:
            addresses: Up to and with ``/v1``; a model's name may follow after ``#``.
            key: Of this server for those.
            timeouts: How long they may take.
            limits: Of this server's answers.

        Returns:
            The backend; a ConfigError where there is none, or one is no address.
        """
        hosts, model = read_addresses(addresses)
        backend = cls(hosts=hosts, key=key, model=model)
        backend.timeouts, backend.limits = timeouts or backend.timeouts, limits or backend.limits
        backend.name = hosts[0].name
        return backend

    @property
    def models(self) -> tuple[str, ...]:
        """Names that the hosts have told, each once."""
        if self.model is not None:
            return (self.model, *self.adapters)
        return tuple(dict.fromkeys(name for host in self.hosts for name in host.models))

    async def start(self) -> list[str]:
        """Ask every host for its models.

        Returns:
            Why which host could not be asked; empty where all answered.
        """
        found = await asyncio.gather(
            *(self._learn_models(host) for host in self.hosts), return_exceptions=True
        )
        return [str(error) for error in found if isinstance(error, Exception)]

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer by a host that can be reached; closing ends the request there."""
        if self._closed:
            raise unreachable(self.name, "it is being closed")
        last: ServeError | None = None
        for host in self._in_turn():
            try:
                await self._learn_models(host)
                opened = self._ask(host, call)
                first = await anext(opened)
            except _NotReached as error:
                # Nothing was begun there, so somebody else may do it.
                last = error.refusal
                continue
            async with aclosing(opened):
                yield first
                async for event in opened:
                    yield event
            return
        raise last or unreachable(self.name, "no host is left")

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Let a host tell a text's token ids; halfbyte and vLLM know how."""
        return await self._ask_beside("/tokenize", body)

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Let a host tell the text of token ids."""
        return await self._ask_beside("/detokenize", body)

    async def is_ready(self) -> bool:
        """Tell whether any host answers; those that did not are asked again."""
        if self._closed:
            return False
        if not any(host.is_up and host.models for host in self.hosts):
            await self.start()
        return any(host.is_up and host.models for host in self.hosts)

    def load(self) -> Load:
        """Tell how many requests of ours are there."""
        return Load(running=sum(host.running for host in self.hosts))

    async def close(self) -> None:
        """Take nothing new, and close the connections."""
        self._closed = True
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _in_turn(self) -> list[Host]:
        """Those that may be asked, in this request's order."""
        self._turn += 1
        return order_hosts(self.hosts, self._turn)

    def _open_client(self) -> httpx2.AsyncClient:
        if self._client is None:
            longest = max(self.timeouts.first, self.timeouts.between)
            self._client = httpx2.AsyncClient(
                transport=RetryingTransport(),
                timeout=httpx2.Timeout(longest, connect=self.timeouts.connect, pool=None),
                follow_redirects=False,
                # A proxy of the environment is not meant for a server beside this one.
                trust_env=False,
            )
        return self._client

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    async def _learn_models(self, host: Host) -> None:
        """Ask a host once which models it has; where one was named, that is enough."""
        if self.model is not None:
            host.models = self.models
        if host.models:
            return
        try:
            reply = await self._open_client().get(
                f"{host.address}/models", headers=self._headers(), timeout=self.timeouts.connect
            )
            if reply.status_code != 200:
                raise _make_refusal(host, reply, reply.content)
            host.models = tuple(str(entry["id"]) for entry in reply.json()["data"])
        except httpx2.HTTPError as error:
            host.note_failure()
            raise _NotReached(_unreachable(host, error)) from error
        except (ValueError, TypeError, LookupError) as error:
            raise broken(host.name, "its list of models is none") from error
        host.note_success()

    async def _ask(self, host: Host, call: Call) -> AsyncGenerator[Event, None]:
        """Ask one host, and read what it sends."""
        body = {key: value for key, value in call.body.items() if key not in OWN_FIELDS}
        body["model"] = self._name_model(host, body)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= add_limit(call, self.limits)
        reader = ChunkReader(call.kind, host.name, count_choices(call))
        request = self._open_client().stream(
            "POST", host.address + PATHS[call.kind], json=body, headers=self._headers()
        )
        host.running += 1
        try:
            async with AsyncExitStack() as stack:
                async with _limit(self.timeouts.first, call):
                    reply = await stack.enter_async_context(request)
                    await _check_reply(reply, host)
                events = await stack.enter_async_context(
                    aclosing(self._read(reply, reader, host, call))
                )
                async for event in events:
                    yield event
            host.note_success()
            yield reader.finish()
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            host.note_failure()
            # It may come back with others.
            host.models = ()
            raise _NotReached(_unreachable(host, error)) from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise _too_slow(host, call) from error
        except httpx2.HTTPError as error:
            raise broken(host.name, str(error) or type(error).__name__) from error
        finally:
            host.running -= 1

    async def _ask_beside(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Ask a host in turn for something that stands beside OpenAI's interface."""
        last: ServeError | None = None
        for host in self._in_turn():
            try:
                await self._learn_models(host)
                asked = {**body, "model": self._name_model(host, body)}
                reply = await self._open_client().post(
                    host.address.removesuffix("/v1") + path, json=asked, headers=self._headers()
                )
            except _NotReached as error:
                last = error.refusal
                continue
            except httpx2.HTTPError as error:
                host.note_failure()
                last = _unreachable(host, error)
                continue
            told = _read_json(reply.content)
            if reply.status_code in (404, 405):
                raise ServeError(
                    f"The model at {host.name} knows no {path}.", status=404, code="not_supported"
                )
            if reply.status_code != 200:
                refusal = _make_refusal(host, reply, reply.content)
                if isinstance(refusal, _NotReached):
                    last = refusal.refusal
                    continue
                raise refusal
            if not isinstance(told, dict):
                raise broken(host.name, f"its answer to {path} is no object")
            return told
        raise last or unreachable(self.name, "no host is left")

    def _name_model(self, host: Host, body: Mapping[str, Any]) -> Any:
        """Give the model that is asked for, or the host's own name for it."""
        model = body.get("model")
        if model in host.models:
            return model
        return self.model or (host.models[0] if host.models else model)

    async def _read(
        self, reply: httpx2.Response, reader: ChunkReader, host: Host, call: Call
    ) -> AsyncGenerator[Event, None]:
        parser = EventParser()
        limit = self.timeouts.first
        received = reply.aiter_bytes()
        while not reader.done:
            try:
                async with _limit(limit, call):
                    part = await anext(received)
                chunks = parser.feed(part)
            except StopAsyncIteration:
                return
            except ValueError as error:
                raise broken(host.name, str(error)) from error
            for chunk in chunks:
                for event in reader.read(chunk):
                    limit = self.timeouts.between
                    yield event


class _NotReached(Exception):
    """Nobody answered at an address, or had no time, so nothing was begun there."""

    def __init__(self, refusal: ServeError) -> None:
        super().__init__(str(refusal))
        self.refusal = refusal


def _unreachable(host: Host, error: Exception) -> ServeError:
    return unreachable(host.name, str(error) or type(error).__name__)


async def _check_reply(reply: httpx2.Response, host: Host) -> None:
    media = reply.headers.get("content-type", "")
    if reply.status_code == 200 and media.startswith("text/event-stream"):
        return
    content = bytearray()
    async for part in reply.aiter_bytes():
        content += part
        if len(content) > MOST_ERROR_BYTES:
            break
    if reply.status_code == 200:
        raise broken(host.name, f"its answer is '{media[:60]}' and no stream of events")
    raise _make_refusal(host, reply, bytes(content))


def _make_refusal(host: Host, reply: httpx2.Response, content: bytes) -> ServeError | _NotReached:
    """Build the error of a refusal; a host that has no time is left alone as long as it says."""
    after = _read_retry_after(reply.headers.get("retry-after", ""))
    refusal = upstream_error(reply.status_code, _read_json(content), host.name, retry_after=after)
    if reply.status_code not in BUSY:
        return refusal
    host.note_busy(after)
    return _NotReached(refusal)


def _read_retry_after(text: str) -> float | None:
    """Read the header's seconds or date; None where it is neither, at most an hour."""
    try:
        seconds = (
            float(text)
            if text.isdecimal()
            else parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), LONGEST_RETRY_SECONDS)


def _limit(seconds: float, call: Call) -> asyncio.Timeout:
    """End what takes longer than this, or than the call may."""
    left = call.seconds_left
    return asyncio.timeout(seconds if left is None else max(0.0, min(seconds, left)))


def _read_json(content: bytes) -> Any:
    text = content.decode("utf-8", "replace")
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return text[:200]


def _too_slow(host: Host, call: Call) -> ServeError:
    left = call.seconds_left
    if left is not None and left <= 0:
        return ServeError(
            "The answer was not done in the time that it may take.",
            status=408,
            kind="timeout_error",
            code="request_timeout",
        )
    host.note_failure()
    return ServeError(
        f"The model at {host.name} did not go on in time.",
        status=504,
        kind="server_error",
        code="upstream_timeout",
    )
