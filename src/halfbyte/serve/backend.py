"""The interface between the API and a model: Call in, events out, and the Backend protocol.

::

    Call ──Backend.stream──> Delta* ──> Finish (one per choice) ──> Usage (last, always)

A failing backend raises ServeError before the first event or between two events. Closing its
iterator cancels the work. This module knows nothing of HTTP, and only backends know tokens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Kind = Literal["chat", "completion"]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""OpenAI's values. A cancelled answer or a timeout is an error, not a finish reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One validated request."""

    kind: Kind
    body: Mapping[str, Any]
    """The request in OpenAI's format, validated, without fields that the client did not set. A
    backend ignores `stream` and `stream_options`: it always streams."""
    id: str
    """Id of the answer: `chatcmpl-…` or `cmpl-…`."""
    key: str = ""
    """Name (never the secret) of the API key, for fairness and limits; empty if no keys are set."""
    tags: frozenset[str] = frozenset()
    """From the header `X-Halfbyte-Tags` or the body's `metadata`: `critical`, a slice's name."""
    deadline: float | None = None
    """Time of :func:`time.monotonic` after which the answer is useless."""

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the deadline, negative after it; None without a deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token's log probability under the model's own distribution."""

    token: str
    logprob: float
    """Natural logarithm."""
    bytes: tuple[int, ...] | None
    """UTF-8 bytes of the token; None if unknown."""
    top: tuple[TokenLogprob, ...] = ()
    """The most likely tokens at this position, most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A complete function call made by the model."""

    index: int
    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Token counts of an answer: the last event, or within a Delta the counts so far."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    reasoning_tokens: int = 0
    """Answer tokens spent on reasoning."""
    is_reported: bool = True
    """Whether the backend reported the counts. If not, the prompt's length is unknown, each piece
    counts as one answer token, and clients get no usage rather than a wrong one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer."""

    choice: int = 0
    text: str = ""
    refusal: str = ""
    """A refusal, if the backend separates it from the answer."""
    reasoning: str = ""
    """Reasoning before the answer, if the backend separates it from the answer."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per token of this piece; None unless requested."""
    tool_calls: tuple[ToolCall, ...] = ()
    entropies: tuple[float, ...] = ()
    """Entropy in nats of the distribution that each token of this piece was drawn from; empty if
    the backend does not provide it. For monitors and confidence, never sent to a client."""
    usage: Usage | None = None
    """Counts so far over all choices, if the call requests them (`continuous_usage_stats`) and the
    backend provides them."""
    is_last: bool = False
    """Whether only Finish and Usage follow, immediately."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice."""

    choice: int = 0
    reason: FinishReason = "stop"


Event = Delta | Finish | Usage


@dataclass(slots=True, kw_only=True)
class Served:
    """Which model answered and why; the router fills it in, the response headers report it."""

    model: str = ""
    backend: str = ""
    reason: str = ""
    """Why the primary model did not answer: `critical`, `error`, `timeout`, `check:repetition` …"""
    version: str = ""
    """Version in the model store, if the model comes from one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a backend is."""

    running: int = 0
    waiting: int = 0
    cache_used_bytes: int = 0
    cache_bytes: int = 0
    """Size of the KV cache; 0 if unknown."""
    weight_bytes: int = 0


class Backend(Protocol):
    """A model that answers calls, wherever it runs."""

    @property
    def name(self) -> str:
        """Name in logs and metrics: `embedded`, `vllm`, a host name. Contains no secret."""

    @property
    def models(self) -> tuple[str, ...]:
        """Model names that it serves, including its adapters."""

    def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer a call.

        Args:
            call: The request.

        Returns:
            The events, in the order given in the module's docstring. Closing the iterator cancels
            the work.
        """

    async def is_ready(self) -> bool:
        """Return whether it can answer now."""

    def load(self) -> Load:
        """Return how busy it is, immediately and without I/O."""

    async def close(self) -> None:
        """Accept no new calls, finish the running ones and free all resources."""


@runtime_checkable
class TextTools(Protocol):
    """A backend that also answers /tokenize and /detokenize."""

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize; the validated body contains a prompt or messages."""

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /detokenize; the validated body contains tokens."""
