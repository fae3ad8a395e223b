"""How much clients may ask for at once, all of them and each API key.

Room in the cache is not counted here: the engine hands it out by bytes, to the key that has had
least, and refuses what would wait in too long a line (engine/scheduler.py).
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

from halfbyte.errors import ServeError

MOST_RETRY_SECONDS = 60
_MINUTE = 60.0


@dataclass(slots=True, kw_only=True)
class Limits:
    """Requests at once, of all and of each key, and each key's tokens a minute."""

    most: int
    most_per_key: int
    tokens_per_minute: int | None = None
    refused: Callable[[str], None] = lambda limit: None
    """Told which limit a request was refused for: "requests", "key_requests" or "key_tokens"."""
    running: int = 0
    _of_key: dict[str, int] = field(default_factory=dict)
    _tokens: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    @contextmanager
    def enter(self, key: str) -> Generator[None, None, None]:
        """Count a request while it lasts.

        Args:
            key: Name of its API key.

        Yields:
            Nothing.

        Raises:
            ServeError: 429: there are too many.
        """
        if (refusal := self._find_refusal(key)) is not None:
            limit, error = refusal
            self.refused(limit)
            raise error
        self.running += 1
        self._of_key[key] = self._of_key.get(key, 0) + 1
        try:
            yield
        finally:
            self.running -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]

    def count_tokens(self, key: str, tokens: int) -> None:
        """Put an answer on a key's account.

        Args:
            key: Its name.
            tokens: Of prompt and answer.
        """
        if self.tokens_per_minute is not None:
            self._tokens.setdefault(key, deque()).append((time.monotonic(), tokens))

    def _find_refusal(self, key: str) -> tuple[str, ServeError] | None:
        if self.running >= self.most:
            told = f"The server has {self.running} requests, the most it takes."
            return "requests", _too_many(told, 1)
        if self._of_key.get(key, 0) >= self.most_per_key:
            told = f"This API key has {self._of_key[key]} requests at once, the most it may have."
            return "key_requests", _too_many(told, 1)
        if self.tokens_per_minute is None:
            return None
        spent = self._tokens.get(key, deque())
        now = time.monotonic()
        while spent and spent[0][0] <= now - _MINUTE:
            spent.popleft()
        total = sum(tokens for _, tokens in spent)
        if total < self.tokens_per_minute:
            return None
        told = (
            f"This API key took {total} tokens within the last minute; it may take "
            f"{self.tokens_per_minute}."
        )
        return "key_tokens", _too_many(told, spent[0][0] + _MINUTE - now)


def _too_many(message: str, seconds: float) -> ServeError:
    return ServeError(
        f"{message} Try again later.",
        status=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=float(min(max(1, math.ceil(seconds)), MOST_RETRY_SECONDS)),
    )
