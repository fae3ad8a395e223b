"""Stop strings, also where tokens cut them in two; no part of one is let out."""

from __future__ import annotations

from collections.abc import Sequence


class StopFilter:
    """Text in, text before the first stop string out."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Start.

        Args:
            stops: None of them empty; none at all lets everything through at once.
        """
        self._stops = tuple(stops)
        self._held = ""
        self.hit = False
        """A stop string has come; nothing comes out any more."""

    def feed(self, text: str) -> str:
        """Take text.

        Args:
            text: What comes next.

        Returns:
            What is certain not to belong to a stop string.
        """
        if self.hit:
            return ""
        held = self._held + text
        found = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if found:
            self.hit = True
            self._held = ""
            return held[: min(found)]
        keep = longest_start(held, self._stops)
        self._held = held[len(held) - keep :]
        return held[: len(held) - keep]

    def finish(self) -> str:
        """Give what was held back: no stop string came of it."""
        held, self._held = self._held, ""
        return held


def longest_start(text: str, words: Sequence[str]) -> int:
    """Measure how much of a text's end could be the start of a word.

    Args:
        text: Any.
        words: None of them stands in the text whole.

    Returns:
        Characters at the end of the text that a word starts with; 0 where none does.
    """
    longest = max(map(len, words), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        end = text[-length:]
        if any(word.startswith(end) for word in words):
            return length
    return 0
