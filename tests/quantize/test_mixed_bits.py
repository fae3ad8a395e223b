"""Choosing bits by sensitivity: correct losses, a near-optimal choice, a respected budget."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import token_lists, write_decided_family
from tests.helpers.runs import assert_loads_and_computes, bytes_of, quantize
from torch.nn import functional
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, Override, QuantConfig, Scheme
from halfbyte.quantize import mixed_precision, sensitivity
from halfbyte.quantize.bit_allocation import (
    Choice,
    Unit,
    allocate,
    budget_for_bits,
    budget_for_size,
    stored_bits,
)
from halfbyte.quantize.progress import SilentProgress

TEXT: dict[str, Any] = {
    "calibration": CalibrationConfig(samples=32, length=32, batch_size=8),
    "text": token_lists(32, 32),
}


def random_units(seed: int, number: int = 5) -> list[Unit]:
    dice = random.Random(seed)
    units = []
    for index in range(number):
        weights = dice.choice([64, 128, 512])
        loss = dice.uniform(0.1, 1)
        choices = []
        for bits in (2, 3, 4, 8):
            choices.append(Choice(bits=bits, stored_bits=bits * weights, loss=loss))
            loss *= dice.uniform(0.1, 1.05)  # now and then more bits are worse
        units.append(Unit(linears=(f"m{index}",), num_weights=weights, choices=tuple(choices)))
    return units


@pytest.mark.parametrize("seed", range(30))
def test_allocation_is_optimal_for_the_storage_that_it_uses(seed: int) -> None:
    units = random_units(seed)
    total = sum(unit.num_weights for unit in units)
    for target in (2.0, 2.7, 3.5, 5.0, 8.0):
        found = allocate(units, int(target * total))
        used = round(found.bits_per_weight * total)
        assert used <= target * total
        assert set(found.bits) == {f"m{i}" for i in range(len(units))}
        every = [
            (sum(c.stored_bits for c in picks), sum(c.loss for c in picks))
            for picks in itertools.product(*(unit.choices for unit in units))
        ]
        # The optimum of a budget lies at most one step of one unit away.
        step = max(u.choices[-1].stored_bits - u.choices[0].stored_bits for u in units)
        best_below = min(loss for bits, loss in every if bits <= used - step or bits == 2 * total)
        assert found.predicted_kl <= best_below + 1e-12
        if target == 2.0:
            assert used == 2 * total
        if target == 8.0:
            assert found.predicted_kl == pytest.approx(min(loss for _, loss in every))


def test_impossible_budgets_are_refused_with_the_minimum() -> None:
    units = random_units(0)
    with pytest.raises(ConfigError, match=r"target_bits is 1.9; .* is 2\.000 bits per weight"):
        budget_for_bits(1.9, units)
    total = sum(unit.num_weights for unit in units)
    with pytest.raises(ConfigError, match=rf"not quantized take 1\.0 kB.* least {total // 4} B"):
        budget_for_size(1000, 1000, units)
    assert budget_for_size(1000 + total, 1000, units) == 8 * total


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (Scheme(bits=4, group_size=128, symmetric=True), 64 * (4 * 576 + 5 * 20)),
        (Scheme(bits=3, group_size=-1, symmetric=True), 64 * (3 * 576 + 19)),
    ],
)
def test_storage_counts_scales_and_zeros(scheme: Scheme, expected: int) -> None:
    assert stored_bits(scheme, 64, 576) == expected


def test_predicted_losses_are_those_that_single_modules_cause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "base"
    write_decided_family(base, num_hidden_layers=2)
    seen: list[Unit] = []
    real = sensitivity.SensitivityAnalysis.measure

    def measure(self: sensitivity.SensitivityAnalysis, batches: Any) -> list[Unit]:
        seen.extend(real(self, batches))
        return seen

    monkeypatch.setattr(mixed_precision.SensitivityAnalysis, "measure", measure)
    quantize(base, tmp_path / "x", QuantConfig(group_size=32, target_bits=4.0), **TEXT)
    assert [len(unit.linears) for unit in seen] == [3, 1, 2, 1] * 2
    exact = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    ids = torch.tensor(token_lists(32, 32, seed=7))
    with torch.no_grad():
        wanted = exact(ids).logits.log_softmax(-1)
    names = [name for unit in seen for name in unit.linears]
    pairs = []
    for number, unit in enumerate(seen):
        for bits in (3, 4):
            skip = tuple(f"^{name}$" for name in names if name not in unit.linears)
            config = QuantConfig(bits=bits, group_size=32, skip=skip)
            folder = tmp_path / f"{number}-{bits}"
            quantize(base, folder, config, **TEXT)
            with torch.no_grad():
                found = halfbyte.load(folder, dtype=torch.float32)(ids).logits.log_softmax(-1)
            kl = functional.kl_div(found, wanted, reduction="sum", log_target=True) / ids.numel()
            (predicted,) = (c.loss for c in unit.choices if c.bits == bits)
            pairs.append((predicted, float(kl)))
    predicted, true = torch.tensor(pairs).log().unbind(1)
    assert float((predicted - true).abs().median()) < 0.35, "within 40%, half of them"
    assert float((predicted - true).abs().max()) < 1.2
    assert float(torch.corrcoef(torch.stack([predicted, true]))[0, 1]) > 0.9


def test_mean_bits_stay_below_the_target_and_beat_the_same_bits_everywhere(tmp_path: Path) -> None:
    base = write_decided_family(tmp_path / "base", num_hidden_layers=4)
    target = 3 + 19 / 32  # what 3 bits in groups of 32 take
    config = QuantConfig(group_size=32, target_bits=target)
    report = quantize(tmp_path / "base", tmp_path / "out", config, **TEXT)
    assert target - 0.25 < report.bits_per_weight <= target
    bits = {module.name: module.bits for module in report.modules}
    assert len(set(bits.values())) > 1
    for block in range(4):
        attention = f"model.layers.{block}.self_attn"
        assert len({bits[f"{attention}.{n}_proj"] for n in "qkv"}) == 1, "readers fuse them"
        assert len({bits[f"model.layers.{block}.mlp.{n}_proj"] for n in ("gate", "up")}) == 1
    assert any("bits chosen by measured sensitivity" in note for note in report.notes)
    assert_loads_and_computes(base, open_checkpoint(tmp_path / "out"))
    quantize(tmp_path / "base", tmp_path / "same", QuantConfig(bits=3, group_size=32), **TEXT)
    ids = torch.tensor(token_lists(32, 32, seed=7))
    kls = []
    with torch.no_grad():
        exact = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
        wanted = exact(ids).logits.log_softmax(-1)
        for name in ("out", "same"):
            model = halfbyte.load(tmp_path / name, dtype=torch.float32)
            found = model(ids).logits.log_softmax(-1)
            kls.append(float(functional.kl_div(found, wanted, reduction="sum", log_target=True)))
    assert kls[0] < kls[1]


@pytest.mark.parametrize(("family", "share"), [("llama", 0.36), ("qwen3_moe", 0.42)])
def test_size_of_the_checkpoint_stays_below_the_target(
    family: str, share: float, tmp_path: Path
) -> None:
    base = write_decided_family(tmp_path / "base", family)
    whole = sum(path.stat().st_size for path in (tmp_path / "base").glob("*.safetensors"))
    target = int(share * whole)
    config = QuantConfig(group_size=32, target_size=f"{target / 1000}kB")
    report = quantize(tmp_path / "base", tmp_path / "out", config, **TEXT)
    assert {module.bits for module in report.modules} != {8}, "a target that means something"
    assert 0.8 * target < report.checkpoint_bytes <= target, "tiny models are half names"
    if family == "qwen3_moe":
        experts = {m.block: set() for m in report.modules}
        for module in report.modules:
            if ".experts." in module.name:
                experts[module.block].add(module.bits)
        assert all(len(bits) == 1 for bits in experts.values()), "one layer, one kernel"
    assert_loads_and_computes(base, open_checkpoint(tmp_path / "out"))


@pytest.mark.parametrize(
    ("family", "overrides", "expected"),
    [
        # Who is fused with a fixed one follows it, whichever comes first.
        ("llama", {"v_proj": 8}, {"q_proj": {8}, "k_proj": {8}, "v_proj": {8}}),
        ("llama", {"q_proj": 8, "k_proj": 4, "v_proj": 3}, {"q_": {8}, "k_": {4}, "v_": {3}}),
        ("mixtral", {"experts.0.w2": 8}, {"experts": {8}}),
        ("mixtral", {"w2": 8, "w1|w3": 4}, {"w2": {8}, "w1": {4}, "w3": {4}}),
    ],
)
def test_overrides_fix_bits(
    family: str, overrides: dict[str, int], expected: dict[str, set[int]], tmp_path: Path
) -> None:
    write_decided_family(tmp_path / "base", family, num_hidden_layers=1)
    config = QuantConfig(
        group_size=32,
        target_bits=8.2,
        overrides=tuple(Override(pattern=p, bits=bits) for p, bits in overrides.items()),
    )
    report = quantize(tmp_path / "base", tmp_path / "out", config, **TEXT)
    for part, bits in expected.items():
        assert {m.bits for m in report.modules if part in m.name} == bits
    assert report.bits_per_weight <= 8.2
    counted = [note for note in report.notes if f"{report.bits_per_weight:.3f} per weight" in note]
    assert len(counted) == 1, report.notes


def test_overrides_that_part_what_is_fused_are_refused(tmp_path: Path) -> None:
    write_decided_family(tmp_path / "base", num_hidden_layers=1)
    fixed = (Override(pattern="q_proj", bits=8), Override(pattern="k_proj", bits=4))
    config = QuantConfig(group_size=32, target_bits=6.0, overrides=fixed)
    with pytest.raises(
        ConfigError,
        match=r"Cannot choose bits for model\.layers\.0\.self_attn\.v_proj: .* \(model\.layers\.0"
        r"\.self_attn\.q_proj to 8, model\.layers\.0\.self_attn\.k_proj to 4\)",
    ):
        quantize(tmp_path / "base", tmp_path / "out", config, **TEXT)


class StopAt(SilentProgress):
    def __init__(self, block: int) -> None:
        self.block = block

    def block_started(self, index: int, count: int) -> None:
        if index == self.block:
            raise InterruptedError


def test_a_killed_run_keeps_its_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_decided_family(tmp_path / "base")
    config = QuantConfig(
        group_size=32, target_bits=4.0, overrides=(Override(pattern="o_proj", bits=8),)
    )
    whole = quantize(tmp_path / "base", tmp_path / "whole", config, **TEXT)
    assert {m.bits for m in whole.modules if "o_proj" in m.name} == {8}, "an override decides"
    with pytest.raises(InterruptedError):
        quantize(tmp_path / "base", tmp_path / "out", config, progress=StopAt(1), **TEXT)
    monkeypatch.setattr(mixed_precision, "SensitivityAnalysis", None)  # it must not measure again
    report = quantize(tmp_path / "base", tmp_path / "out", config, resume=True, **TEXT)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    assert report.notes == whole.notes


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_bits": 3.0, "target_size": "4GB"}, "target_bits is 3 and target_size is 4GB"),
        ({"target_size": "4"}, "target_size is '4'; write a number and a unit"),
        ({"target_bits": 2.0}, "target_bits is 2; allowed is more than 2, and 9 at most"),
    ],
)
def test_targets_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantConfig(**settings)
