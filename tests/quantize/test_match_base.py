"""match_base: the base model's hidden states as the target of rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.families import build_family, token_lists
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.model.blocks import find_blocks
from halfbyte.quant_config import PRESETS, CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize.attempt import Attempt
from halfbyte.quantize.block_walk import BlockWalk
from halfbyte.quantize.report import QuantizationReport
from halfbyte.quantize.run_states import BASE_CALIBRATION, CALIBRATION

IDS = token_lists(16, 32)
CONFIG = QuantConfig(group_size=32, bits=3, **PRESETS["balanced"])


def quantize(base: Path, output: Path, config: QuantConfig, **more: object) -> QuantizationReport:
    calibration = CalibrationConfig(samples=16, length=32, batch_size=2)
    return halfbyte.quantize(base, output, config=config, calibration=calibration, text=IDS, **more)


@pytest.fixture
def base(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    build_family(getattr(request, "param", "llama")).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("base", ["llama", "gpt2", "gpt_neox", "mixtral"], indirect=True)
@pytest.mark.parametrize("memory", ["64GB", "1MB"], ids=["paused", "again"])
def test_base_stream_equals_the_base_model(
    base: Path, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, torch.Tensor] = {}
    finish = Attempt._finish

    def look(self: Attempt, walk: BlockWalk, *rest: object) -> QuantizationReport:
        for name in (BASE_CALIBRATION, CALIBRATION):
            files = walk.states.at(name, self.num_blocks)
            seen[name] = torch.cat([files.read(i) for i in range(len(files))])
        return finish(self, walk, *rest)

    monkeypatch.setattr(Attempt, "_finish", look)
    quantize(base, tmp_path / "out", CONFIG, resources=ResourceConfig(memory=memory))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    expected = []
    blocks = find_blocks(model).modules
    blocks[-1].register_forward_hook(
        lambda _m, _x, y: expected.append(y[0] if isinstance(y, tuple) else y)
    )
    with torch.no_grad():
        model(torch.tensor(IDS))
    torch.testing.assert_close(seen[BASE_CALIBRATION], expected[0], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(seen[CALIBRATION], expected[0], rtol=1e-3, atol=1e-3)


def test_quantized_stream_gets_closer_to_the_base(base: Path, tmp_path: Path) -> None:
    """Wide enough noise: two bits, so that the drift is large."""
    distances = {}
    for name, settings in PRESETS.items():
        config = QuantConfig(bits=2, group_size=32, **settings)
        quantize(base, tmp_path / name, config)
        plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        rounded = halfbyte.load(tmp_path / name, dtype=torch.float32)
        with torch.no_grad():
            ids = torch.tensor(IDS)
            distances[name] = float((plain(ids).logits - rounded(ids).logits).square().mean())
    assert distances["balanced"] < 0.9 * distances["fast"]


def test_each_module_has_a_note_on_its_target(base: Path, tmp_path: Path) -> None:
    report = quantize(base, tmp_path / "out", CONFIG)
    notes = {m.name: " ".join(m.notes) for m in report.modules}
    assert "base model's outputs" not in notes["model.layers.0.self_attn.q_proj"]
    assert all("rows polished" in text for text in notes.values())
    assert "targets" in notes["model.layers.2.mlp.down_proj"]


def test_experts_are_left_out_with_the_reason(tmp_path: Path) -> None:
    build_family("mixtral").save_pretrained(tmp_path / "base")
    report = quantize(tmp_path / "base", tmp_path / "out", CONFIG)
    experts = [m for m in report.modules if "experts" in m.name]
    assert experts
    assert all("targets its own outputs" in " ".join(m.notes) for m in experts)


def test_too_little_text_is_noted(base: Path, tmp_path: Path) -> None:
    report = halfbyte.quantize(
        base,
        tmp_path / "out",
        config=CONFIG,
        calibration=CalibrationConfig(samples=2, length=32),
        text=IDS[:2],
    )
    assert all("too little text" in " ".join(m.notes) for m in report.modules)


@pytest.mark.parametrize("base", ["llama", "mixtral"], indirect=True)
def test_keeping_and_rerunning_passes_write_the_same_bytes(base: Path, tmp_path: Path) -> None:
    config = QuantConfig(group_size=32, **{**PRESETS["best"], "tune_steps": 4})
    for name, memory in (("paused", "64GB"), ("again", "1MB")):
        quantize(base, tmp_path / name, config, resources=ResourceConfig(memory=memory))
    for path in (tmp_path / "paused").glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
