from __future__ import annotations

import json

import pytest
from tests.helpers.tiny_llama import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from halfbyte.cli.main import main
from halfbyte.errors import ConfigError
from halfbyte.judge.profile import profile


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of 100 MB, large enough that its parts are above the noise of a process."""
    path = tmp_path_factory.mktemp("model")
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


def test_measured_parts_are_near_the_planned_ones(folder):
    result = profile(folder, requests=4, context=512, new_tokens=4)
    parts = {name: (planned, measured) for name, planned, measured in result.parts()}
    for name in ("weights", "KV cache"):
        assert parts[name][0] == pytest.approx(parts[name][1], rel=0.02), name
    assert parts["KV cache"][1] > 30e6
    # What allocators and libraries take beside varies with the machine; bench/measure_plan.py has
    # the figures.
    assert 0.7 < result.ratio < 1.3
    assert result.measured.prefill_seconds > 0 < result.decode_tokens_per_second


def test_command_prints_json(folder, capsys):
    assert main(["profile", str(folder), "--requests", "1", "--context", "64", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["measured"]["dtype"] == "float32"
    assert values["planned"]["total"] == sum(
        values["planned"][k] for k in ("weights", "cache", "activations", "program")
    )


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"context": 4096}, "takes at most 512"),
        ({"requests": 0}, "0 requests"),
        ({"context": 4, "new_tokens": 4}, "of 4 tokens"),
    ],
)
def test_invalid_load_is_rejected_before_anything_runs(folder, changes, part):
    with pytest.raises(ConfigError, match=part):
        profile(folder, **changes)
