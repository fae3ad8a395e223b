"""One connection's HTTP: uvicorn's way through httptools, with the limits that it lacks."""

from __future__ import annotations

import asyncio
from typing import Any

from halfbyte.errors import require_extra

with require_extra("httptools", "serve", "halfbyte serve"):
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES = 65_536
"""That a request's line and headers may have, beside the packet that they begin in."""
HEAD_SECONDS = 30.0
"""That they may take to arrive, from the connection or their first byte on."""
REST_SECONDS = 5.0
"""That the rest of a body may take, when its request is answered already: it was refused."""
READ_SECONDS, READ_BYTES = 30.0, 32_768
"""So many bytes a client must read in so many seconds, while its connection holds too much."""


class Connection(HttpToolsProtocol):
    """Ends where a head is too long or does not come, a refused body goes on, or nobody reads."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        """Take what uvicorn gives."""
        super().__init__(*arguments, **keywords)
        self._head_bytes = 0
        self._is_in_head = False
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for the first head."""
        super().connection_made(transport)
        self._wait(HEAD_SECONDS)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting."""
        self._end_head()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read on, and see how much of a head there is that has no end yet."""
        # The beginning of one may share its packet with the end of a request before it.
        self._head_bytes += len(data) if self._is_in_head else 0
        super().data_received(data)
        if not self._is_in_head or self.transport.is_closing():
            return
        if self._head_bytes > HEAD_BYTES:
            self.send_400_response(f"The request's head has more than {HEAD_BYTES} bytes.")
        elif self._late is None:
            self._wait(HEAD_SECONDS)

    def on_message_begin(self) -> None:
        """Note that a head has begun."""
        super().on_message_begin()
        self._is_in_head = True

    def on_headers_complete(self) -> None:
        """Note its end."""
        self._end_head()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        """Wait for the rest of a body that nobody wants; else it might go on for ever."""
        super().on_response_complete()
        # Of requests in a row, the last one: a body can come of no other.
        if self.cycle.response_complete and self.cycle.more_body:
            self._wait(REST_SECONDS)

    def on_message_complete(self) -> None:
        """Note the end of a body."""
        self._stop_waiting()
        super().on_message_complete()

    def pause_writing(self) -> None:
        """Begin to wait for the client to read."""
        super().pause_writing()
        self._wait_for_reader()

    def resume_writing(self) -> None:
        """Note that it has."""
        self._stop_waiting_for_reader()
        super().resume_writing()

    def _wait_for_reader(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._unread = self.loop.call_later(READ_SECONDS, self._look_at_reader, waiting)

    def _look_at_reader(self, before: int) -> None:
        """Go on where it reads: a large answer on a slow line takes its time."""
        if before - self.transport.get_write_buffer_size() < READ_BYTES:
            # To close it would first send what nobody reads.
            self.transport.abort()
        else:
            self._wait_for_reader()

    def _stop_waiting_for_reader(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._late = self.loop.call_later(seconds, self.timeout_keep_alive_handler)

    def _end_head(self) -> None:
        self._is_in_head, self._head_bytes = False, 0
        self._stop_waiting()

    def _stop_waiting(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
