"""What passes between the API and a model: a call in, events out; and what a backend is.

::

    Call ──Backend.stream──> Delta* ──> Finish (one per choice) ──> Usage (last, always)

A backend that fails raises ServeError before the first event or between two; closing its iterator
cancels the work. Nothing here knows HTTP, and nothing but a backend knows tokens.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

Kind = Literal["chat", "completion"]

FinishReason = Literal["stop", "length", "tool_calls", "content_filter"]
"""Those that OpenAI's clients know. A cancelled or late answer is an error, not a reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One request, checked, on its way to a model."""

    kind: Kind
    body: Mapping[str, Any]
    """The request in OpenAI's own form, checked; what the client left out is left out. `stream` and
    `stream_options` mean nothing here: a backend always streams."""
    id: str
    """Of the answer: `chatcmpl-…` or `cmpl-…`."""
    key: str = ""
    """Name (never the secret) of the API key, for fairness and limits; empty: no keys are set."""
    tags: frozenset[str] = frozenset()
    """From the header `X-Halfbyte-Tags` or the body's `metadata`: `critical`, a slice's name."""
    deadline: float | None = None
    """When the answer is no longer wanted; seconds of :func:`time.monotonic`."""

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline; None without one. Below 0 it is over."""
        return None if self.deadline is None else self.deadline - time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """How likely a token was, by the model's own distribution."""

    token: str
    logprob: float
    """Natural."""
    bytes: tuple[int, ...] | None
    """UTF-8 of the token; None where the token is no text of its own."""
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest in its place, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A function that the model wants called; whole, not in pieces."""

    index: int
    id: str
    name: str
    arguments: str
    """JSON, as the model wrote it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the answer took; the last event. Within a Delta: by then."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Of the prompt, found in the cache."""
    reasoning_tokens: int = 0
    """Of the answer, thought before it was given."""
    is_told: bool = True
    """Whether the backend said so. Where it did not, the prompt is unknown, the answer's tokens are
    its pieces, and clients are told nothing rather than something wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """A piece of an answer."""

    choice: int = 0
    text: str = ""
    refusal: str = ""
    """What the model says in place of an answer, where it tells that apart."""
    reasoning: str = ""
    """What it thinks before it answers, where it tells that apart."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """Of the tokens of this piece; None where they were not asked for."""
    tool_calls: tuple[ToolCall, ...] = ()
    entropies: tuple[float, ...] = ()
    """Of the distributions that this piece's tokens were drawn from, in nats; empty where the
    backend cannot tell. For monitors and confidence, never sent to a client."""
    usage: Usage | None = None
    """Of all choices by now, where the call asks for it (`continuous_usage_stats`) and the backend
    can tell."""
    is_last: bool = False
    """Nothing but the end of the whole answer follows, and that at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The end of one choice."""

    choice: int = 0
    reason: FinishReason = "stop"


Event = Delta | Finish | Usage


@dataclass(slots=True, kw_only=True)
class Served:
    """Who answered, and why: filled in on the way, told in the answer's headers."""

    model: str = ""
    backend: str = ""
    reason: str = ""
    """Why it was not the first choice: `critical`, `error`, `timeout`, `check:repetition` …"""
    version: str = ""
    """Of the store, where the model comes from one."""
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How busy a backend is."""

    running: int = 0
    waiting: int = 0
    cache_used_bytes: int = 0
    cache_bytes: int = 0
    """Of keys and values, all in all; 0 where the backend cannot tell."""
    weight_bytes: int = 0


class Backend(Protocol):
    """A model that can be asked, wherever it runs."""

    @property
    def name(self) -> str:
        """For logs and metrics: `embedded`, `vllm`, a host's name. Holds no secret."""

    @property
    def models(self) -> tuple[str, ...]:
        """Names that it answers to, its adapters among them."""

    def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer.

        Args:
            call: What is asked.

        Returns:
            The events, in the order given above. Closing it cancels the work.
        """

    async def is_ready(self) -> bool:
        """Tell whether it could answer now."""

    def load(self) -> Load:
        """Tell how busy it is; at once, without asking anybody."""

    async def close(self) -> None:
        """Finish what runs, take nothing new, free everything."""


@runtime_checkable
class TextTools(Protocol):
    """Tells what a text is in a model's token ids; some backends can."""

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize: with a prompt or messages, checked."""

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /detokenize: with tokens, checked."""
