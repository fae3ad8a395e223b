from __future__ import annotations

import dataclasses

import pytest
from tests.judge.examples import make_comparison

from halfbyte.errors import ConfigError
from halfbyte.judge.layers import LayerErrors, LinearError, mark_suspects
from halfbyte.judge.statistics import Flips, count_flips
from halfbyte.judge.verdict import Evidence, Margins, Outcome, decide, measure_slice

MARGINS = Margins()


def part(n, harmful, beneficial, name="all items", right=None):
    flips = Flips(num_items=n, harmful=harmful, beneficial=beneficial)
    return measure_slice(name, flips, n // 2 if right is None else right, MARGINS)


def verdict(**evidence):
    return decide(Evidence(**evidence), MARGINS)[0]


@pytest.mark.parametrize(
    ("n", "harmful", "beneficial", "outcome", "code"),
    [
        (3000, 60, 60, Outcome.PASS, 0),
        (3000, 200, 20, Outcome.FAIL, 1),
        (100, 3, 3, Outcome.INCONCLUSIVE, 2),
        (100, 40, 2, Outcome.FAIL, 1),
    ],
)
def test_flips_decide(n, harmful, beneficial, outcome, code):
    found = verdict(overall=part(n, harmful, beneficial))
    assert (found.outcome, found.exit_code) == (outcome, code)
    assert (
        f"{harmful} harmful and {beneficial} beneficial flips of {n} items" in found.claims[0].found
    )


def test_inconclusive_accuracy_says_how_many_items_are_needed():
    (claim,) = [c for c in verdict(overall=part(200, 8, 4)).claims if c.advice]
    # 12.5 of 201 flip; the score test at 2 points needs about 6.2 * .062 / .02**2.
    assert "200 items, of which 6.2% flip" in claim.advice
    assert "1,0" in claim.advice
    assert "the observed -2.0 points" not in claim.advice


def test_one_harmed_slice_fails_an_otherwise_good_model():
    slices = tuple(part(200, 2, 2, name=f"s{i}") for i in range(7))
    good = verdict(overall=part(3000, 60, 60), slices=slices)
    bad = verdict(overall=part(3000, 60, 60), slices=(*slices, part(40, 20, 0, name="digits")))
    assert good.outcome is Outcome.PASS
    assert bad.outcome is Outcome.FAIL
    (claim,) = [c for c in bad.claims if c.outcome is Outcome.FAIL]
    assert "digits: 50.0% → 0.0% on 40 items" in claim.found


def test_p_values_of_slices_are_adjusted_for_their_number():
    one = part(60, 14, 0, name="s")
    alone = decide(Evidence(slices=(one,)), MARGINS)[1].slices[0].harm_p
    others = tuple(part(60, 0, 0, name=f"o{i}") for i in range(9))
    among = decide(Evidence(slices=(one, *others)), MARGINS)[1].slices[0].harm_p
    assert among == pytest.approx(10 * alone)


def test_small_slice_is_reported_but_not_tested():
    _, evidence = decide(Evidence(slices=(part(9, 9, 0, name="tiny", right=9),)), MARGINS)
    assert evidence.slices[0].harm_p is None
    assert evidence.slices[0].candidate_accuracy == 0


def test_nonfinite_logits_fail_and_a_suspect_layer_is_inconclusive():
    good = part(3000, 60, 60)
    assert verdict(overall=good, num_nonfinite=1).outcome is Outcome.FAIL
    linears = [
        LinearError(name=f"b{i}.o", block=i, kind="o", error=0.1, gain=1.03 if i == 3 else 0.995)
        for i in range(8)
    ]
    layers = LayerErrors(linears=mark_suspects(linears), block_errors=(), missing=0)
    found = verdict(overall=good, layers=layers)
    assert found.outcome is Outcome.INCONCLUSIVE
    assert "b3.o: its outputs are 1.030 times the base's, its peers' 0.995 times" in found.sentence


@pytest.mark.parametrize(
    ("gain", "error", "suspect"),
    [
        (1.03, 0.1, True),
        (0.965, 0.1, True),
        (1.005, 0.1, False),
        (0.98, 0.1, False),
        (0.995, 0.2, True),
        (0.995, 0.12, False),
    ],
)
def test_linear_is_suspect_for_its_gain_or_its_error(gain, error, suspect):
    peers = [
        LinearError(name=f"b{i}", block=i, kind="o", error=0.1 + 0.001 * i, gain=0.995 + 0.0003 * i)
        for i in range(8)
    ]
    odd = LinearError(name="odd", block=9, kind="o", error=error, gain=gain)
    *others, marked = mark_suspects([*peers, odd])
    assert bool(marked.suspect) is suspect
    assert not any(other.suspect for other in others)
    assert mark_suspects([odd]) == (odd,)


def test_perplexity_alone_decides_where_there_are_no_tasks():
    text = make_comparison().text  # 5.1% more, between 4.7% and 5.5%
    for margin, outcome in (
        (0.10, Outcome.PASS),
        (0.02, Outcome.FAIL),
        (0.05, Outcome.INCONCLUSIVE),
    ):
        found, _ = decide(Evidence(text=text), dataclasses.replace(MARGINS, perplexity=margin))
        assert found.outcome is outcome


def test_base_that_is_never_right_gives_no_pass():
    (claim, *_) = verdict(overall=part(3000, 0, 0, right=0)).claims
    assert claim.outcome is Outcome.INCONCLUSIVE
    assert "The base itself gets only 0.0% right" in claim.advice
    assert verdict(overall=part(3000, 0, 0, right=61)).outcome is Outcome.PASS


def test_too_few_documents_are_inconclusive():
    flips = count_flips([True] * 1000, [True] * 1000, [i // 100 for i in range(1000)])
    (claim, *_) = verdict(overall=measure_slice("all items", flips, 1000, MARGINS)).claims
    assert claim.outcome is Outcome.INCONCLUSIVE
    assert "The items are from 10 documents; a pass needs at least 16" in claim.advice


def test_nothing_measured_is_inconclusive():
    assert verdict().outcome is Outcome.INCONCLUSIVE


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"accuracy": 1.0}, "accuracy is 1.0"),
        ({"slices": -0.1}, "slices is -0.1"),
        ({"alpha": 0.5}, "alpha is 0.5"),
    ],
)
def test_invalid_margin_is_rejected(changes, part):
    with pytest.raises(ConfigError, match=part):
        Margins(**changes)
