"""Limits on concurrent requests, in total and per API key, and on tokens per minute and key.

Cache space is not limited here: the engine assigns it to the key that has used the least so far,
and rejects requests when its queue is full (engine/scheduler.py).
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

MAX_RETRY_SECONDS = 60
_MINUTE = 60.0


@dataclass(slots=True)
class Tally:
    """Counts the tokens of one request while its answer arrives."""

    prompt: int
    """Estimated tokens of the prompt; the exact number arrives with Usage, the last event."""
    _answer: int = 0
    _usage: Usage | None = None

    def note(self, event: Event) -> None:
        """Count an event."""
        if type(event) is Delta:
            self._answer += len(event.entropies) or len(event.logprobs or ()) or 1
        elif type(event) is Usage:
            self._usage = event

    @property
    def has_begun(self) -> bool:
        """Whether any event has arrived."""
        return self._usage is not None or self._answer > 0

    @property
    def tokens(self) -> int:
        """Tokens of prompt and answer so far."""
        usage = self._usage
        if usage is None:
            return self.prompt + self._answer
        prompt = usage.prompt_tokens if usage.is_reported else self.prompt
        return prompt + usage.completion_tokens


@dataclass(slots=True, kw_only=True)
class Limits:
    """Limits concurrent requests, in total and per key, and each key's tokens per minute."""

    max_requests: int
    max_requests_per_key: int
    tokens_per_minute: int | None = None
    on_rejection: Callable[[str], None] = lambda limit: None
    """Called with the exceeded limit: "requests", "key_requests" or "key_tokens"."""
    running: int = 0
    _running_per_key: dict[str, int] = field(default_factory=dict)
    _tokens: dict[str, deque[tuple[float, int]]] = field(default_factory=dict)

    @contextmanager
    def enter(self, key: str, *, prompt: int = 0) -> Generator[Tally, None, None]:
        """Count a request as running, and charge its tokens to its key when it ends in any way.

        Args:
            key: Name of its API key.
            prompt: Estimated tokens of its prompt, used if the backend does not report them.

        Yields:
            The tally to pass the answer's events to.

        Raises:
            ServeError: 429 if a limit is exceeded.
        """
        if (rejection := self._check(key)) is not None:
            limit, error = rejection
            self.on_rejection(limit)
            raise error
        self.running += 1
        self._running_per_key[key] = self._running_per_key.get(key, 0) + 1
        tally = Tally(prompt)
        try:
            yield tally
        except ServeError:
            # A request that failed before its first event is not charged.
            if not tally.has_begun:
                tally.prompt = 0
            raise
        finally:
            self._charge(key, tally.tokens)
            self.running -= 1
            self._running_per_key[key] -= 1
            if not self._running_per_key[key]:
                del self._running_per_key[key]

    def _charge(self, key: str, tokens: int) -> None:
        """Count tokens against a key's limit per minute."""
        if self.tokens_per_minute is not None and tokens:
            self._tokens.setdefault(key, deque()).append((time.monotonic(), tokens))

    def _check(self, key: str) -> tuple[str, ServeError] | None:
        """Return the exceeded limit and its error, or None."""
        if self.running >= self.max_requests:
            message = f"The server has {self.running} running requests, its maximum."
            return "requests", _too_many(message, 1)
        running = self._running_per_key.get(key, 0)
        if running >= self.max_requests_per_key:
            message = f"This API key has {running} running requests, its maximum."
            return "key_requests", _too_many(message, 1)
        if self.tokens_per_minute is None:
            return None
        spent = self._tokens.get(key, deque())
        now = time.monotonic()
        while spent and spent[0][0] <= now - _MINUTE:
            spent.popleft()
        total = sum(tokens for _, tokens in spent)
        if total < self.tokens_per_minute:
            return None
        message = (
            f"This API key used {total} tokens within the last minute; its limit is "
            f"{self.tokens_per_minute}."
        )
        return "key_tokens", _too_many(message, spent[0][0] + _MINUTE - now)


def _too_many(message: str, seconds: float) -> ServeError:
    return ServeError(
        f"{message} Try again later.",
        status=429,
        kind="rate_limit_error",
        code="rate_limit_exceeded",
        retry_after=float(min(max(1, math.ceil(seconds)), MAX_RETRY_SECONDS)),
    )
