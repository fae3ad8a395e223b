"""The result of a comparison: plain data, from which all reports are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from halfbyte.judge.edge_cases import EdgeKind, EdgeOutcome
from halfbyte.judge.fidelity import TextFidelity
from halfbyte.judge.layers import LayerErrors
from halfbyte.judge.statistics import Flips
from halfbyte.judge.verdict import Margins, SliceResult, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One item on which the models' answers differ."""

    name: str
    kind: str
    """"harmful", "beneficial", or "same" where both are right or both wrong."""
    prompt: str
    expected: str
    base_text: str
    candidate_text: str
    first_difference: int | None
    """Index of the first generated token that differs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenItem:
    """One item with generated answers: which model was right, and the candidate's confidence.

    ``halfbyte serve`` uses these as a reference for drift monitoring and to calibrate the
    confidence below which it falls back to a larger model.
    """

    name: str
    document: str
    base_right: bool
    candidate_right: bool
    candidate_text: str
    candidate_logprobs: tuple[float, ...]
    """Of the generated tokens, in nats; empty for a served candidate."""
    candidate_entropies: tuple[float, ...]
    """Of the predicted distributions, in nats; empty for a served candidate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How often both models generate the same text, over the items without choices."""

    num_items: int
    identical: int
    median_first_difference: float | None
    """Equal tokens before the first difference; median over the items that differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """The base against itself at another batch size: differences not caused by the candidate."""

    num_items: int
    identical_texts: int
    flips: Flips
    batch_size: int
    """Of the second run."""
    kl_nats: float | None
    kl_largest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Time and memory of one model's run."""

    name: str
    seconds: float
    """Wall time of its answers and predictions, without those found in the cache."""
    tokens: int
    """Tokens of prompts and texts run in that time."""
    reused: int
    """Answers taken from the cache."""
    weight_bytes: int | None = None
    """Size of its weight files; None if it did not run in this process."""
    peak_memory_bytes: int | None = None
    """Peak memory during its run: resident memory of the process, or use of the GPU."""
    planned_bytes: int | None = None
    """Planned memory of its largest batch or longest text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The verdict on whether the candidate may replace the base, with all evidence."""

    base: str
    candidate: str
    verdict: Verdict
    margins: Margins
    overall: SliceResult | None
    slices: tuple[SliceResult, ...]
    text: TextFidelity | None
    generation: Generation | None
    edge_kinds: tuple[EdgeKind, ...]
    edge_outcomes: tuple[EdgeOutcome, ...]
    edges: SliceResult | None
    layers: LayerErrors | None
    noise: NoiseFloor | None
    examples: tuple[Example, ...]
    costs: tuple[Cost, ...]
    notes: tuple[str, ...]
    """What was left out or shortened, and why."""
    settings: Mapping[str, Any]
    items: tuple[WrittenItem, ...] = ()
    """Items with generated answers; only in the JSON report, for programs."""
    base_files: Mapping[str, str] = field(default_factory=dict)
    """SHA-256 by name of the files that its answers depend on; empty for a served model."""
    candidate_files: Mapping[str, str] = field(default_factory=dict)
    """The same for the candidate; ties a verdict to a version in the store."""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, the verdict first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "outcome": self.verdict.outcome.value,
            "exit_code": self.verdict.exit_code,
            **values,
        }
