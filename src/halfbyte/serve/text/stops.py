"""Stop strings, also across token boundaries; no part of a stop string is released."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Passes on streamed text up to the first stop string."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Set the stop strings.

        Args:
            stops: Non-empty strings; without any, all text passes at once.
        """
        self._stops = tuple(stops)
        self._buffer = ""
        self.hit = False
        """Whether a stop string was found; all further text is dropped."""

    def feed(self, text: str) -> str:
        """Process the next text.

        Args:
            text: The text.

        Returns:
            The text that is certain not to belong to a stop string.
        """
        if self.hit:
            return ""
        buffer = self._buffer + text
        found = [index for stop in self._stops if (index := buffer.find(stop)) >= 0]
        if found:
            self.hit = True
            self._buffer = ""
            return buffer[: min(found)]
        end = len(buffer) - count_partial_match(buffer, self._stops)
        self._buffer = buffer[end:]
        return buffer[:end]

    def finish(self) -> str:
        """Return the buffered text: it did not become a stop string."""
        buffer, self._buffer = self._buffer, ""
        return buffer


def count_partial_match(text: str, words: Sequence[str]) -> int:
    """Count the characters at the end of a text that could be the beginning of a word.

    Args:
        text: The text.
        words: Words that the text does not contain.

    Returns:
        Length of the longest suffix of the text that is a prefix of a word.
    """
    longest = max(map(len, words), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        suffix = text[-length:]
        if any(word.startswith(suffix) for word in words):
            return length
    return 0
