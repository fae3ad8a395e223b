"""From measurements to pass, fail or inconclusive, with stated chances of being wrong.

Every *claim* states what must hold, what was found and whether that decides. The candidate

- **passes** where accuracy over all items and perplexity are each shown to lose less than their
  margin, at level alpha, and nothing else is amiss: a candidate that truly loses more than one of
  these margins passes with a chance of alpha at most;
- **fails** where harm beyond a margin is shown for any claim: these tests are adjusted together
  (Holm), so a candidate that keeps every margin fails with a chance of alpha at most;
- is **inconclusive** otherwise, with the number of items that would decide.

Divergence (KL) is an alarm and gates nothing: between near-equal models it does not tell which one
loses at tasks (arXiv 2606.19558).
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
    FEWEST_DOCUMENTS,
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

FEWEST_ITEMS = 10
"""A slice of fewer items is shown and not tested."""


class Outcome(StrEnum):
    """What can be said."""

    PASS = "pass"
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"


EXIT_CODES = {Outcome.PASS: 0, Outcome.FAIL: 1, Outcome.INCONCLUSIVE: 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """What a candidate may lose, and how sure the verdict must be."""

    accuracy: float = 0.02
    """Of accuracy over all items: 0.02 is two points."""
    slices: float = 0.10
    """Of accuracy within one slice, and of clean answers to odd inputs."""
    perplexity: float = 0.10
    """Of perplexity on running text, relative: 0.10 is ten percent more."""
    alpha: float = 0.05
    """Chance of a wrong pass, and of a wrong fail."""

    def __post_init__(self) -> None:
        for name in ("accuracy", "slices", "perplexity"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise ConfigError(
                    f"The margin of {name} is {value}; it must be from 0 to below 1. 0.02 is two "
                    "points."
                )
        if not 0 < self.alpha < 0.5:
            raise ConfigError(f"alpha is {self.alpha}; it must be between 0 and 0.5, such as 0.05.")

    @property
    def confidence(self) -> float:
        """Of the two-sided intervals whose ends are the bounds of the tests."""
        return 1 - 2 * self.alpha


@dataclass(frozen=True, slots=True, kw_only=True)
class SliceResult:
    """Both models on one slice of the items, or on all of them."""

    name: str
    flips: Flips
    base_accuracy: float
    candidate_accuracy: float
    interval: Interval
    """Of the difference in accuracy."""
    mcnemar_p: float
    """That flips this lopsided come about where both are equally good; two-sided, exact."""
    tested: bool
    """Whether the slice has enough items to be tested."""
    harm_p: float | None = None
    """That harm beyond the margin is chance; adjusted for all tests. None: not tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """Something that must hold for a pass."""

    name: str
    outcome: Outcome
    found: str
    """In words, with numbers."""
    advice: str = ""
    """What would decide it; empty where it is decided."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """May the candidate replace the base?"""

    outcome: Outcome
    sentence: str
    claims: tuple[Claim, ...]

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 2 inconclusive."""
        return EXIT_CODES[self.outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a verdict is made of; what was not measured is None."""

    overall: SliceResult | None = None
    slices: tuple[SliceResult, ...] = ()
    edges: SliceResult | None = None
    text: TextFidelity | None = None
    layers: LayerErrors | None = None
    not_numbers: int = 0
    """Answers and texts at which only the candidate's logits were not numbers."""


def measure_slice(name: str, flips: Flips, base_right: int, margins: Margins) -> SliceResult:
    """Describe both models on one slice.

    Args:
        name: Of the slice.
        flips: What was observed.
        base_right: Items that the base gets right.
        margins: For the interval's confidence.

    Returns:
        The slice, its harm not yet adjusted for the other tests.
    """
    return SliceResult(
        name=name,
        flips=flips,
        base_accuracy=base_right / flips.num_items,
        candidate_accuracy=(base_right - flips.harmful + flips.beneficial) / flips.num_items,
        interval=difference_interval(flips, margins.confidence),
        mcnemar_p=mcnemar_p_value(flips.harmful, flips.beneficial),
        tested=flips.num_items >= FEWEST_ITEMS,
    )


def decide(evidence: Evidence, margins: Margins) -> tuple[Verdict, Evidence]:
    """Decide, and write the adjusted p-values of harm into the slices.

    Args:
        evidence: What was measured.
        margins: What may be lost.

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
        *_slices_claim("No slice of the tasks is harmed", evidence.slices, margins),
        *(
            []
            if evidence.edges is None
            else _slices_claim("Odd inputs do no harm", (evidence.edges,), margins)
        ),
        _numbers_claim(evidence, text),
        *_layers_claim(evidence.layers),
    ]
    outcomes = {claim.outcome for claim in claims}
    gated = evidence.overall is not None or text is not None
    if Outcome.FAIL in outcomes:
        outcome = Outcome.FAIL
    elif Outcome.INCONCLUSIVE in outcomes or not gated:
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
        f"accuracy {percent(overall.base_accuracy)} → {percent(overall.candidate_accuracy)}, "
        f"difference {points(flips.difference)} [{points(overall.interval.low)}, "
        f"{points(overall.interval.high)}]; {flips.harmful} harmful and {flips.beneficial} "
        f"beneficial flips of {flips.num_items} items"
    )
    outcome, advice = Outcome.INCONCLUSIVE, ""
    if overall.harm_p is not None and overall.harm_p < margins.alpha:
        outcome = Outcome.FAIL
    elif overall.base_accuracy <= margins.accuracy:
        # A loss of the margin is impossible then, and any candidate would keep it.
        advice = (
            f"the base itself gets {percent(overall.base_accuracy)} right, so nothing beyond the "
            "margin could be lost: look at its answers, and ask what it can do."
        )
    elif noninferiority_p_value(flips, margins.accuracy) < margins.alpha:
        outcome = Outcome.PASS
    elif flips.units < FEWEST_DOCUMENTS:
        advice = (
            f"the items are of {flips.units:.3g} documents; a pass takes {FEWEST_DOCUMENTS} of "
            "about one size, or more."
        )
    else:
        advice = _items_advice(flips, margins)
    return [
        Claim(
            name=f"Accuracy falls by less than {points(margins.accuracy, sign=False)}",
            outcome=outcome,
            found=found,
            advice=advice,
        )
    ]


def _items_advice(flips: Flips, margins: Margins) -> str:
    """Say how many items would decide, and what these could."""
    # Half a flip more: a rate of zero in a small sample is not a rate of zero.
    rate = (flips.harmful + flips.beneficial + 0.5) / (flips.num_items + 1)
    independent = flips.num_items / flips.design_effect
    power = passing_power(independent, rate, margins.accuracy, alpha=margins.alpha)
    equal = items_needed(rate, margins.accuracy, alpha=margins.alpha)
    needed = items_needed(rate, margins.accuracy, alpha=margins.alpha, difference=flips.difference)
    words = (
        f"with {flips.num_items} items and {percent(rate)} of them flipping, a candidate as good "
        f"as the base passes with a chance of {percent(power)}"
    )
    if equal is not None:
        words += f"; {_scaled(equal, flips):,} items give it 80%"
    if needed is not None and needed != equal:
        kind = "pass" if flips.difference > -margins.accuracy else "fail"
        words += (
            f". If its true difference is the {points(flips.difference)} seen here, "
            f"{_scaled(needed, flips):,} items lead to a {kind} with a chance of 80%"
        )
    return words + "."


def _scaled(items: int, flips: Flips) -> int:
    return math.ceil(items * flips.design_effect)


def _text_claim(text: TextFidelity | None, harm: float | None, margins: Margins) -> list[Claim]:
    if text is None:
        return []
    between, spread = text.perplexity_ratio_interval, text.bootstrap
    found = f"perplexity {text.base_perplexity:.2f} → {text.candidate_perplexity:.2f}, "
    outcome, advice = Outcome.INCONCLUSIVE, ""
    if spread is None or between is None:
        found += (
            f"{percent(text.perplexity_ratio - 1, sign=True)} on {text.num_documents} documents"
        )
        advice = (
            f"{FEWEST_DOCUMENTS} documents or more give an interval; of one long text, "
            f"{STRETCH_TOKENS:,} tokens count as one."
        )
        if not text.base_finite:
            advice = "the base's own logits are infinite or not a number: look at the base first."
        elif not math.isfinite(text.nll_increase_nats):
            outcome, advice = Outcome.FAIL, ""
    else:
        found += (
            f"{percent(text.perplexity_ratio - 1, sign=True)} "
            f"[{percent(between.low - 1, sign=True)}, {percent(between.high - 1, sign=True)}] over "
            f"{text.num_documents} documents"
        )
        if harm is not None and harm < margins.alpha:
            outcome = Outcome.FAIL
        elif spread.p_value_below(math.log1p(margins.perplexity)) < margins.alpha:
            outcome = Outcome.PASS
        else:
            advice = "more documents narrow the interval."
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
            f"{s.name}: {percent(s.base_accuracy)} → {percent(s.candidate_accuracy)} on "
            f"{s.flips.num_items} items (adjusted p {s.harm_p:.2g})"
            for s in harmed
        )
        return [Claim(name=name, outcome=Outcome.FAIL, found=found)]
    if not tested:
        found = f"no slice has the {FEWEST_ITEMS} items that a test needs"
        return [Claim(name=name, outcome=Outcome.PASS, found=found)]
    worst = min(tested, key=lambda s: s.flips.difference)
    together = f"{len(tested)} were tested together, the lowest is " if len(tested) > 1 else ""
    found = (
        f"no loss beyond {points(margins.slices, sign=False)} is shown; {together}{worst.name}: "
        f"{percent(worst.base_accuracy)} → {percent(worst.candidate_accuracy)} on "
        f"{worst.flips.num_items} items"
    )
    return [Claim(name=name, outcome=Outcome.PASS, found=found)]


def _numbers_claim(evidence: Evidence, text: TextFidelity | None) -> Claim:
    bad = evidence.not_numbers + (0 if text is None or text.candidate_finite else 1)
    return Claim(
        name="Every logit is a number",
        outcome=Outcome.FAIL if bad else Outcome.PASS,
        found=f"{bad} answers or texts with infinite or not-a-number logits of the candidate alone",
    )


def _layers_claim(layers: LayerErrors | None) -> list[Claim]:
    if layers is None:
        return []
    name = "No layer stands out from its peers"
    if not layers.suspects:
        return [
            Claim(name=name, outcome=Outcome.PASS, found=f"{len(layers.linears)} linears compared")
        ]
    found = "; ".join(f"{s.name}: {s.suspect}" for s in layers.suspects[:5])
    advice = "rounding alone seldom does this: check how these layers were written."
    return [Claim(name=name, outcome=Outcome.INCONCLUSIVE, found=found, advice=advice)]


def _sentence(outcome: Outcome, claims: Sequence[Claim]) -> str:
    if outcome is Outcome.PASS:
        return "Pass. What may be lost was set by the margins, and less than that is lost."
    deciding = [claim for claim in claims if claim.outcome is outcome]
    if not deciding:
        return "Inconclusive. Neither tasks nor text decide."
    why = "; ".join(f'"{claim.name}" ({claim.found})' for claim in deciding[:3])
    if outcome is Outcome.FAIL:
        return f"Fail. What must hold does not: {why}."
    return f"Inconclusive. Not shown either way: {why}."


def percent(share: float, *, sign: bool = False) -> str:
    """Write a share as percent with one decimal."""
    return f"{100 * share:+.1f}%" if sign else f"{100 * share:.1f}%"


def points(difference: float, *, sign: bool = True) -> str:
    """Write a difference of shares in points."""
    return f"{100 * difference:+.1f} points" if sign else f"{100 * difference:g} points"
