"""What a run on a GPU writes: the files that a run on the CPU writes, byte for byte."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tests.helpers.checkpoints import read_tensors
from tests.helpers.families import build_family, token_lists, write_decided_family
from tests.helpers.runs import bytes_of, quantize
from tests.helpers.tiny_llama import build_tokenizer

import halfbyte
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize import end_to_end, run_states
from halfbyte.quantize import run as running
from halfbyte.quantize.journal import Journal

pytestmark = pytest.mark.simulated_gpu

FAST, BALANCED, BEST = (
    QuantConfig.from_preset(preset, group_size=32) for preset in ("fast", "balanced", "best")
)


def run(folder, device, config, dtype="float32", **keywords):
    resources = ResourceConfig(device=device, dtype=dtype)
    return quantize(folder / "base", folder / device, config, resources=resources, **keywords)


def assert_same_on_both(folder, config, **keywords):
    reports = [run(folder, device, config, **keywords) for device in ("cpu", "cuda")]
    assert bytes_of(folder / "cuda") == bytes_of(folder / "cpu")
    for one, other in zip(*(report.modules for report in reports), strict=True):
        assert dataclasses.replace(one, seconds=0) == dataclasses.replace(other, seconds=0)
    assert reports[0].quality == reports[1].quality
    return reports[1]


@pytest.mark.parametrize(
    ("config", "keywords"),
    [
        (FAST, {}),
        (FAST, {"text": "self"}),
        (dataclasses.replace(FAST, symmetric=False, desc_act=True, lm_head=True), {}),
        (dataclasses.replace(FAST, target_bits=3.5), {}),
        (BALANCED, {"dtype": "bfloat16"}),
    ],
    ids=["fast", "self-generated text", "asymmetric and head", "mixed precision", "balanced"],
)
def test_presets_and_options(tmp_path, config, keywords):
    write_decided_family(tmp_path / "base", num_hidden_layers=1)
    report = assert_same_on_both(tmp_path, config, **keywords)
    assert "columns are rounded without a Triton kernel on cuda" in " ".join(report.notes)


def test_best_with_all_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end, "CHECK_STEPS", 1)
    model = build_family("llama", num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    model.get_output_embeddings().weight.data.mul_(20)
    model.save_pretrained(tmp_path / "base")
    config = dataclasses.replace(BEST, bits=2, polish=1, tune_steps=2, end_to_end_steps=2)
    calibration = CalibrationConfig(samples=64, length=16, batch_size=16)
    report = assert_same_on_both(
        tmp_path, config, calibration=calibration, text=token_lists(64, 16)
    )
    assert "held out" not in " ".join(report.notes)


def test_experts(tmp_path):
    write_decided_family(tmp_path / "base", "mixtral", num_hidden_layers=1)
    assert_same_on_both(tmp_path, dataclasses.replace(BALANCED, polish=0))


def test_quality_on_held_out_text(tmp_path):
    write_decided_family(tmp_path / "base", num_hidden_layers=1)
    build_tokenizer().save_pretrained(tmp_path / "base")
    words = [f"w{i * j % 60}" for j in range(1, 8) for i in range(400)]
    (tmp_path / "text.txt").write_text(" ".join(words))
    report = assert_same_on_both(tmp_path, FAST, text=tmp_path / "text.txt")
    assert report.quality is not None


def test_resumed_run_with_states_on_the_device(tmp_path, monkeypatch):
    monkeypatch.setattr(run_states, "SAVE_EVERY_SECONDS", 0)
    resolve, add_block = running.resolve_resources, Journal.add_block

    def resolve_held(*arguments):
        plan = resolve(*arguments)
        settings = dataclasses.replace(plan.settings, hold_states=True)
        return dataclasses.replace(plan, settings=settings)

    def die_after_the_first(self, entry):
        if self.blocks:
            raise KeyboardInterrupt
        add_block(self, entry)

    monkeypatch.setattr(running, "resolve_resources", resolve_held)
    write_decided_family(tmp_path / "base", num_hidden_layers=2)
    run(tmp_path, "cpu", FAST)
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "add_block", die_after_the_first)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path, "cuda", FAST)
    run(tmp_path, "cuda", FAST, resume=True)
    assert bytes_of(tmp_path / "cuda") == bytes_of(tmp_path / "cpu")


def test_memory_is_planned_before_weights_are_on_the_device(tmp_path, monkeypatch):
    resolve, loaded = running.resolve_resources, []

    def resolve_and_look(weights, *arguments):
        loaded.extend(n for n, p in weights.model.named_parameters() if not p.is_meta)
        return resolve(weights, *arguments)

    monkeypatch.setattr(running, "resolve_resources", resolve_and_look)
    write_decided_family(tmp_path / "base", num_hidden_layers=1)
    run(tmp_path, "cuda", FAST)
    assert not loaded, "counted in the free memory and in the plan, and left out of the limit"


def test_rotated_model(tmp_path):
    write_decided_family(tmp_path / "base")
    for device in ("cpu", "cuda"):
        halfbyte.rotate(tmp_path / "base", tmp_path / device, device=device)
    found, expected = read_tensors(tmp_path / "cuda"), read_tensors(tmp_path / "cpu")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
