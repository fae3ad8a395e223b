"""Token weights: correct gradients, and Hessians weighted by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import token_lists, write_decided_family
from tests.helpers.runs import assert_loads_and_computes, bytes_of, quantize
from torch import Tensor
from transformers import AutoModelForCausalLM

from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize import token_gradients
from halfbyte.quantize.attempt import WEIGHTS_FOLDER
from halfbyte.quantize.hessian import HessianAccumulator
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.target import CHECK_EVERY, MomentAccumulator
from halfbyte.quantize.token_weights import MAX_WEIGHT, TokenWeights

CPU = torch.device("cpu")
CONFIG = QuantConfig(group_size=32, weigh_tokens=True)
TEXT: dict[str, Any] = {
    "calibration": CalibrationConfig(samples=8, length=32, batch_size=2),
    "text": token_lists(8, 32),
}


def record_roots(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, ...], list[Tensor] | None]:
    """Keep what a run takes for each input."""
    found: dict[tuple[str, ...], list[Tensor] | None] = {}
    real = TokenWeights.roots

    def roots(self: TokenWeights, linears: Any, device: Any) -> list[Tensor] | None:
        found[tuple(linears)] = real(self, linears, device)
        return found[tuple(linears)]

    monkeypatch.setattr(TokenWeights, "roots", roots)
    return found


def naive_squares(base: Path, sequences: list[list[int]], counted: Tensor | None, seed: int) -> Any:
    """Squared gradients in float64 by the whole model's own backward pass; draws as in a run."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    single = {}
    dice = torch.Generator().manual_seed(seed)
    drawn = []
    with torch.no_grad():  # what is drawn follows the run's own type
        for row in sequences:
            probabilities = model(torch.tensor([row])).logits[0].float().softmax(-1)
            drawn.append(token_gradients.sample_tokens(probabilities, dice))
    model = model.double()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            single[name] = []

            def watch(_m: Any, _i: Any, output: Tensor, name: str = name) -> None:
                output.register_hook(lambda g: single[name].append(g.square().sum(-1).flatten()))

            module.register_forward_hook(watch)
    for number, (row, tokens) in enumerate(zip(sequences, drawn, strict=True)):
        scores = model(torch.tensor([row])).logits[0].log_softmax(-1).gather(1, tokens)[:, 0]
        if counted is not None:
            scores = scores * counted[number].double().sqrt()
        scores.sum().backward()
    return {name: torch.cat(parts) for name, parts in single.items()}


@pytest.mark.parametrize("labelled", [False, True])
def test_weights_are_the_gradient_norms_of_the_whole_model(
    labelled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_decided_family(tmp_path / "base")
    found = record_roots(monkeypatch)
    text: Any = TEXT["text"]
    counted = None
    if labelled:
        text = [
            {"input_ids": row, "labels": [t if k % 3 else -100 for k, t in enumerate(row)]}
            for row in text
        ]
        counted = torch.tensor([[float((k + 1) % 3 > 0) for k in range(32)]] * 8)
        counted[:, -1] = 0.0
    quantize(tmp_path / "base", tmp_path / "out", CONFIG, **{**TEXT, "text": text})
    squares = naive_squares(tmp_path / "base", TEXT["text"], counted, seed=0)
    assert len(found) == 3 * 4, "every input of every block"
    for names, roots in found.items():
        assert roots is not None
        assert [len(part) for part in roots] == [64] * 4
        norms = torch.stack([squares[name] for name in names]).sum(0).sqrt()
        expected = (norms / norms.mean()).clamp(max=MAX_WEIGHT)
        expected = (expected / expected.mean()).sqrt().float()
        torch.testing.assert_close(torch.cat(roots), expected, rtol=1e-3, atol=1e-4)
        assert float(torch.cat(roots).std()) > 0.02, "they do differ"


def test_tokens_are_sampled_by_their_probability() -> None:
    wanted = torch.tensor([0.0, 0.5, 0.0, 0.2, 0.3 - 1e-3, 1e-3, 0.0])
    dice = torch.Generator().manual_seed(0)
    number = 100_000
    drawn = token_gradients.sample_tokens(wanted.repeat(number, 1), dice)
    counts = torch.bincount(drawn[:, 0], minlength=len(wanted))
    assert int(counts.sum()) == number
    assert not counts[wanted == 0].any(), "what cannot be is never drawn"
    error = (counts / number - wanted).abs()
    assert bool((error <= 5 * (wanted * (1 - wanted) / number).sqrt()).all())


def test_portions_are_independent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text that does not fit in memory at once goes in portions, each with its own draws."""
    write_decided_family(tmp_path / "base")
    found = record_roots(monkeypatch)
    monkeypatch.setattr(token_gradients, "BACKWARD_TOKENS", 100)  # a batch has 64
    quantize(tmp_path / "base", tmp_path / "out", CONFIG, **TEXT)
    parts = [
        naive_squares(tmp_path / "base", TEXT["text"][2 * k : 2 * k + 2], None, seed=k)
        for k in range(4)
    ]
    roots = found[("model.layers.1.mlp.down_proj",)]
    assert roots is not None
    norms = torch.cat([part["model.layers.1.mlp.down_proj"] for part in parts]).sqrt()
    expected = (norms / norms.mean()).clamp(max=MAX_WEIGHT)
    expected = (expected / expected.mean()).sqrt().float()
    torch.testing.assert_close(torch.cat(roots), expected, rtol=1e-3, atol=1e-4)


def test_weighted_sums_match_float64() -> None:
    dice = torch.Generator().manual_seed(0)
    plain = HessianAccumulator(40, CPU)
    moments = MomentAccumulator(40, CPU, drift=True)
    batches = []
    for number in range(CHECK_EVERY + 1):
        seen, base = (torch.randn(2, 30, 40, generator=dice) for _ in range(2))
        roots = torch.rand(60, generator=dice) * 2
        batches.append((seen.view(60, 40).double(), base.view(60, 40).double(), roots.double()))
        plain.update(seen, roots)
        moments.update(number, seen, base, roots)
    expected = sum((x * r[:, None] ** 2).t() @ x for x, _, r in batches)
    torch.testing.assert_close(plain.total().double(), expected, rtol=1e-5, atol=1e-3)
    halves = moments.moments()
    assert halves is not None
    for half, number in ((halves[1], CHECK_EVERY - 1),):
        x, b, r = batches[number]
        assert half.drift is not None
        weighted = x * r[:, None] ** 2
        torch.testing.assert_close(
            half.hessian.double(), weighted.t() @ x / 60, rtol=1e-4, atol=1e-4
        )
        drift = (b - x).t() @ weighted / 60
        torch.testing.assert_close(half.drift.double(), drift, rtol=1e-4, atol=1e-4)


def test_equal_weights_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_decided_family(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "plain", QuantConfig(group_size=32), **TEXT)
    quantize(tmp_path / "base", tmp_path / "weighted", CONFIG, **TEXT)
    ones = [torch.ones(64)] * 4
    monkeypatch.setattr(TokenWeights, "roots", lambda *_: ones)
    quantize(tmp_path / "base", tmp_path / "ones", CONFIG, **TEXT)
    tensors = [
        {name: data for name, data in bytes_of(tmp_path / folder).items() if "model-0" in name}
        for folder in ("plain", "weighted", "ones")
    ]
    assert tensors[0] == tensors[2]
    assert tensors[0] != tensors[1]


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt2", "phi3", "deepseek_v3"])
def test_other_families_and_experts(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linears whose tokens are routed to them count all alike; the rest is weighted."""
    base = write_decided_family(tmp_path / "base", family)
    found = record_roots(monkeypatch)
    config = QuantConfig(group_size=16, match_base=True, polish=1, weigh_tokens=True)
    quantize(tmp_path / "base", tmp_path / "out", config, **TEXT)
    assert found
    assert all(roots is not None for roots in found.values())
    routed = {name for names in found for name in names if ".experts." in name}
    assert not routed, "nobody asks for theirs"
    assert_loads_and_computes(base, open_checkpoint(tmp_path / "out"))


class StopAt(SilentProgress):
    def __init__(self, text: str) -> None:
        self.text = text

    def phase(self, name: str) -> None:
        if self.text in name:
            raise InterruptedError


def test_resumed_run_reuses_finished_portions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_decided_family(tmp_path / "base")
    monkeypatch.setattr(token_gradients, "BACKWARD_TOKENS", 100)
    quantize(tmp_path / "base", tmp_path / "whole", CONFIG, **TEXT)
    stop = StopAt("part 3 of 4")
    with pytest.raises(InterruptedError):
        quantize(tmp_path / "base", tmp_path / "out", CONFIG, progress=stop, **TEXT)
    parts = tmp_path / "out" / ".halfbyte" / WEIGHTS_FOLDER
    assert len(list(parts.iterdir())) == 2
    told: list[str] = []
    monkeypatch.setattr(SilentProgress, "phase", lambda _self, name: told.append(name))
    quantize(tmp_path / "base", tmp_path / "out", CONFIG, resume=True, **TEXT)
    assert [name[-6:] for name in told if "token weights" in name] == ["3 of 4", "4 of 4"]
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
