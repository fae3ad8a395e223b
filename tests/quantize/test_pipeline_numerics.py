"""From a model folder to a checkpoint: which tokens and weights enter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.helpers.checkpoints import read_tensors
from tests.helpers.families import build_family, token_lists, write_decided_family, write_family
from tests.helpers.runs import SMALL, assert_loads_and_computes, bytes_of, quantize, run
from transformers import PreTrainedModel

from halfbyte.errors import CalibrationError, CheckpointError
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.block_inputs import InputCollector


def test_only_real_tokens_enter_a_hessian(tmp_path: Path) -> None:
    lengths = [32, 5, 17, 32, 9, 5]
    rows = token_lists(6, 32)
    padded = {
        "input_ids": [row[:n] + [0] * (32 - n) for row, n in zip(rows, lengths, strict=True)],
        "attention_mask": [[1] * n + [0] * (32 - n) for n in lengths],
    }
    plain = [row[:n] for row, n in zip(rows, lengths, strict=True)]
    write_family(tmp_path / "base", "llama", **SMALL)
    config = QuantConfig(group_size=32)
    reports = [
        quantize(tmp_path / "base", tmp_path / name, config, text=text)
        for name, text in (("padded", [padded]), ("plain", plain))
    ]
    for report in reports:
        assert {m.num_tokens for m in report.modules} == {sum(lengths)}
        assert report.calibration.tokens == sum(lengths)
        assert report.calibration.samples == 6
        assert report.calibration.length == 32
    assert bytes_of(tmp_path / "padded") == bytes_of(tmp_path / "plain")


def test_dead_columns_are_noted_and_keep_their_weights(tmp_path: Path) -> None:
    def kill(model: PreTrainedModel) -> None:
        model.model.layers[1].input_layernorm.weight.data[[3, 40]] = 0

    model, report, checkpoint = run(tmp_path, QuantConfig(bits=8, group_size=32), prepare=kill)
    noted = {m.name for m in report.modules if "2 input columns carried no signal" in m.notes}
    assert noted == {f"model.layers.1.self_attn.{n}_proj" for n in "qkv"}
    weight = model.model.layers[1].self_attn.q_proj.weight
    found = checkpoint.dequantize("model.layers.1.self_attn.q_proj")
    torch.testing.assert_close(found[:, [3, 40]], weight[:, [3, 40]], atol=1e-3, rtol=0)
    assert_loads_and_computes(model, checkpoint)


def test_no_signal_is_round_to_nearest(tmp_path: Path) -> None:
    def kill(model: PreTrainedModel) -> None:
        model.model.layers[1].post_attention_layernorm.weight.data.zero_()

    model, report, checkpoint = run(tmp_path, QuantConfig(group_size=32), prepare=kill)
    silent = [m for m in report.modules if any("no input signal" in note for note in m.notes)]
    assert {m.name for m in silent} == {
        f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up", "down")
    }
    assert_loads_and_computes(model, checkpoint)


def set_weight(name: str, value: float) -> Callable[[PreTrainedModel], object]:
    def prepare(model: PreTrainedModel) -> None:
        model.get_submodule(name).weight.data.view(-1)[5] = value

    return prepare


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_weight_that_is_not_finite_is_named(value: float, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    with pytest.raises(
        CheckpointError,
        match=rf"Cannot quantize {name}: 1 of its 6144 weights are not finite.* --skip",
    ):
        run(tmp_path, QuantConfig(group_size=32), prepare=set_weight(name, value))


def test_non_finite_inputs_name_the_module_that_reads_them(tmp_path: Path) -> None:
    prepare = set_weight("model.layers.1.post_attention_layernorm", float("inf"))
    with pytest.raises(
        CalibrationError,
        match=r"Cannot quantize model\.layers\.1\.mlp\.gate_proj: its inputs are not finite in any "
        r"of 192 calibration tokens",
    ):
        run(tmp_path, QuantConfig(group_size=32), prepare=prepare)


@pytest.mark.parametrize("checks_afterwards", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("memory", ["64GB", "1MB"], ids=["paused", "again"])
def test_batches_dropped_in_part_are_noted_by_module(
    checks_afterwards: bool, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(InputCollector, "_checks_afterwards", checks_afterwards)

    def spoil(model: PreTrainedModel) -> None:
        model.model.embed_tokens.weight.data[7] = float("inf")

    rows = [[9, 10, 11, 12] * 8 for _ in range(5)]
    _, report, _ = run(
        tmp_path,
        QuantConfig(group_size=32),
        prepare=spoil,
        text=[*rows, [7, *rows[0][1:]]],
        calibration=CalibrationConfig(samples=6, length=32, batch_size=2),
        resources=ResourceConfig(memory=memory),
    )
    assert {m.num_tokens for m in report.modules} == {4 * 32}
    for module in report.modules:
        assert "64 of 192 tokens dropped: their inputs are not finite" in module.notes


def test_block_that_reads_a_weight_without_running_its_linear(tmp_path: Path) -> None:
    # Mamba's dt_proj. The states behind a block are those of its rounded weights, whether or not
    # its passes were kept in memory while it was rounded.
    sizes = {"state_size": 16, "time_step_rank": 32, "num_hidden_layers": 2}
    write_decided_family(tmp_path / "base", "mamba", **sizes)
    for memory in ("64GB", "1MB"):
        report = quantize(
            tmp_path / "base",
            tmp_path / memory,
            QuantConfig(bits=2, group_size=32),
            calibration=CalibrationConfig(samples=2, length=16),
            text=token_lists(2, 16),
            resources=ResourceConfig(memory=memory),
        )
        (idle,) = (m for m in report.modules if m.name == "backbone.layers.0.mixer.dt_proj")
        assert idle.num_tokens == 0
    assert bytes_of(tmp_path / "64GB") == bytes_of(tmp_path / "1MB")


def test_weights_too_small_for_scales_are_noted(tmp_path: Path) -> None:
    def shrink(model: PreTrainedModel) -> None:
        model.model.layers[1].self_attn.q_proj.weight.data.mul_(2e-5)

    _, report, _ = run(tmp_path, QuantConfig(group_size=32), prepare=shrink)
    told = "4096 weights are in groups with the smallest possible scale, 1e-05"
    noted = [m.name for m in report.modules if any(told in note for note in m.notes)]
    assert noted == ["model.layers.1.self_attn.q_proj"]


def test_weights_too_large_for_fp16_scales_are_noted(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    _, report, _ = run(tmp_path, QuantConfig(group_size=32), prepare=set_weight(name, 1e9))
    noted = {m.name: [n for n in m.notes if "fp16" in n] for m in report.modules}
    assert noted.pop(name) == [
        "1 groups need a scale above 65504, fp16's largest: their largest weights are clipped"
    ]
    assert not any(noted.values())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("computing", ["float32", "bfloat16"])
def test_solver_gets_the_exact_weights_whatever_the_model_computes_in(
    stored: torch.dtype, computing: str, tmp_path: Path
) -> None:
    """At 8 bits a weight cast to bfloat16 first would be off by a quarter of the grid's step."""

    def spread(model: PreTrainedModel) -> None:
        weight = model.get_submodule(name).weight.data
        weight.copy_(weight.sign() * torch.empty_like(weight).uniform_(0.02, 0.04))
        model.to(stored)

    name = "model.layers.0.self_attn.q_proj"
    model, report, checkpoint = run(
        tmp_path,
        QuantConfig(bits=8, group_size=16, act_order=False),
        prepare=spread,
        changes={"num_hidden_layers": 1},
        resources=ResourceConfig(dtype=computing),
    )
    assert f"computes in {computing}, as requested" in report.notes
    # The first column is rounded before it gets any feedback.
    exact = model.get_submodule(name).weight.detach().float()[:, 0]
    scale = checkpoint.load_linear(name).scales[0].float()
    found = torch.round(checkpoint.dequantize(name)[:, 0] / scale)
    assert torch.equal(found, torch.round(exact / scale).clamp(-128, 127))
    norm = checkpoint.files.load(["model.norm.weight"])["model.norm.weight"]
    assert norm.dtype == stored
    assert_loads_and_computes(model, checkpoint)


@pytest.mark.parametrize(("stored", "computing"), [("float16", "bfloat16"), ("float16", "float32")])
def test_biases_are_written_as_they_were_stored(
    stored: str, computing: str, tmp_path: Path
) -> None:
    model = build_family("qwen2", num_hidden_layers=1).to(getattr(torch, stored))
    biases = {name: p for name, p in model.named_parameters() if name.endswith(".bias")}
    for bias in biases.values():
        bias.data.normal_(std=3.0)
    model.save_pretrained(tmp_path / "base")
    config, resources = QuantConfig(group_size=32), ResourceConfig(dtype=computing)
    quantize(tmp_path / "base", tmp_path / "out", config, resources=resources)
    written = read_tensors(tmp_path / "out")
    assert len(biases) == 3
    for name, bias in biases.items():
        assert written[name].dtype == bias.dtype
        assert torch.equal(written[name], bias)
