"""Configurations are made small by the names of their fields, and keep every kind of layer."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def shrink(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("tiny_families").shrink


def test_every_kind_of_layer_is_kept(shrink):
    kinds = ["linear"] * 3 + ["full"]
    small = shrink({"num_hidden_layers": 8, "layer_types": kinds * 2, "hidden_size": 4096})
    assert small["layer_types"] == ["linear", "full"] * 2
    assert (small["num_hidden_layers"], small["hidden_size"]) == (4, 64)


def test_layers_that_differ_in_a_setting_are_kinds(shrink):
    changes = {"3": {"head_dim": 512}, "7": {"head_dim": 512}}
    small = shrink({"num_hidden_layers": 8, "head_dim": 256, "per_layer_config": changes})
    assert small["head_dim"] == 16
    assert small["per_layer_config"] == {1: {"head_dim": 32}, 3: {"head_dim": 32}}


def test_nested_configurations_shrink_with_fewer_layers(shrink):
    small = shrink({"vision_config": {"num_hidden_layers": 27, "hidden_size": 1152}})
    assert small["vision_config"] == {"num_hidden_layers": 2, "hidden_size": 64}


def test_tokens_stay_inside_the_vocabulary_and_apart_from_text(shrink):
    small = shrink({"vocab_size": 200000, "eos_token_id": 150000, "image_token_id": 150001})
    assert (small["vocab_size"], small["eos_token_id"]) == (128, 2)
    assert 112 <= small["image_token_id"] < 128
