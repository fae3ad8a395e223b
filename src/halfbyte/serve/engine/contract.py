"""The engine's interface: requests and events on token ids, without text or HTTP."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

GrammarKind = Literal["json_object", "json_schema", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """A constraint on the answer."""

    kind: GrammarKind
    text: str = ""
    """A JSON schema, a regular expression, a JSON list of choices or a Lark grammar; empty for
    json_object."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRequest:
    """A prompt and sampling parameters."""

    prompt: tuple[int, ...]
    """At least one token."""
    max_new_tokens: int
    """0 only scores the prompt."""
    temperature: float = 1.0
    """0 is greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    """0 for no limit."""
    min_p: float = 0.0
    seed: int | None = None
    """The same seed gives the same tokens, whatever else is in the batch; None for a random one."""
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop_tokens: frozenset[int] = frozenset()
    """In addition to the model's end-of-text tokens."""
    ignore_end: bool = False
    """Whether to continue after the model's end-of-text tokens."""
    top_logprobs: int | None = None
    """None for no logprobs, 0 for that of the drawn token, k to add the k most likely tokens."""
    prompt_logprobs: int | None = None
    """The same for the prompt's tokens."""
    grammar: Grammar | None = None
    adapter: str | None = None
    """Name of a loaded adapter; None for the base model."""
    key: str = ""
    """The client's key; scheduling is fair between keys."""
    deadline: float | None = None
    """Time of :func:`time.monotonic`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredToken:
    """A token with its log probability."""

    token: int
    logprob: float
    """NaN if not requested."""
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token, logprob) at this position, most likely first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefilled:
    """The first event: the prompt has been processed."""

    cached_tokens: int = 0
    """Prompt tokens found in the prefix cache."""
    scored_prompt: tuple[ScoredToken | None, ...] | None = None
    """The prompt's tokens, None for the first; None as a whole unless requested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """A generated token."""

    scored: ScoredToken
    entropy: float
    """Entropy in nats of the distribution before penalties and temperature."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """The last event."""

    reason: Literal["end", "stop_token", "length", "grammar"]
    """`end` is the model's end-of-text token, which is not among the generated tokens."""
    stop_token: int | None = None


TokenEvent = Prefilled | Generated | Ended


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """Constant properties of an engine."""

    context: int
    """Max tokens of a request, prompt and answer together."""
    vocabulary: int
    bytes_per_token: int
    """Size of a token's keys and values."""
    cache_bytes: int
    weight_bytes: int
    runner: str
    """How the model is computed and why, for people."""
    planned_bytes: int = 0
    """Memory of the whole process, or on the GPU: weights, KV cache, activations and program."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """Current load and counters of an engine."""

    running: int
    waiting: int
    cache_used_bytes: int
    restarts: int
    """Recoveries from failed steps."""


class Engine(Protocol):
    """Generates tokens for many concurrent requests with one model."""

    @property
    def info(self) -> EngineInfo:
        """The engine's limits."""

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""

    def generate(self, request: TokenRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Generate. Closing the iterator cancels the request and frees its cache.

        Args:
            request: Validated against :attr:`info` before it is queued.

        Returns:
            Batches of the events that have arrived since the last batch: Prefilled, then Generated
            for each token, then Ended. Iteration raises ServeError: 400 for an invalid request, 408
            after its deadline, 503 if the engine failed.
        """

    def load(self) -> EngineLoad:
        """Return how busy it is."""

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter; the caller has checked that the folder may be loaded."""

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter after the requests that use it have finished."""

    async def close(self) -> None:
        """Finish the running requests and free all memory."""
