from __future__ import annotations

import os

import pytest
import torch
from tests.helpers.checkpoints import TINY_SIZES, Recipe, tiny_llama_config, write_checkpoint
from transformers import Qwen3MoeConfig

import halfbyte
from halfbyte.errors import ConfigError, ModelError
from halfbyte.integrations.generation import Generator
from halfbyte.integrations.speed import count_read_bytes, measure_apart, measure_speed
from halfbyte.kernels.native_library import open_library

LIBRARY = open_library()
CONFIG = tiny_llama_config(tie_word_embeddings=False)


def measure(folder, **settings):
    return measure_speed(
        lambda: halfbyte.load(folder, dtype=torch.float32), **{"repeats": 1, **settings}
    )


def test_every_quantity_is_measured_and_fits_the_others(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    result = measure(tmp_path, prompt_tokens=512, new_tokens=8, repeats=3)
    assert result.prompt_tokens == 64 - 8  # the model has 64 positions
    assert result.first_token_seconds == pytest.approx(result.prompt_tokens / result.prompt_rate)
    assert len(result.rates) == 3
    assert min(result.rates) <= result.rate <= max(result.rates)
    assert result.load_seconds > 0
    assert result.memory_bytes > 50e6
    assert result.compiled_decoder == (LIBRARY.obstacle is None)
    if result.memory_rate is None:
        assert result.memory_share is None
    else:
        share = result.rate * result.read_bytes / result.memory_rate
        assert result.memory_share == pytest.approx(share)


def test_a_token_reads_every_weight_once_and_one_row_of_embeddings(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    write_checkpoint(tmp_path, CONFIG, Recipe())
    model = halfbyte.load(tmp_path, dtype=torch.float32)
    hidden, kv, wide, groups = 64, 32, 96, 2
    weights = hidden * (2 * hidden + 2 * kv + 3 * wide)
    scales = groups * (2 * hidden + 2 * kv + 2 * wide) + 3 * hidden
    norms = 5 * hidden * 4
    head = 128 * hidden * 4
    expected = 2 * (weights // 2 + scales * 2) + norms + head
    assert count_read_bytes(model, Generator(model)) == expected


def test_a_token_reads_those_experts_only_that_it_is_routed_to(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    sizes = {**TINY_SIZES, "num_hidden_layers": 1, "moe_intermediate_size": 32, "num_experts": 8}
    counts = []
    for per_token in (1, 2, 4):
        config = Qwen3MoeConfig(**sizes, num_experts_per_tok=per_token, head_dim=16)
        write_checkpoint(tmp_path / str(per_token), config, Recipe())
        model = halfbyte.load(tmp_path / str(per_token), dtype=torch.float32)
        counts.append(count_read_bytes(model, Generator(model)))
    # Gate, up and down: codes, and a scale for each output and group of 32.
    expert = 3 * 64 * 32 // 2 + 2 * (2 * 32 * 2 + 64 * 1)
    assert counts[1] - counts[0] == expert
    assert counts[2] - counts[1] == 2 * expert


def test_another_process_measures_the_same_model(tmp_path):
    write_checkpoint(tmp_path, CONFIG)
    here = measure(tmp_path, prompt_tokens=4, new_tokens=4)
    there = measure_apart(measure, tmp_path)
    assert there.read_bytes == here.read_bytes


def test_killed_measurement_is_told():
    with pytest.raises(ModelError, match="its process was killed"):
        measure_apart(os._exit, 9)


def test_too_few_tokens_are_refused():
    with pytest.raises(
        ConfigError, match="512 prompt tokens and 1 new tokens 3 times; use at least 1, 2"
    ):
        measure_speed(lambda: None, new_tokens=1)
