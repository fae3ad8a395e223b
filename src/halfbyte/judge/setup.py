"""What a comparison asks, of whom, and how: its settings, its questions, its two sides."""

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
"""Tokens of the longest odd input, even where the model takes more: time grows with its square."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig:
    """What is compared and how."""

    margins: Margins = field(default_factory=Margins)
    builtin_items: int = ITEMS_PER_TASK
    """Of each built-in task; only where no task files are given, or asked for beside them."""
    edge_cases: bool = True
    longest_edge: int = LONGEST_EDGE
    window: int = 256
    """Tokens per window of running text."""
    windows: int | None = 20
    """Of each kind of text; None: all."""
    batch_size: int = 8
    """Questions that run together."""
    noise_batch_size: int = 3
    """The same in the base's second run."""
    noise_items: int = 40
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (
            ("batch_size", 1),
            ("noise_batch_size", 1),
            ("longest_edge", 1),
            ("builtin_items", 0),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be {least} or more.")
        if self.windows is not None and self.windows < 1:
            raise ConfigError(
                f"windows is {self.windows}; it must be 1 or more. Leave it out to use all."
            )
        if self.noise_batch_size == self.batch_size:
            object.__setattr__(self, "noise_batch_size", self.batch_size + 1)


@dataclass(slots=True, kw_only=True)
class Work:
    """What both models are asked."""

    questions: list[Question]
    passages: list[Passage]
    edges: list[EdgeCase]
    tokenizer: Any
    notes: list[str]
    dtypes: dict[str, str] = field(default_factory=dict)
    """What each model computed in."""
    unpacked: set[str] = field(default_factory=set)
    """Models whose weights were unpacked to run them."""


@dataclass(slots=True, kw_only=True)
class Side:
    """One model: where it is, and what it answered."""

    name: str
    cache: ModelCache
    files: Mapping[str, str]
    """sha256 by name of the files that its answers depend on; empty for a served model."""
    answers: dict[str, Answer] = field(default_factory=dict)
    edge_answers: list[Answer] = field(default_factory=list)
    edge_finite: list[bool] = field(default_factory=list)
    edge_kl: list[float | None] = field(default_factory=list)
    cost: Cost | None = None

    @property
    def is_local(self) -> bool:
        """Whether it runs in this process, not behind an address."""
        return not is_address(self.name)
