from __future__ import annotations

import json
from dataclasses import replace

import peft
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from halfbyte.cli.main import main
from halfbyte.errors import ConfigError
from halfbyte.finetune.adapter import attach_adapter
from halfbyte.finetune.config import AdapterConfig
from halfbyte.plan.devices import Device, parse_device
from halfbyte.plan.memory import Load
from halfbyte.plan.shapes import parse_config, read_shapes
from halfbyte.plan.training import TrainingLoad, find_targets, max_batch_size, plan_training

# PEFT asks Transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

CONFIG = LlamaConfig(
    hidden_size=64,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=96,
)
LOAD = TrainingLoad(base=Load(context=32))


SIZES = {name: value for name, value in CONFIG.to_dict().items() if name != "model_type"}
MIXTURES = [
    Qwen3MoeConfig(**SIZES | {"num_experts": 4, "moe_intermediate_size": 64, "head_dim": 16}),
    Qwen2MoeConfig(**SIZES | {"num_experts": 4, "shared_expert_intermediate_size": 32}),
    MixtralConfig(**SIZES | {"num_local_experts": 4}),
    GptOssConfig(**SIZES | {"num_local_experts": 4, "head_dim": 16}),
]


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (CONFIG, ("down_proj",)),
        *((config, ()) for config in (CONFIG, *MIXTURES)),
        *((config, ("q_proj", "v_proj")) for config in (CONFIG, *MIXTURES)),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
@pytest.mark.parametrize("rank", [4, 16])
def test_adapter_parameters_match_peft(config, targets, rank):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    adapted = attach_adapter(model, AdapterConfig(rank=rank, targets=targets))
    assert isinstance(adapted, peft.PeftModel)
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    shapes = parse_config(config.to_dict(), "tiny")
    plan = plan_training(shapes, replace(LOAD, rank=rank, targets=targets))
    assert plan.trained == trained
    assert plan.adapter == 8 * trained
    assert plan.optimizer == 8 * trained


def test_65b_of_the_article_trains_on_48_gb_and_not_on_32():
    shapes = read_shapes("65B")
    load = TrainingLoad(base=Load(context=512), targets=("q_proj", "v_proj"))
    assert max_batch_size(shapes, load, parse_device("48GB")) >= 1
    assert max_batch_size(shapes, load, parse_device("32GB")) == 0


@pytest.mark.parametrize("gigabytes", [8, 12, 24])
def test_max_batch_size_fits_and_one_more_does_not(gigabytes):
    shapes, device = read_shapes("8B"), Device(name="card", bytes=gigabytes * 10**9)
    most = max_batch_size(shapes, TrainingLoad(base=Load(context=512)), device)
    for rows, fits in ((most, True), (most + 1, False)):
        load = TrainingLoad(base=Load(context=512), batch_size=rows)
        assert (plan_training(shapes, load).total <= device.bytes) == fits


def test_checkpointing_and_8_bit_moments_take_less():
    shapes = read_shapes("8B")
    plain = plan_training(shapes, replace(LOAD, checkpointing=False))
    assert plan_training(shapes, LOAD).activations < plain.activations / 5
    small = plan_training(shapes, replace(LOAD, optimizer="adamw_8bit"))
    assert small.optimizer * 4 == plain.optimizer


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="no linear 'qproj' in '8B'; it has down_proj, gate_proj"):
        find_targets(read_shapes("8B"), ("qproj",))
    with pytest.raises(ConfigError, match="optimizer is 'sgd'; allowed are adamw"):
        replace(LOAD, optimizer="sgd")
    with pytest.raises(ConfigError, match="rank is 0"):
        replace(LOAD, rank=0)


def test_command_prints_bytes_and_batch_sizes(capsys):
    arguments = [
        "plan",
        "8B",
        "--finetune",
        "--context",
        "512",
        "--gpu",
        "24GB",
        "--target",
        "q_proj",
    ]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    load = TrainingLoad(base=Load(context=512), targets=("q_proj",))
    expected = plan_training(read_shapes("8B"), load)
    assert found["bytes"] == expected.to_dict()
    assert found["devices"][0]["max_batch_size"] == max_batch_size(
        read_shapes("8B"), load, parse_device("24GB")
    )
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "rank 16 on q_proj" in shown
    assert "maximum batch size" in shown
