"""An incremental parser of server-sent events.

Source:
    https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6. Only the field
    ``data`` is parsed: OpenAI's servers send no other.
"""

from __future__ import annotations

import re

MAX_EVENT_BYTES = 8_000_000
"""Size of one event; no answer of a language model is larger."""

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Parses bytes, split anywhere, into the data of complete events."""

    def __init__(self) -> None:
        """Start with an empty buffer."""
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """Parse the next bytes.

        Args:
            received: The bytes that follow those of the previous call.

        Returns:
            The data of each event completed by them.

        Raises:
            ValueError: The bytes are not UTF-8, or an event is too large.
        """
        events: list[str] = []
        text = self._rest + received
        start = 0
        for end in _LINE_END.finditer(text):
            # A \r at the very end may be the first half of \r\n.
            if end.group() == b"\r" and end.end() == len(text):
                break
            self._take_line(text[start : end.start()].decode("utf-8"), events)
            start = end.end()
        self._rest = text[start:]
        if len(self._rest) + sum(map(len, self._data)) > MAX_EVENT_BYTES:
            raise ValueError(f"an event of more than {MAX_EVENT_BYTES} bytes")
        return events

    def _take_line(self, line: str, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append("\n".join(self._data))
            self._data = []
            return
        name, _, value = line.partition(":")
        if name == "data":
            self._data.append(value.removeprefix(" "))
