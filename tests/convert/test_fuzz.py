"""Some hundred damaged models of each format; `make fuzz` tests ten thousand of each."""

from __future__ import annotations

import random

import pytest
from tests.fuzz.conversion import FORMATS, damage, judge, make_bases


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    return folder, make_bases(folder)


@pytest.mark.parametrize("to", FORMATS)
def test_damage_is_refused_or_leaves_a_model(bases, tmp_path, to):
    folder, found = bases
    outcomes = set()
    for number in range(150):
        rng = random.Random(f"unit/{to}/{number}")
        base = rng.choice([base for base in found if base.name.startswith(to)])
        _, files = damage(rng, base)
        source = folder / "sourceTrue" if number % 10 == 0 else None
        outcomes.add(judge(tmp_path, files, source))
    assert outcomes == {"refused", "read"}
