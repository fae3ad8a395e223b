"""What an engine takes and gives: token ids, no text and no HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What the answer must be a sentence of."""

    kind: GrammarKind
    text: str = ""
    """A JSON schema, a regular expression, a JSON list of choices, a Lark grammar; empty for
    json_object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """What is to be generated, and how."""

    prompt: tuple[int, ...]
    """At least one token."""
    max_new_tokens: int
    """0: only the prompt is rated."""
    temperature: float = 1.0
    """0: always the likeliest."""
    top_p: float = 1.0
    top_k: int = 0
    """0: all."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed draws the same tokens, whatever else runs; None: a new one."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    """Beside the model's own end-of-text tokens."""
    ignore_end: bool = False
    """Go on past the model's own end-of-text tokens."""
    top_logprobs: int | None = None
    """None: no logprobs; 0: of the drawn token; k: of the k likeliest as well."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    grammar: Grammar | None = None
    adapter: str | None = None
    """Name of a loaded one; None: the base model."""
    key: str = ""
    """Requests of one key share their turn."""
    deadline: float | None = None
    """Seconds of :func:`time.monotonic`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rated:
    """A token with its likelihood."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The likeliest (token, logprob) in its place, likeliest first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompted:
    """The prompt has been read; the first event."""

    cached_tokens: int = 0
    """Of the prompt, found in the cache."""
    rated: tuple[Rated | None, ...] | None = None
    """The prompt's tokens, the first one None; None where it was not asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """One more token."""

    rated: Rated
    """Its logprob is NaN where none was asked for."""
    entropy: float
    """Of the distribution before penalties and temperature, in nats."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last event."""

    reason: Literal["end", "stop_token", "length", "grammar"]
    """`end`: the model's own end-of-text token, which is not among the generated ones."""
    stop_token: int | None = None


TokenEvent = Prompted | Generated | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What does not change while an engine lives."""

    context: int
    """Tokens that a request may have, prompt and answer together."""
    vocabulary: int
    bytes_per_token: int
    """Of keys and values."""
    cache_bytes: int
    weight_bytes: int
    runner: str
    """Which way the model is computed, and why."""
    planned_bytes: int = 0
    """Of the whole process, or on the GPU: weights, cache, activations and the program itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """How busy it is, and what it has done."""

    running: int
    waiting: int
    cache_used_bytes: int
    prefix_queries: int
    """Prompt tokens looked up in the cache."""
    prefix_hits: int
    restarts: int
    """Of the loop, after a failure."""


class Engine(Protocol):
    """Many requests through one model."""

    @property
    def info(self) -> EngineInfo:
        """Its limits."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that are loaded."""

    def generate(self, request: TokenRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Generate. Closing the iterator cancels and frees the cache.

        Args:
            request: Checked against :attr:`info` before anything is queued.

        Returns:
            Prompted, then Generated for each token, then Ended; each time as many of them as have
            come since. It raises ServeError: 400 for what the request is to blame for, 408 past its
            deadline, 503 where the engine failed.
        """

    def load(self) -> EngineLoad:
        """Tell how busy it is."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Make a PEFT adapter servable under a name. The caller has checked the folder's place."""

    async def unload_adapter(self, name: str) -> None:
        """Take it away; requests that use it finish first."""

    async def close(self) -> None:
        """Drain and free."""
