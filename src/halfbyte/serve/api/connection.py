"""Uvicorn's httptools protocol with additional timeouts and a limit on the size of headers.

Clients of HTTP/1.0 also get streams without chunks, which they do not know.
"""

from __future__ import annotations

import asyncio
from typing import Any

from halfbyte.errors import require_extra

with require_extra("httptools", "serve", "halfbyte serve"):
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

HEAD_BYTES = 65_536
"""Max size of the request line and headers, not counting the packet that they begin in."""
HEAD_SECONDS = 30.0
"""Time in which they must arrive, from the connection or their first byte on."""
REST_SECONDS = 5.0
"""Time for the rest of a body whose request was already answered, with an error."""
READ_SECONDS, READ_BYTES = 30.0, 32_768
"""While the write buffer is full, a client must read this many bytes in this many seconds."""


class Connection(HttpToolsProtocol):
    """Closes connections with oversized or slow headers, endless rejected bodies or no reader."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Pass uvicorn's arguments on."""
        super().__init__(*arguments, **keywords)
        self._head_bytes = 0
        self._is_in_head = False
        self._receive_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the timeout of the first request's headers."""
        super().connection_made(transport)
        self._start_receive_timer(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Cancel all timers."""
        self._end_head()
        self._cancel_write_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data, and limit the size and time of unfinished headers."""
        # A packet may contain the end of one request and the beginning of the next.
        self._head_bytes += len(data) if self._is_in_head else 0
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        if self._head_bytes > HEAD_BYTES:
            self.send_400_response(f"The request's headers have more than {HEAD_BYTES} bytes.")
        elif self._receive_timer is None:
            self._start_receive_timer(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        """Note that headers have begun."""
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        """Note the end of the headers."""
        self._end_head()
        super().on_headers_complete()
        if self.scope["http_version"] == "1.0":
            _send_without_chunks(self.cycle)

    def on_response_complete(self) -> None:
        """Start a timeout for the rest of a body that is no longer needed."""
        super().on_response_complete()
        # Only the last of pipelined requests can have an unfinished body.
        if self.cycle.response_complete and self.cycle.more_body:
            self._start_receive_timer(REST_SECONDS)

    def on_message_complete(self) -> None:
        """Note the end of a body."""
        self._cancel_receive_timer()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Start to check that the client reads."""
        super().pause_writing()
        self._start_write_timer()

    def resume_writing(self) -> None:
        """Stop checking: the client has read."""
        self._cancel_write_timer()
        super().resume_writing()

    def _start_write_timer(self) -> None:
        buffered = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(READ_SECONDS, self._check_reader, buffered)

    def _check_reader(self, buffered_before: int) -> None:
        """Abort if the client has stalled; a slow one may take its time."""
        if buffered_before - self.transport.get_write_buffer_size() < READ_BYTES:
            # close() would wait until the buffer is sent.
            self.transport.abort()
        else:
            self._start_write_timer()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _start_receive_timer(self, seconds: float) -> None:
        self._cancel_receive_timer()
        self._receive_timer = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _end_head(self) -> None:
        self._is_in_head, self._head_bytes = False, 0
        self._cancel_receive_timer()

    def _cancel_receive_timer(self) -> None:
        if self._receive_timer is not None:
            self._receive_timer.cancel()
            self._receive_timer = None


def _send_without_chunks(cycle: RequestResponseCycle) -> None:
    """Let an answer without a length end where uvicorn closes the connection."""
    send = cycle.send

    async def send_plain(message: Any) -> None:
        # Uvicorn counts down to the length that the headers gave.
        cycle.expected_content_length = len(message.get("body", b""))
        await send(message)

    cycle.chunked_encoding = False
    cycle.send = send_plain  # type: ignore[method-assign]
