"""How the embedded engine runs a model; the command line is made from the fields."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.config_fields import check_choice, check_least, check_positive, option
from halfbyte.errors import ConfigError
from halfbyte.run_config import ACTIVATIONS, DTYPES, HEAD_BITS

RUNNERS = ("auto", "native", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How the embedded engine runs the model."""

    runner: str = option(
        "auto",
        "what computes: the compiled decoder (native), or the model's own forward (transformers); "
        "auto: native where it can",
        choices=RUNNERS,
    )
    device: str = option("auto", "where to compute: cpu or cuda", metavar="NAME")
    dtype: str = option("auto", "type in which the model computes", choices=DTYPES)
    head_bits: int = option(
        16, "of the output layer; 8 or 4: a rounded copy, which is read faster", choices=HEAD_BITS
    )
    activations: str = option(
        "float",
        "on a CPU: int8 rounds the input of quantized layers, which is less exact, and faster "
        "where there are no matrix units",
        choices=ACTIVATIONS,
    )
    context: int | None = option(
        None,
        "tokens that a request may have, prompt and answer together (default: as many as the model "
        "has positions)",
        metavar="N",
    )
    cache_gb: float | None = option(
        None,
        "memory for keys and values (default: what the requests at the same time need, but at most "
        "half of what is free)",
        metavar="GB",
    )
    sequences: int = option(16, "requests that run at the same time, at most", metavar="N")
    step_tokens: int = option(
        128,
        "tokens that go through the model at once: of long prompts a piece, so that running "
        "answers do not wait for them",
        metavar="N",
    )
    queue: int = option(256, "requests that may wait; more are refused with 429", metavar="N")
    piece_seconds: float = option(
        0.04,
        "between two pieces of an answer, at least: tokens that come faster are sent together, "
        "since each piece takes time from the model; 0: a piece for each token",
        metavar="SECONDS",
    )
    share_prefixes: bool = option(
        True, "keep what prompts begin with, and do not read it again", both=True
    )
    page_tokens: int = 16
    """Tokens whose keys and values are kept, shared and given back together."""

    def __post_init__(self) -> None:
        for name in ("sequences", "step_tokens", "page_tokens"):
            check_least(self, name, 1)
        check_least(self, "queue", 0)
        check_least(self, "context", 2)
        check_positive(self, "cache_gb")
        if not 0 <= self.piece_seconds <= 10:
            raise ConfigError(
                f"piece_seconds is {self.piece_seconds!r}; it must be 0 to 10 seconds."
            )
        if self.page_tokens % 16:
            raise ConfigError(f"page_tokens is {self.page_tokens}; it must be a multiple of 16.")
        if self.step_tokens < self.sequences:
            raise ConfigError(
                f"step_tokens is {self.step_tokens}; it must be as many as sequences "
                f"({self.sequences}) or more, since each of them takes one."
            )
        for name, allowed in (
            ("runner", RUNNERS),
            ("dtype", DTYPES),
            ("head_bits", HEAD_BITS),
            ("activations", ACTIVATIONS),
        ):
            check_choice(self, name, allowed)
