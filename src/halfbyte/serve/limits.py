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
from halfbyte.serve.backend import Delta, Event, Usage

MOST_RETRY_SECONDS = 60
_MINUTE = 60.0


@dataclass(slots=True)
class Tally:
    """What one request takes, as far as its answer has come."""

    prompt: int
    """Tokens of the prompt, roughly; how many they were is told last."""
    _answer: int = 0
    _usage: Usage | None = None

    def note(self, event: Event) -> None:
        """Take an event in."""
        if type(event) is Delta:
            self._answer += len(event.entropies) or len(event.logprobs or ()) or 1
        elif type(event) is Usage:
            self._usage = event

    @property
    def has_begun(self) -> bool:
        """Whether anything came."""
        return self._usage is not None or self._answer > 0

    @property
    def tokens(self) -> int:
        """By now."""
        told = self._usage
        if told is None or not told.is_told:
            return self.prompt + (self._answer if told is None else told.completion_tokens)
        return told.prompt_tokens + told.completion_tokens


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
    def enter(self, key: str, *, prompt: int = 0) -> Generator[Tally, None, None]:
        """Count a request while it lasts, and what it took on its key's account, however it ends.

        Args:
            key: Name of its API key.
            prompt: About how many tokens its prompt has, for where nobody tells.

        Yields:
            What is to be told of its answer.

        Raises:
            ServeError: 429: there are too many.
        """
        if (refusal := self._find_refusal(key)) is not None:
            limit, error = refusal
            self.refused(limit)
            raise error
        self.running += 1
        self._of_key[key] = self._of_key.get(key, 0) + 1
        tally = Tally(prompt)
        try:
            yield tally
        except ServeError:
            # What was refused took nothing.
            if not tally.has_begun:
                tally.prompt = 0
            raise
        finally:
            self._count_tokens(key, tally.tokens)
            self.running -= 1
            self._of_key[key] -= 1
            if not self._of_key[key]:
                del self._of_key[key]

    def _count_tokens(self, key: str, tokens: int) -> None:
        """Put an answer on a key's account."""
        if self.tokens_per_minute is not None and tokens:
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
