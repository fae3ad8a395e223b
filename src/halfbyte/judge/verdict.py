"""Decides pass, fail or inconclusive, with bounded error probabilities.

Every *claim* is one requirement, with the evidence and its own outcome. The candidate

- **passes** if accuracy over all items and perplexity are each shown to lose less than their
  margin, at level alpha, and no other claim fails or is open: a candidate that truly loses more
  than one of these margins passes with a probability of at most alpha;
- **fails** if a loss beyond a margin is shown for any claim: these tests are adjusted together
  (Holm), so a candidate within every margin fails with a probability of at most alpha;
- is **inconclusive** otherwise, with the number of items that would be enough.

KL divergence does not affect the verdict: between models that are both close to the base it does
not predict which one is worse at tasks (arXiv 2606.19558).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from halfbyte.errors import ConfigError
from halfbyte.judge.fidelity import TextFidelity
from halfbyte.judge.layers import LayerErrors
from halfbyte.judge.questions import STRETCH_TOKENS
from halfbyte.judge.statistics import (
    MIN_DOCUMENTS,
    Flips,
    Interval,
    adjust_holm,
    difference_interval,
    harm_p_value,
    items_needed,
    mcnemar_p_value,
    noninferiority_p_value,
    passing_power,
)

MIN_ITEMS = 10
"""A slice with fewer items is reported but not tested."""


class Outcome(StrEnum):
    """Outcome of a verdict or of a single claim."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


EXIT_CODES = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Allowed losses of a candidate, and the level of the tests."""

    accuracy: float = 0.02
    """Loss of accuracy over all items: 0.02 is two points."""
    slices: float = 0.10
    """Loss of accuracy within one slice, and of answers to edge cases without an issue."""
    perplexity: float = 0.10
    """Relative increase of perplexity on running text: 0.10 is 10%."""
    alpha: float = 0.05
    """Upper bound on the probability of a wrong pass, and of a wrong fail."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "slices", "perplexity"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(
                    f"The margin of {name} is {value}; it must be at least 0 and below 1. "
                    "0.02 is two points."
                )
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha is {self.alpha}; it must be between 0 and 0.5, such as 0.05.")

    @property
    def confidence(self) -> float:
        """Confidence level of the two-sided intervals whose ends are the bounds of the tests."""
        return 1 - 2 * self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceResult:
    """Both models on one slice of the items, or on all of them."""

    name: str
    flips: Flips
    base_accuracy: float
    candidate_accuracy: float
    interval: Interval
    """Confidence interval of the difference in accuracy."""
    mcnemar_p: float
    """Two-sided exact p-value of McNemar's test for any difference."""
    tested: bool
    """Whether the slice has enough items to be tested."""
    harm_p: float | None = None
    """P-value of a loss beyond the margin, adjusted for all tests. None: not tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One requirement for a pass, with its outcome."""

    name: str
    outcome: Outcome
    found: str
    """The evidence, in words and numbers."""
    advice: str = ""
    """What to do if the outcome is open; empty if it is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether the candidate may replace the base."""

    outcome: Outcome
    sentence: str
    """The verdict and its reason in one sentence."""
    claims: tuple[Claim, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 inconclusive."""
        return EXIT_CODES[self.outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Measurements that a verdict is based on; None if not measured."""

    overall: SliceResult | None = None
    slices: tuple[SliceResult, ...] = ()
    edges: SliceResult | None = None
    text: TextFidelity | None = None
    layers: LayerErrors | None = None
    num_nonfinite: int = 0
    """Answers at which only the candidate has non-finite logits."""


def measure_slice(name: str, flips: Flips, base_right: int, margins: Margins) -> SliceResult:
    """Describe both models on one slice.

    Args:
        name: Name of the slice.
        flips: The observed flips.
        base_right: Number of items that the base gets right.
        margins: Source of the interval's confidence level.

    Returns:
        The slice, without ``harm_p``, which :func:`decide` adds.
    """
    return SliceResult(
        name=name,
        flips=flips,
        base_accuracy=base_right / flips.num_items,
        candidate_accuracy=(base_right - flips.harmful + flips.beneficial) / flips.num_items,
        interval=difference_interval(flips, margins.confidence),
        mcnemar_p=mcnemar_p_value(flips.harmful, flips.beneficial),
        tested=flips.num_items >= MIN_ITEMS,
    )


def decide(evidence: Evidence, margins: Margins) -> tuple[Verdict, Evidence]:
    """Reach a verdict, and add the adjusted p-values to the slices.

    Args:
        evidence: The measurements.
        margins: Allowed losses and level.

    Returns:
        The verdict, and the evidence with adjusted p-values.
    """
    tests: list[tuple[str, float]] = []
    if evidence.overall is not None:
        tests.append(("overall", harm_p_value(evidence.overall.flips, margins.accuracy)))
    text = evidence.text
    if text is not None and text.bootstrap is not None:
        tests.append(("text", text.bootstrap.p_value_above(math.log1p(margins.perplexity))))
    sliced = [s for s in (*evidence.slices, evidence.edges) if s is not None and s.tested]
    tests += [(f"slice {s.name}", harm_p_value(s.flips, margins.slices)) for s in sliced]
    harm = dict(zip([n for n, _ in tests], adjust_holm([p for _, p in tests]), strict=True))
    evidence = _with_harm(evidence, harm)
    claims = [
        *_accuracy_claim(evidence.overall, margins),
        *_text_claim(text, harm.get("text"), margins),
        *_slices_claim("No task slice is significantly worse", evidence.slices, margins),
        *(
            []
            if evidence.edges is None
            else _slices_claim("Edge cases are not significantly worse", (evidence.edges,), margins)
        ),
        _finite_claim(evidence, text),
        *_layers_claim(evidence.layers),
    ]
    outcomes = {claim.outcome for claim in claims}
    can_pass = evidence.overall is not None or text is not None
    if Outcome.FAIL in outcomes:
        outcome = Outcome.FAIL
    elif Outcome.INCONCLUSIVE in outcomes or not can_pass:
        outcome = Outcome.INCONCLUSIVE
    else:
        outcome = Outcome.PASS
    return Verdict(
        outcome=outcome, sentence=_sentence(outcome, claims), claims=tuple(claims)
    ), evidence


def _with_harm(evidence: Evidence, harm: dict[str, float]) -> Evidence:
    overall, edges = evidence.overall, evidence.edges
    return replace(
        evidence,
        overall=overall and replace(overall, harm_p=harm.get("overall")),
        slices=tuple(replace(s, harm_p=harm.get(f"slice {s.name}")) for s in evidence.slices),
        edges=edges and replace(edges, harm_p=harm.get(f"slice {edges.name}")),
    )


def _accuracy_claim(overall: SliceResult | None, margins: Margins) -> list[Claim]:
    if overall is None:
        return []
    flips = overall.flips
    found = (
        f"accuracy {_accuracies(overall)}, difference {format_points(flips.difference)} "
        f"[{format_points(overall.interval.low)}, {format_points(overall.interval.high)}]; "
        f"{flips.harmful} harmful and {flips.beneficial} beneficial flips of {flips.num_items} "
        "items"
    )
    outcome, advice = Outcome.INCONCLUSIVE, ""
    if overall.harm_p is not None and overall.harm_p < margins.alpha:
        outcome = Outcome.FAIL
    elif overall.base_accuracy <= margins.accuracy:
        # A loss beyond the margin is impossible, so any candidate would pass.
        advice = (
            f"The base itself gets only {format_percent(overall.base_accuracy)} right, so no loss "
            "beyond the margin is possible. Check its answers, and use tasks that it can solve."
        )
    elif noninferiority_p_value(flips, margins.accuracy) < margins.alpha:
        outcome = Outcome.PASS
    elif flips.units < MIN_DOCUMENTS:
        advice = (
            f"The items are from {flips.units:.3g} documents; a pass needs at least "
            f"{MIN_DOCUMENTS} of about the same size."
        )
    else:
        advice = _items_advice(flips, margins)
    return [
        Claim(
            name=f"Accuracy falls by less than {format_points(margins.accuracy, sign=False)}",
            outcome=outcome,
            found=found,
            advice=advice,
        )
    ]


def _items_advice(flips: Flips, margins: Margins) -> str:
    """Say how likely a verdict is with these items, and how many are needed."""
    # Half a flip is added: no flip in a small sample does not mean a flip rate of zero.
    rate = (flips.harmful + flips.beneficial + 0.5) / (flips.num_items + 1)
    independent = flips.num_items / flips.design_effect
    power = passing_power(independent, rate, margins.accuracy, alpha=margins.alpha)
    equal = items_needed(rate, margins.accuracy, alpha=margins.alpha)
    needed = items_needed(rate, margins.accuracy, alpha=margins.alpha, difference=flips.difference)
    advice = (
        f"With {flips.num_items} items, of which {format_percent(rate)} flip, a candidate as good "
        f"as the base passes with a probability of {format_percent(power)}"
    )
    if equal is not None:
        advice += f"; with {_scale_items(equal, flips):,} items it is 80%"
    if needed is not None and needed != equal:
        kind = "pass" if flips.difference > -margins.accuracy else "fail"
        advice += (
            f". If the true difference is the observed {format_points(flips.difference)}, "
            f"{_scale_items(needed, flips):,} items give a {kind} with a probability of 80%"
        )
    return advice + "."


def _scale_items(items: int, flips: Flips) -> int:
    """Convert a number of independent items to items of these documents."""
    return math.ceil(items * flips.design_effect)


def _text_claim(text: TextFidelity | None, harm: float | None, margins: Margins) -> list[Claim]:
    if text is None:
        return []
    interval, bootstrap = text.perplexity_ratio_interval, text.bootstrap
    increase = format_percent(text.perplexity_ratio - 1, sign=True)
    found = f"perplexity {text.base_perplexity:.2f} → {text.candidate_perplexity:.2f}, "
    outcome, advice = Outcome.INCONCLUSIVE, ""
    if bootstrap is None or interval is None:
        found += f"{increase} on {text.num_documents} documents"
        advice = (
            f"Use {MIN_DOCUMENTS} documents or more; of one long text, every {STRETCH_TOKENS:,} "
            "tokens count as a document."
        )
        if not text.base_finite:
            advice = "The base's own logits are infinite or not a number. Check the base first."
        elif not math.isfinite(text.nll_increase_nats):
            outcome, advice = Outcome.FAIL, ""
    else:
        found += (
            f"{increase} [{format_percent(interval.low - 1, sign=True)}, "
            f"{format_percent(interval.high - 1, sign=True)}] over {text.num_documents} documents"
        )
        if harm is not None and harm < margins.alpha:
            outcome = Outcome.FAIL
        elif bootstrap.p_value_below(math.log1p(margins.perplexity)) < margins.alpha:
            outcome = Outcome.PASS
        else:
            advice = "Use more documents: they narrow the interval."
    return [
        Claim(
            name=f"Perplexity rises by less than {100 * margins.perplexity:g}%",
            outcome=outcome,
            found=found,
            advice=advice,
        )
    ]


def _slices_claim(name: str, slices: Sequence[SliceResult], margins: Margins) -> list[Claim]:
    if not slices:
        return []
    harmed = [s for s in slices if s.harm_p is not None and s.harm_p < margins.alpha]
    tested = [s for s in slices if s.tested]
    if harmed:
        found = "; ".join(
            f"{s.name}: {_accuracies(s)} on {s.flips.num_items} items (adjusted p {s.harm_p:.2g})"
            for s in harmed
        )
        return [Claim(name=name, outcome=Outcome.FAIL, found=found)]
    if not tested:
        found = f"no slice has {MIN_ITEMS} items, the minimum for a test"
        return [Claim(name=name, outcome=Outcome.PASS, found=found)]
    worst = min(tested, key=lambda s: s.flips.difference)
    count = f"worst of {len(tested)}, " if len(tested) > 1 else ""
    found = (
        f"no significant loss beyond {format_points(margins.slices, sign=False)}; "
        f"{count}{worst.name}: {_accuracies(worst)} on {worst.flips.num_items} items"
    )
    return [Claim(name=name, outcome=Outcome.PASS, found=found)]


def _finite_claim(evidence: Evidence, text: TextFidelity | None) -> Claim:
    count = evidence.num_nonfinite + (0 if text is None or text.candidate_finite else 1)
    return Claim(
        name="All logits are finite",
        outcome=Outcome.FAIL if count else Outcome.PASS,
        found=f"{count} answers or texts where only the candidate has infinite or NaN logits",
    )


def _layers_claim(layers: LayerErrors | None) -> list[Claim]:
    if layers is None:
        return []
    name = "No layer is an outlier"
    if not layers.suspects:
        return [
            Claim(name=name, outcome=Outcome.PASS, found=f"{len(layers.linears)} linears compared")
        ]
    found = "; ".join(f"{s.name}: {s.suspect}" for s in layers.suspects[:5])
    advice = "Rounding alone rarely does this. Check how these layers were quantized and saved."
    return [Claim(name=name, outcome=Outcome.INCONCLUSIVE, found=found, advice=advice)]


def _sentence(outcome: Outcome, claims: Sequence[Claim]) -> str:
    if outcome is Outcome.PASS:
        return "Pass. The candidate loses less than the margins allow."
    deciding = [claim for claim in claims if claim.outcome is outcome]
    if not deciding:
        return "Inconclusive. Neither tasks nor running text were measured."
    why = "; ".join(f'"{claim.name}" ({claim.found})' for claim in deciding[:3])
    if outcome is Outcome.FAIL:
        return f"Fail. Not met: {why}."
    return f"Inconclusive. The evidence does not decide: {why}."


def _accuracies(result: SliceResult) -> str:
    return f"{format_percent(result.base_accuracy)} → {format_percent(result.candidate_accuracy)}"


def format_percent(share: float, *, sign: bool = False) -> str:
    """Format a share as a percentage with one decimal."""
    return f"{100 * share:+.1f}%" if sign else f"{100 * share:.1f}%"


def format_points(difference: float, *, sign: bool = True) -> str:
    """Format a difference of shares in percentage points."""
    return f"{100 * difference:+.1f} points" if sign else f"{100 * difference:g} points"
