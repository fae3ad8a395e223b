"""Settings, workload and the two sides of a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.judge.answers import Answer
from halfbyte.judge.builtin_tasks import ITEMS_PER_TASK
from halfbyte.judge.comparison import Cost
from halfbyte.judge.edge_cases import EdgeCase
from halfbyte.judge.model_cache import ModelCache
from halfbyte.judge.questions import Passage, Question
from halfbyte.judge.remote_model import is_address
from halfbyte.judge.verdict import Margins

LONGEST_EDGE = 8192
"""Tokens of the longest edge case, even if the model takes more: time grows quadratically."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """Settings of a comparison."""

    margins: Margins = field(default_factory=Margins)
    builtin_items: int = ITEMS_PER_TASK
    """Of each built-in task; used if there are no task files, or if requested in addition."""
    edge_cases: bool = True
    longest_edge: int = LONGEST_EDGE
    window: int = 256
    """Tokens per window of running text."""
    windows: int | None = 20
    """Windows of each kind of text; None: all."""
    batch_size: int = 8
    """Questions per batch."""
    noise_batch_size: int = 3
    """Questions per batch in the base's second run, which measures the noise floor."""
    noise_items: int = 40
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, minimum in (
            ("batch_size", 1),
            ("noise_batch_size", 1),
            ("longest_edge", 1),
            ("builtin_items", 0),
        ):
            if getattr(self, name) < minimum:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {minimum} or more.")
        if self.windows is not None and self.windows < 1:
            raise ConfigError(
                f"windows is {self.windows}; it must be 1 or more. Leave it out to use all."
            )
        if self.noise_batch_size == self.batch_size:
            object.__setattr__(self, "noise_batch_size", self.batch_size + 1)


@dataclass(slots=True, kw_only=True)
class Workload:
    """Everything that both models run, as token ids."""

    questions: list[Question]
    passages: list[Passage]
    edges: list[EdgeCase]
    tokenizer: Any
    notes: list[str]
    """For the report: what was left out or changed, and why."""
    dtypes: dict[str, str] = field(default_factory=dict)
    """Compute dtype by model."""
    unpacked: set[str] = field(default_factory=set)
    """Models whose quantized weights were dequantized to run them."""


@dataclass(slots=True, kw_only=True)
class Side:
    """One of the two models: its location, its cache and its answers."""

    name: str
    cache: ModelCache
    files: Mapping[str, str]
    """SHA-256 by name of the files that its answers depend on; empty for a served model."""
    answers: dict[str, Answer] = field(default_factory=dict)
    edge_answers: list[Answer] = field(default_factory=list)
    edge_finite: list[bool] = field(default_factory=list)
    """Per edge case: whether the logits of the prompt are finite."""
    edge_kl: list[float | None] = field(default_factory=list)
    """Per edge case: mean KL divergence from the base over the prompt's last tokens, in nats."""
    cost: Cost | None = None

    @property
    def is_local(self) -> bool:
        """Whether it runs in this process instead of behind a server."""
        return not is_address(self.name)
