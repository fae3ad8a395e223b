"""Configuration of the embedded engine; the command-line options are generated from its fields."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.config_fields import check_choice, check_least, check_positive, option
from halfbyte.errors import ConfigError
from halfbyte.run_config import ACTIVATIONS, DTYPES, HEAD_BITS

RUNNERS = ("auto", "native", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Settings of the embedded engine."""

    runner: str = option(
        "auto",
        "native: the compiled decoder; transformers: the model's own forward; auto: native if it "
        "supports the model",
        choices=RUNNERS,
    )
    device: str = option("auto", "device to compute on: cpu or cuda", metavar="NAME")
    dtype: str = option("auto", "data type to compute in", choices=DTYPES)
    head_bits: int = option(
        16,
        "bits of the output layer; 8 or 4 use a rounded copy, which is read faster",
        choices=HEAD_BITS,
    )
    activations: str = option(
        "float",
        "on a CPU: int8 rounds the inputs of quantized layers, which is less accurate but faster "
        "on CPUs without matrix units",
        choices=ACTIVATIONS,
    )
    context: int | None = option(
        None,
        "max tokens per request, prompt and answer together (default: the model's maximum)",
        metavar="N",
    )
    cache_gb: float | None = option(
        None,
        "size of the KV cache (default: enough for all concurrent requests, but at most half of "
        "the free memory)",
        metavar="GB",
    )
    max_sequences: int = option(16, "max requests in a batch", metavar="N")
    max_batched_tokens: int = option(
        128,
        "max tokens per step; longer prompts are prefilled in chunks, so that running answers do "
        "not stall",
        metavar="N",
    )
    max_queue: int = option(
        256, "max queued requests; further ones are rejected with 429", metavar="N"
    )
    chunk_interval: float = option(
        0.04,
        "min time between two pieces of a streamed answer: faster tokens are sent together, "
        "because each piece slows the model down; 0 sends each token separately",
        metavar="SECONDS",
    )
    share_prefixes: bool = option(
        True,
        "cache the keys and values of prompt prefixes and reuse them for the same API key",
        both=True,
    )
    page_tokens: int = 16
    """Tokens per page of the KV cache."""

    def __post_init__(self) -> None:
        for name in ("max_sequences", "max_batched_tokens", "page_tokens"):
            check_least(self, name, 1)
        check_least(self, "max_queue", 0)
        check_least(self, "context", 2)
        check_positive(self, "cache_gb")
        if not 0 <= self.chunk_interval <= 10:
            raise ConfigError(
                f"chunk_interval is {self.chunk_interval!r}; it must be from 0 to 10 seconds."
            )
        if self.page_tokens % 16:
            raise ConfigError(f"page_tokens is {self.page_tokens}; it must be a multiple of 16.")
        if self.max_batched_tokens < self.max_sequences:
            raise ConfigError(
                f"max_batched_tokens is {self.max_batched_tokens}; it must be at least "
                f"max_sequences ({self.max_sequences}), because each running sequence needs one "
                "token per step."
            )
        for name, allowed in (
            ("runner", RUNNERS),
            ("dtype", DTYPES),
            ("head_bits", HEAD_BITS),
            ("activations", ACTIVATIONS),
        ):
            check_choice(self, name, allowed)
