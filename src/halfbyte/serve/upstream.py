"""A backend for one or several OpenAI-compatible servers with the same models.

::

    Call ──POST, always streamed──> next host ──bytes──> EventParser ──> ChunkReader ──> events
                                    └─ if it is unreachable or overloaded: another host

Clients' API keys are never forwarded: the hosts get this server's own key.
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
    invalid_response,
    read_json,
    unreachable,
    upstream_error,
)
from halfbyte.serve.upstream_connections import RetryingTransport
from halfbyte.serve.upstream_hosts import Host, order_hosts, read_addresses

with require_extra("httpx2", "serve", "Connecting to an upstream server"):
    import httpx2

PATHS = {"chat": "/chat/completions", "completion": "/completions"}
MAX_ERROR_BYTES = 65_536
MAX_RETRY_AFTER_SECONDS = 3600.0
"""Longest Retry-After of a host that is respected."""
BUSY_STATUSES = (429, 502, 503)
"""Statuses of a host that has not started the request, so that another host may be asked."""
GATEWAY_FIELDS = frozenset({"metadata", "stream", "stream_options"})
"""Request fields that are meant for this server and not forwarded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UpstreamTimeouts:
    """Timeouts for upstream servers, in seconds."""

    connect: float = 5.0
    first: float = 300.0
    """Until the first event."""
    between: float = 60.0
    """Between two events."""


@dataclass(slots=True, kw_only=True)
class UpstreamBackend:
    """Upstream servers that all have the same models; requests are distributed round robin."""

    hosts: list[Host]
    key: str | None = field(default=None, repr=False)
    model: str | None = None
    """Used if a call names a model that the hosts do not have; None: their first model."""
    adapters: tuple[str, ...] = ()
    """Names of loaded adapters, in addition to `model`."""
    timeouts: UpstreamTimeouts = field(default_factory=UpstreamTimeouts)
    limits: AnswerLimits = field(default_factory=AnswerLimits)
    """This server's limits on answers."""
    name: str = "upstream"
    isolates_keys: bool = False
    """Whether the hosts know vLLM's `cache_salt`: keys then do not share cached prefixes."""
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
        """Create the backend; no connection is made yet.

        Args:
            addresses: URLs up to and including ``/v1``; a model's name may follow after ``#``.
            key: API key for these servers.
            timeouts: Timeouts for these servers.
            limits: This server's limits on answers.

        Returns:
            The backend. A ConfigError is raised if there is no address, or one is invalid.
        """
        hosts, model = read_addresses(addresses)
        backend = cls(hosts=hosts, key=key, model=model)
        backend.timeouts, backend.limits = timeouts or backend.timeouts, limits or backend.limits
        backend.name = hosts[0].name
        return backend

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the hosts' models, without duplicates; empty until a host has been asked."""
        if self.model is not None:
            return (self.model, *self.adapters)
        return tuple(dict.fromkeys(name for host in self.hosts for name in host.models))

    async def start(self) -> list[str]:
        """Ask every host for its models.

        Returns:
            An error message for each host that could not be asked.
        """
        results = await asyncio.gather(
            *(self._load_models(host) for host in self.hosts), return_exceptions=True
        )
        return [str(error) for error in results if isinstance(error, Exception)]

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer with the first host that can; closing the iterator cancels the request there."""
        if self._closed:
            raise unreachable(self.name, "it is being closed")
        last: ServeError | None = None
        for host in self._order_hosts():
            try:
                await self._load_models(host)
                events = self._send(host, call)
                first = await anext(events)
            except _NotStartedError as error:
                # The host has not started the request, so another one may.
                last = error.reason
                continue
            async with aclosing(events):
                yield first
                async for event in events:
                    yield event
            return
        raise last or unreachable(self.name, "no host is left")

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Forward /tokenize, which halfbyte and vLLM support."""
        return await self._forward("/tokenize", body)

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Forward /detokenize, which halfbyte and vLLM support."""
        return await self._forward("/detokenize", body)

    async def is_ready(self) -> bool:
        """Return whether any host can be reached; if none was, all are asked again."""
        if self._closed:
            return False
        if not any(host.is_up and host.models for host in self.hosts):
            await self.start()
        return any(host.is_up and host.models for host in self.hosts)

    def load(self) -> Load:
        """Return the number of this server's running requests."""
        return Load(running=sum(host.running for host in self.hosts))

    async def close(self) -> None:
        """Refuse new requests, and close the connections."""
        self._closed = True
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _order_hosts(self) -> list[Host]:
        """Return the hosts in the order to ask them for the next request."""
        self._turn += 1
        return order_hosts(self.hosts, self._turn)

    def _open_client(self) -> httpx2.AsyncClient:
        if self._client is None:
            longest = max(self.timeouts.first, self.timeouts.between)
            self._client = httpx2.AsyncClient(
                transport=RetryingTransport(),
                timeout=httpx2.Timeout(longest, connect=self.timeouts.connect, pool=None),
                follow_redirects=False,
                # A proxy set in the environment is not meant for model servers.
                trust_env=False,
            )
        return self._client

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    async def _load_models(self, host: Host) -> None:
        """Ask a host once for its models, unless the command line named the model."""
        if self.model is not None:
            host.models = self.models
        if host.models:
            return
        try:
            response = await self._open_client().get(
                f"{host.address}/models", headers=self._headers(), timeout=self.timeouts.connect
            )
            if response.status_code != 200:
                raise _make_error(host, response, response.content)
            host.models = tuple(str(entry["id"]) for entry in response.json()["data"])
        except httpx2.HTTPError as error:
            host.record_failure()
            raise _NotStartedError(_unreachable(host, error)) from error
        except (ValueError, TypeError, LookupError) as error:
            raise invalid_response(host.name, "its list of models cannot be parsed") from error
        host.record_success()

    async def _send(self, host: Host, call: Call) -> AsyncGenerator[Event, None]:
        """Send a call to one host, and read its answer."""
        body = {key: value for key, value in call.body.items() if key not in GATEWAY_FIELDS}
        body["model"] = self._find_model(host, body)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        body |= add_limit(call, self.limits)
        if self.isolates_keys and call.key:
            body["cache_salt"] = call.key
        reader = ChunkReader(call.kind, host.name, count_choices(call))
        request = self._open_client().stream(
            "POST", host.address + PATHS[call.kind], json=body, headers=self._headers()
        )
        host.running += 1
        try:
            async with AsyncExitStack() as stack:
                async with _timeout(self.timeouts.first, call):
                    response = await stack.enter_async_context(request)
                    await _check_response(response, host)
                events = await stack.enter_async_context(
                    aclosing(self._read(response, reader, host, call))
                )
                async for event in events:
                    yield event
            host.record_success()
            yield reader.finish()
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            host.record_failure()
            # It may come back with other models.
            host.models = ()
            raise _NotStartedError(_unreachable(host, error)) from error
        except (httpx2.TimeoutException, TimeoutError) as error:
            raise _make_timeout(host, call) from error
        except httpx2.HTTPError as error:
            raise invalid_response(host.name, str(error) or type(error).__name__) from error
        finally:
            host.running -= 1

    async def _forward(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Forward a request that is not part of OpenAI's API to the first host that can answer."""
        last: ServeError | None = None
        for host in self._order_hosts():
            try:
                await self._load_models(host)
                response = await self._open_client().post(
                    host.address.removesuffix("/v1") + path,
                    json={**body, "model": self._find_model(host, body)},
                    headers=self._headers(),
                )
                if response.status_code in (404, 405):
                    raise ServeError(
                        f"The model server at {host.name} does not support {path}.",
                        status=404,
                        code="not_supported",
                    )
                if response.status_code != 200:
                    raise _make_error(host, response, response.content)
            except _NotStartedError as error:
                last = error.reason
                continue
            except httpx2.HTTPError as error:
                host.record_failure()
                last = _unreachable(host, error)
                continue
            values = _parse_body(response.content)
            if not isinstance(values, dict):
                raise invalid_response(host.name, f"its response to {path} is not a JSON object")
            return values
        raise last or unreachable(self.name, "no host is left")

    def _find_model(self, host: Host, body: Mapping[str, Any]) -> Any:
        """Return the requested model if the host has it, else the host's model."""
        model = body.get("model")
        if model in host.models:
            return model
        return self.model or (host.models[0] if host.models else model)

    async def _read(
        self, response: httpx2.Response, reader: ChunkReader, host: Host, call: Call
    ) -> AsyncGenerator[Event, None]:
        parser = EventParser()
        seconds = self.timeouts.first
        received = response.aiter_bytes()
        while not reader.done:
            try:
                async with _timeout(seconds, call):
                    data = await anext(received)
                chunks = parser.feed(data)
            except StopAsyncIteration:
                return
            except ValueError as error:
                raise invalid_response(host.name, str(error)) from error
            for chunk in chunks:
                for event in reader.read(chunk):
                    seconds = self.timeouts.between
                    yield event


class _NotStartedError(Exception):
    """A host is unreachable or overloaded and has not started the request."""

    def __init__(self, reason: ServeError) -> None:
        super().__init__(str(reason))
        self.reason = reason


def _unreachable(host: Host, error: Exception) -> ServeError:
    return unreachable(host.name, str(error) or type(error).__name__)


async def _check_response(response: httpx2.Response, host: Host) -> None:
    """Raise unless the response is an event stream."""
    media_type = response.headers.get("content-type", "")
    if response.status_code == 200 and media_type.startswith("text/event-stream"):
        return
    content = bytearray()
    async for part in response.aiter_bytes():
        content += part
        if len(content) > MAX_ERROR_BYTES:
            break
    if response.status_code == 200:
        raise invalid_response(
            host.name, f"its content type is '{media_type[:60]}', not text/event-stream"
        )
    raise _make_error(host, response, bytes(content))


def _make_error(
    host: Host, response: httpx2.Response, content: bytes
) -> ServeError | _NotStartedError:
    """Build the error for an error response; an overloaded host is recorded as busy."""
    retry_after = _read_retry_after(response.headers.get("retry-after", ""))
    error = upstream_error(
        response.status_code, _parse_body(content), host.name, retry_after=retry_after
    )
    if response.status_code not in BUSY_STATUSES:
        return error
    host.record_busy(retry_after)
    return _NotStartedError(error)


def _read_retry_after(text: str) -> float | None:
    """Parse a Retry-After header (seconds or a date), at most an hour; None if it is invalid."""
    try:
        seconds = (
            float(text)
            if text.isdecimal()
            else parsedate_to_datetime(text).timestamp() - time.time()
        )
    except (ValueError, OverflowError):
        return None
    return min(max(seconds, 0.0), MAX_RETRY_AFTER_SECONDS)


def _timeout(seconds: float, call: Call) -> asyncio.Timeout:
    """Return a timeout after some seconds, or at the call's deadline if that is earlier."""
    left = call.seconds_left
    return asyncio.timeout(seconds if left is None else max(0.0, min(seconds, left)))


def _parse_body(content: bytes) -> Any:
    """Parse a body as JSON; if it is not JSON, return its beginning as text."""
    text = content.decode("utf-8", "replace")
    try:
        return read_json(text)
    except (ValueError, RecursionError):
        return text[:200]


def _make_timeout(host: Host, call: Call) -> ServeError:
    left = call.seconds_left
    if left is not None and left <= 0:
        return ServeError(
            "The request's deadline passed before the answer was complete. Request fewer tokens "
            "or allow more time.",
            status=408,
            kind="timeout_error",
            code="request_timeout",
        )
    host.record_failure()
    return ServeError(
        f"The model server at {host.name} timed out. Try again later.",
        status=504,
        kind="server_error",
        code="upstream_timeout",
    )
