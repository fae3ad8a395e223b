"""The result of a comparison: everything that the reports show, and nothing that runs."""

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
    """One item on which the two models part."""

    name: str
    kind: str
    """"harmful", "beneficial", or "same" where both are right or both wrong."""
    prompt: str
    expected: str
    base_text: str
    candidate_text: str
    first_difference: int | None
    """Number of the first generated token that differs, from 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WrittenItem:
    """One item that both models wrote an answer to: how sure the candidate was, who was right.

    `halfbyte serve` takes from these what answers usually are like, and from what confidence on a
    larger model should be asked.
    """

    name: str
    document: str
    base_right: bool
    candidate_right: bool
    candidate_text: str
    candidate_logprobs: tuple[float, ...]
    """Of the written tokens, in nats; empty for a served candidate."""
    candidate_entropies: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """How far both models write the same, over the items that they write answers to."""

    num_items: int
    identical: int
    median_first_difference: float | None
    """Tokens that are the same before the first other one, over the items that differ."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoiseFloor:
    """The base against itself at another batch size: what is not the candidate's doing."""

    num_items: int
    identical_texts: int
    flips: Flips
    batch_size: int
    """Of the second run."""
    kl_nats: float | None
    kl_largest: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What running one model took."""

    name: str
    seconds: float
    """Wall time of its answers and predictions; those found in the cache take none."""
    tokens: int
    """Prompt and text tokens that it ran in that time, each counted once."""
    reused: int
    """Answers and predictions that were in the cache already."""
    weight_bytes: int | None = None
    """Of its weight files; None where it was not run in this process."""
    peak_memory_bytes: int | None = None
    """Largest size of this process during its run."""
    planned_bytes: int | None = None
    """What the plan says for its largest batch, or longest text, in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """May the candidate replace the base, and on what evidence."""

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
    """What was left out or cut short, and why."""
    settings: Mapping[str, Any]
    items: tuple[WrittenItem, ...] = ()
    """Those with written answers; of use to machines, shown in no page."""
    base_files: Mapping[str, str] = field(default_factory=dict)
    """sha256 by name of the files that its answers depend on; empty for a served model."""
    candidate_files: Mapping[str, str] = field(default_factory=dict)
    """The same: by these a verdict is tied to a version of the store."""
    versions: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON; the verdict first."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "outcome": self.verdict.outcome.value,
            "exit_code": self.verdict.exit_code,
            **values,
        }
