"""The targets of a compressed-tensors config, which may be regular expressions of anybody."""

from __future__ import annotations

import pytest

from halfbyte.checkpoint import foreign_patterns
from halfbyte.convert.compressed_tensors import _matches_target
from halfbyte.errors import CheckpointError

NAME = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("target", "matches"),
    [(NAME, True), ("down_proj", False), (r"re:.*down_proj$", True), (r"re:down_proj", False)],
)
def test_target_is_a_full_name_or_a_pattern_from_its_start(target, matches):
    assert _matches_target(target, NAME) is matches


@pytest.mark.parametrize(
    ("pattern", "finding"),
    [
        ("(", "it is not a regular expression"),
        ("((a{1000}){1000}){1000}", "it has too many counted repeats"),
    ],
)
def test_pattern_that_cannot_be_used_is_named(pattern, finding):
    with pytest.raises(CheckpointError) as error:
        _matches_target(f"re:{pattern}", NAME)
    assert f"Cannot use the target 're:{pattern}': {finding}" in str(error.value)


def test_pattern_that_backtracks_without_end_is_cut_off(monkeypatch):
    monkeypatch.setattr(foreign_patterns, "MAX_MATCH_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match=r"it takes more than 0\.1 s to match model"):
        _matches_target(r"re:(\w|\w\w|\.)+$", f"{NAME}.of.a.much.longer.name!")
