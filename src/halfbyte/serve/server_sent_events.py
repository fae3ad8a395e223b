"""Server-sent events out of bytes, however the network cut them.

Source:
    https://html.spec.whatwg.org/multipage/server-sent-events.html, section 9.2.6; of the fields
    only ``data``, which is all that OpenAI's servers send.
"""

from __future__ import annotations

import re

MOST_BYTES = 8_000_000
"""Of one event; more is no answer of a language model."""

_LINE_END = re.compile(rb"\r\n|\n|\r")


class EventParser:
    """Bytes in, the data of complete events out."""

    def __init__(self) -> None:
        """Start."""
        self._rest = b""
        self._data: list[str] = []

    def feed(self, received: bytes) -> list[str]:
        """Take bytes.

        Args:
            received: What comes next.

        Returns:
            The data of the events that are complete by now.

        Raises:
            ValueError: They are no text in UTF-8, or one event has no end.
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
        if len(self._rest) + sum(map(len, self._data)) > MOST_BYTES:
            raise ValueError(f"an event of more than {MOST_BYTES} bytes")
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
