"""Block tuning: correct gradients, a held-out check, and no traces left on the block."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.helpers.families import build_family, token_lists
from torch import nn

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize import block_tuning
from halfbyte.quantize.block_tuning import (
    BlockTuning,
    TunedLinear,
    TuningData,
    _RoundedWeight,
    tune_block,
)
from halfbyte.quantize.grid import Grid, assign_groups, search_grid, sum_groups
from halfbyte.quantize.report import QuantizationReport

WIDTH, HIDDEN = 32, 48


class Block(nn.Module):
    """Two linears with a nonlinearity between them, which no Hessian of one of them includes."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.silu(self.up(x)))


def rounded_block(bits: int) -> tuple[Block, dict[str, tuple[Grid, torch.Tensor, torch.Tensor]]]:
    block = Block(0)
    linears = {}
    for name in ("up", "down"):
        linear = block.get_submodule(name)
        weight = linear.weight.data
        g_idx = assign_groups(weight.shape[1], 16)
        ones = torch.ones(weight.shape[1])
        grid = search_grid(weight, ones, g_idx, bits=bits, symmetric=True)
        codes = grid.round_to_nearest(weight)
        linears[name] = (grid, codes, weight)
        linear.weight = nn.Parameter(grid.dequantize(codes), requires_grad=False)
    return block, linears


def data(block: Block, num_batches: int = 8) -> TuningData:
    generator = torch.Generator().manual_seed(3)
    x = [torch.randn(64, WIDTH, generator=generator) for _ in range(num_batches)]
    exact = Block(0)
    return TuningData(
        run=lambda batch: block(x[batch]),
        target=lambda batch: exact(x[batch]),
        num_batches=num_batches,
    )


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_held_out_error_decreases_and_matches_the_tuned_weights(bits: int) -> None:
    block, linears = rounded_block(bits)
    before = {name: block.get_submodule(name).weight for name in linears}
    text = data(block)
    found = tune_block(block, linears, text, steps=80, seed=0)
    assert found.after < 0.97 * found.before
    for name, weight in before.items():
        assert block.get_submodule(name).weight is weight
        assert "weight" not in block.get_submodule(name).__dict__
    for name, tuned in found.linears.items():
        assert int(tuned.codes.max()) < 2**bits
        assert torch.equal(tuned.grid.scales, tuned.grid.scales.half().float())
        assert bool((tuned.codes != linears[name][1]).any())
        weight = tuned.grid.dequantize(tuned.codes)
        block.get_submodule(name).weight = nn.Parameter(weight, requires_grad=False)
    assert text.measure_held_out_error() == pytest.approx(found.after, rel=1e-4)


def test_codes_move_by_one_at_most() -> None:
    block, linears = rounded_block(4)
    found = tune_block(block, linears, data(block), steps=30, seed=0)
    for name, tuned in found.linears.items():
        move = tuned.codes.int() - linears[name][1].int()
        assert int(move.abs().max()) == 1


def test_same_seed_same_result() -> None:
    results = []
    for _ in range(2):
        block, linears = rounded_block(3)
        results.append(tune_block(block, linears, data(block), steps=20, seed=7))
    for name in ("up", "down"):
        first, second = (result.linears[name] for result in results)
        assert torch.equal(first.codes, second.codes)
        assert torch.equal(first.grid.scales, second.grid.scales)


def test_without_improvement_on_held_out_text_nothing_changes() -> None:
    block, linears = rounded_block(8)
    text = data(block)
    target = text.target
    # On held-out text the block's present output is the target.
    start = {batch: text.run(batch).clone() for batch in text.held_out}
    text.target = lambda batch: start.get(batch, target(batch))
    found = tune_block(block, linears, text, steps=10, seed=0)
    assert not found.linears
    assert found.after == found.before


def test_gradients_are_straight_through_inside_the_code_range() -> None:
    latent = torch.tensor([[0.4, -2.2, 9.0, -9.0]], requires_grad=True)
    scales = torch.tensor([[0.5, -2.0]], requires_grad=True)
    lowest, highest = torch.full((1, 4), -8.0), torch.full((1, 4), 7.0)
    g_idx = torch.tensor([0, 0, 1, 1])
    weight = _RoundedWeight.apply(latent, scales, lowest, highest, g_idx, torch.float32)
    assert weight.tolist() == [[0.0, -1.0, -14.0, 16.0]]
    weight.backward(torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert latent.grad is not None
    assert scales.grad is not None
    assert latent.grad.tolist() == [[0.5, 1.0, 0.0, 0.0]]
    assert scales.grad.tolist() == [[2.0 * -2, 3.0 * 7 + 4.0 * -8]]


@pytest.mark.parametrize("width", [32, 24])
def test_group_sums_in_any_order(width: int) -> None:
    values = torch.randn(3, width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    for g_idx in (assign_groups(width, 16), assign_groups(width, 16, order)):
        expected = torch.stack([values[:, g_idx == g].sum(1) for g in range(2)], 1)
        torch.testing.assert_close(sum_groups(values, g_idx, 2), expected)


def quantize(base: Path, output: Path) -> QuantizationReport:
    return halfbyte.quantize(
        base,
        output,
        config=QuantConfig(bits=2, group_size=32, match_base=True, tune_steps=8),
        calibration=CalibrationConfig(samples=16, length=32, batch_size=2),
        text=token_lists(16, 32),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_run_tries_to_tune_every_block(family: str, tmp_path: Path) -> None:
    build_family(family).save_pretrained(tmp_path / "base")
    report = quantize(tmp_path / "base", tmp_path / "out")
    assert all("tuned" in " ".join(module.notes) for module in report.modules)
    assert report.seconds_by_phase["tune"] > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_tuned_codes_are_written_and_used_in_the_run(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inverted codes stand in for a successful tuning; the run's reload check must agree."""

    def turn(block: nn.Module, linears: dict[str, tuple], data: object, **_: object) -> BlockTuning:
        tuned = {
            name: TunedLinear(grid=grid, codes=3 - codes)
            for name, (grid, codes, _weight) in linears.items()
        }
        return BlockTuning(linears=tuned, before=2.0, after=1.0)

    build_family(family).save_pretrained(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "plain")
    monkeypatch.setattr(block_tuning, "tune_block", turn)
    report = quantize(tmp_path / "base", tmp_path / "out")
    assert all("held-out error 50.0% of that before" in " ".join(m.notes) for m in report.modules)
    plain, turned = (halfbyte.open_checkpoint(tmp_path / name) for name in ("plain", "out"))
    first = next(name for name in turned.linears if ".0." in name)
    assert set(turned.linears) == set(plain.linears)
    # q -> 3 - q with the zero at 2 is w -> -w - scale.
    assert not torch.equal(turned.dequantize(first), plain.dequantize(first))


def test_tuning_needs_match_base() -> None:
    with pytest.raises(ConfigError, match="Set match_base"):
        QuantConfig(tune_steps=10)
