"""The HTTP transport to upstream servers: short-lived idle connections, and one safe retry."""

from __future__ import annotations

import time
from typing import Any

from halfbyte.errors import require_extra

with require_extra("httpx2", "serve", "Connecting to an upstream server"):
    import httpx2

KEEPALIVE_SECONDS = 3.0
"""How long an idle connection is kept. Less than the 5 s of uvicorn, vLLM and other common servers,
so that the client, not the server, closes it."""
MAX_IDLE_CONNECTIONS = 64
DISCONNECTED = "Server disconnected without sending a response."
"""httpcore2's message for a connection that the server closed; others mean an invalid response."""
RETRY_WINDOW_SECONDS = 1.0
"""A server that closes an idle connection just as it is reused shows it within a round trip. What
fails later may have been caused by the request itself and is not repeated."""


class RetryingTransport(httpx2.AsyncBaseTransport):
    """Repeats a request on a new connection if the server had closed the idle one it was sent on.

    Only before a response has begun, and once. A completion changes nothing on the server, so
    repeating it is safe even if the first copy was received.
    """

    def __init__(self) -> None:
        # One context for both pools: reading the system's certificates takes some 10 ms.
        context = httpx2.create_ssl_context(trust_env=False)
        self._pooled = httpx2.AsyncHTTPTransport(
            verify=context,
            limits=httpx2.Limits(
                max_connections=None,
                max_keepalive_connections=MAX_IDLE_CONNECTIONS,
                keepalive_expiry=KEEPALIVE_SECONDS,
            ),
        )
        self._fresh = httpx2.AsyncHTTPTransport(
            verify=context, limits=httpx2.Limits(max_connections=None, max_keepalive_connections=0)
        )

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request, and once more if its connection turns out to be closed.

        Args:
            request: Its body is in memory, so that it can be sent twice.

        Returns:
            The response, whose body has not been read.

        Raises:
            ReadError: The connection failed while the response was read.
            WriteError: The connection failed while the request was sent.
            RemoteProtocolError: The server closed the connection, or what it sent is not HTTP.
        """
        is_new = False

        async def trace(event: str, info: dict[str, Any]) -> None:
            nonlocal is_new
            is_new = is_new or event == "connection.connect_tcp.started"

        request.extensions = {**request.extensions, "trace": trace}
        start = time.monotonic()
        try:
            return await self._pooled.handle_async_request(request)
        except (httpx2.RemoteProtocolError, httpx2.ReadError, httpx2.WriteError) as error:
            was_answered = isinstance(error, httpx2.RemoteProtocolError) and (
                str(error) != DISCONNECTED
            )
            if is_new or was_answered or time.monotonic() - start > RETRY_WINDOW_SECONDS:
                raise
        return await self._fresh.handle_async_request(request)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pooled.aclose()
        await self._fresh.aclose()
