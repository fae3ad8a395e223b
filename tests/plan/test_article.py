"""Compares the article's memory table with the plan."""

from __future__ import annotations

import pytest

from halfbyte.plan.devices import fit_devices, parse_device
from halfbyte.plan.memory import Load, plan_memory
from halfbyte.plan.shapes import read_shapes


@pytest.mark.parametrize(
    ("name", "bits", "article_gb", "tolerance"),
    [
        ("7B", 16, 14, 0.04),
        ("7B", 8, 7, 0.03),
        ("7B", 4, 4, 0.04),
        ("70B", 16, 140, 0.02),
        ("70B", 8, 70, 0.02),
    ],
)
def test_weights_match_the_article(name, bits, article_gb, tolerance):
    plan = plan_memory(read_shapes(name), Load(bits=bits))
    assert plan.weights / 1e9 == pytest.approx(article_gb, rel=tolerance)


def test_article_omits_scales_and_embeddings_of_70b():
    plan = plan_memory(read_shapes("70B"), Load(bits=4))
    assert plan.codes / 1e9 == pytest.approx(34.2, abs=0.1)  # "35 GB" is the codes alone
    assert plan.weights / 1e9 == pytest.approx(36.7, abs=0.1)


def test_saving_of_7b_is_71_not_75_percent():
    small, large = (plan_memory(read_shapes("7B"), Load(bits=b)) for b in (4, 16))
    assert 1 - small.weights / large.weights == pytest.approx(0.71, abs=0.01)


@pytest.mark.parametrize(
    ("name", "card"), [("7B", "6GB"), ("13B", "10GB"), ("30B", "24GB"), ("70B", "40GB")]
)
def test_gpus_of_the_article_hold_only_one_short_request(name, card):
    shapes, device = read_shapes(name), parse_device(card)
    (short,) = fit_devices(shapes, Load(context=512), [device])
    (full,) = fit_devices(shapes, Load(context=2048, requests=4), [device])
    assert short.fits
    assert not full.fits
