"""End-to-end training: correct gradients, a lower KL, and resuming after a kill or interrupt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers.families import build_family, token_lists
from tests.helpers.runs import bytes_of, quantize
from torch.func import functional_call
from torch.nn import functional
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.errors import ConfigError
from halfbyte.model.blockwise_backward import BlockChain
from halfbyte.model.stream import BlockStream
from halfbyte.model.weights import ModelWeights
from halfbyte.quant_config import CalibrationConfig, QuantConfig, ResourceConfig
from halfbyte.quantize import end_to_end, end_to_end_stage
from halfbyte.quantize.end_to_end import EndToEndData, EndToEndTuning
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.report import QuantizationReport, load_report
from halfbyte.quantize.student import Student, TrainableTensor

CONFIG = QuantConfig(bits=2, group_size=32, match_base=True, end_to_end_steps=12)
TEXT: dict[str, Any] = {
    "calibration": CalibrationConfig(samples=128, length=24, batch_size=16),
    "text": token_lists(128, 24),
}


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger steps and a check after every fourth, because tiny random models change little."""
    monkeypatch.setattr(end_to_end, "RATE", 0.006)
    monkeypatch.setattr(end_to_end, "CHECK_STEPS", 4)


class Watching(SilentProgress):
    """Calls a function at every check."""

    def __init__(self, on_check: Callable[[int], None]) -> None:
        self.on_check = on_check

    def tuned(self, step: int, steps: int, kl: float, best: float) -> None:
        assert 0 < best <= kl or best == pytest.approx(kl)
        self.on_check(step)


def write_base(folder: Path, family: str = "llama") -> Path:
    model = build_family(family, num_hidden_layers=2)
    # A random head gives all tokens nearly the same probability, and there is nothing to learn.
    model.get_output_embeddings().weight.data.mul_(20)
    model.save_pretrained(folder)
    return folder


def tune(tmp_path: Path, name: str, config: QuantConfig = CONFIG, **keywords: Any) -> Any:
    base = tmp_path / "base"
    if not base.exists():
        write_base(base)
    return quantize(base, tmp_path / name, config, **{**TEXT, **keywords})


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_equal_those_of_the_whole_model(tmp_path: Path, weighted: bool) -> None:
    base = write_base(tmp_path / "base")
    folder = tmp_path / "out"
    report = quantize(base, folder, QuantConfig(bits=3, group_size=32, match_base=True), **TEXT)
    weights = ModelWeights(base, torch.device("cpu"))
    weights.load_outside()
    blocks = [[m.name for m in report.modules if m.block == b] for b in range(2)]
    shards = [folder / f"model-0000{b + 1}-of-00003.safetensors" for b in range(2)]
    student = Student(weights, shards, blocks, dtype=torch.float32, resident=False)
    stream = BlockStream(weights.model, weights.blocks, torch.float32)
    chain = BlockChain(stream, student.enter)
    ids = torch.tensor(token_lists(2, 24, seed=5))
    whole = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    hidden: list[torch.Tensor] = []
    whole.model.layers[-1].register_forward_hook(lambda _m, _x, y: hidden.append(y))
    wanted = whole(ids).logits.log_softmax(-1).detach()
    weights_of_tokens = torch.ones(ids.shape)
    if weighted:
        weights_of_tokens = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1))
        weights_of_tokens[weights_of_tokens < 0.5] = 0.0
    data = EndToEndData(
        ids=lambda _: ids,
        base=lambda _: hidden[0].detach(),
        num_batches=4,
        weights=(lambda batch: weights_of_tokens * (batch + 1)) if weighted else None,
    )
    tuning = EndToEndTuning(chain, student, data, tmp_path / "state", steps=1, seed=0)
    states = chain.forward([ids])
    gradient = tuning._gradient(0, ids, states[-1][0])
    assert list(chain.backward([ids], states, [gradient])) == [1, 0]

    checkpoint = open_checkpoint(folder)
    parameters = dict(whole.named_parameters())
    leaves = {}
    for name, number in student.trainable.items():
        leaves[name] = number.start.clone().requires_grad_()
        if name.endswith(".scales"):
            linear = name.removesuffix(".scales")
            packed = checkpoint.load_linear(linear)
            steps = (
                checkpoint.dequantize(linear) / packed.scales.t().float()[:, packed.g_idx.long()]
            )
            parameters[f"{linear}.weight"] = steps.round() * leaves[name][:, packed.g_idx.long()]
        else:
            parameters[name] = leaves[name]
    found = functional_call(whole, parameters, (ids,)).logits.log_softmax(-1)
    each = functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1)
    expected = (each * weights_of_tokens).sum() / weights_of_tokens.sum()
    # The first batch has half the mean weight of the three training batches, so half the gradient.
    (expected / 2 if weighted else expected).backward()
    assert tuning.measure_held_out_kl() == pytest.approx(float(expected.detach()), rel=1e-4)
    assert float(expected.detach()) > 1e-3
    for name, leaf in leaves.items():
        change = student.trainable[name].change.grad
        assert change is not None, name
        assert leaf.grad is not None
        torch.testing.assert_close(
            change, leaf.grad * student.trainable[name].unit, rtol=2e-3, atol=1e-6, msg=name
        )


def test_held_out_kl_decreases_and_the_checkpoint_holds_the_best_step(tmp_path: Path) -> None:
    looks: list[int] = []
    report = tune(tmp_path, "tuned", progress=Watching(looks.append))
    tuning = report.end_to_end
    assert tuning is not None
    assert looks == [0, 4, 8, 12]
    assert tuning.kl_after < 0.97 * tuning.kl_before
    assert (
        dict(tuning.looks)[tuning.kept_step] == tuning.kl_after == min(k for _, k in tuning.looks)
    )
    assert load_report(tmp_path / "tuned") == report
    assert all("scales were trained end to end" in " ".join(m.notes) for m in report.modules)
    plain = tune(tmp_path, "plain", QuantConfig(bits=2, group_size=32, match_base=True))
    assert plain.end_to_end is None
    ids = torch.tensor(token_lists(8, 24, seed=9))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    kls = {}
    with torch.no_grad():
        wanted = base(ids).logits.log_softmax(-1)
        for name in ("plain", "tuned"):
            model = halfbyte.load(tmp_path / name, dtype=torch.float32)
            found = model(ids).logits.log_softmax(-1)
            kls[name] = functional.kl_div(found, wanted, reduction="sum", log_target=True)
    assert kls["tuned"] < kls["plain"], "other text than any of the run"
    tuned, before = (open_checkpoint(tmp_path / name) for name in ("tuned", "plain"))
    for name in tuned.linears:
        one, two = tuned.load_linear(name), before.load_linear(name)
        assert torch.equal(one.qweight, two.qweight), "codes stay"
        assert not torch.equal(one.scales, two.scales)


def test_too_high_a_rate_is_reduced_and_the_best_step_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "RATE", 0.15)
    config = QuantConfig(bits=2, group_size=32, match_base=True, end_to_end_steps=24)
    report = tune(tmp_path, "out", config)
    assert report.end_to_end is not None
    looks = [kl for _, kl in report.end_to_end.looks]
    assert looks[1] > 1.2 * looks[0], "the first steps are far too large here"
    assert report.end_to_end.kl_after < 0.97 * looks[0], "and smaller ones from the start help"


def test_without_improvement_nothing_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "RATE", 0.0)
    report = tune(tmp_path, "tuned")
    assert report.end_to_end is not None
    assert report.end_to_end.kept_step == 0
    assert any("end-to-end training did not help" in note for note in report.notes)
    assert report.end_to_end.steps == end_to_end.PATIENCE * 4, "it gave up early"
    tune(tmp_path, "plain", QuantConfig(bits=2, group_size=32, match_base=True))
    assert bytes_of(tmp_path / "tuned") == bytes_of(tmp_path / "plain")


@pytest.mark.parametrize("family", ["mixtral", "gpt2", "qwen3"])
def test_other_families_and_a_rounded_head(family: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = build_family(family)
    for parameter in model.parameters():
        if parameter.dim() > 1:  # as in write_base, where the head may be the embedding
            parameter.data.mul_(5)
    model.save_pretrained(base)
    config = QuantConfig(bits=2, group_size=16, match_base=True, end_to_end_steps=8, lm_head=True)
    report = tune(tmp_path, "out", config)  # its own reload check compares every block
    assert report.end_to_end is not None
    assert report.end_to_end.kept_step > 0
    assert report.modules[-1].block is None, "the head"


@pytest.mark.parametrize("check", [0, 4, 12])
def test_interrupt_keeps_the_best_step(check: int, tmp_path: Path) -> None:
    def interrupt(step: int) -> None:
        if step == check:
            raise KeyboardInterrupt

    report = tune(tmp_path, "out", progress=Watching(interrupt))
    assert report.end_to_end is not None
    assert report.end_to_end.stopped
    assert report.end_to_end.steps == check
    assert (report.end_to_end.kept_step > 0) == (check > 0)


def test_killed_anywhere_it_resumes_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path, "whole")

    def fail_at(check: int) -> Watching:
        def fail(step: int) -> None:
            if step == look:
                raise InterruptedError

        return Watching(fail)

    for look in (0, 8):
        with pytest.raises(InterruptedError):
            tune(tmp_path, "killed", resume=True, progress=fail_at(look))
    # Then while the shards are rewritten.
    real = end_to_end_stage.rewrite_block
    calls: list[int] = []

    def rewrite(*args: Any, **keywords: Any) -> Any:
        entry = real(*args, **keywords)
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError
        return entry

    monkeypatch.setattr(end_to_end_stage, "rewrite_block", rewrite)
    with pytest.raises(InterruptedError):
        tune(tmp_path, "killed", resume=True)
    report: QuantizationReport = tune(tmp_path, "killed", resume=True)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole")
    assert report.end_to_end == load_report(tmp_path / "whole").end_to_end


def test_rereading_blocks_gives_the_same_bytes_as_keeping_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune(tmp_path, "kept", resources=ResourceConfig(memory="8GB"))
    kept: list[bool] = []
    real = Student.__init__

    def record(self: Student, *args: Any, **keywords: Any) -> None:
        kept.append(keywords["resident"])
        real(self, *args, **keywords)

    monkeypatch.setattr(Student, "__init__", record)
    tune(tmp_path, "read", resources=ResourceConfig(memory="1MB"))
    tune(tmp_path, "kept-2", resources=ResourceConfig(memory="8GB"))
    assert kept == [False, True]
    assert bytes_of(tmp_path / "read") == bytes_of(tmp_path / "kept")


@pytest.mark.parametrize(
    ("labelled", "reason"),
    [
        ((0, 1, 2), "none of the 2 batches held out has a token with a label"),
        ((3,), "none of the 6 batches to train on has a token with a label"),
    ],
)
def test_text_without_labels_where_they_are_needed(
    labelled: tuple[int, ...], reason: str, tmp_path: Path
) -> None:
    # Batches of 16; every fourth is held out. Truncated prompts leave rows without a label.
    rows = [
        {"input_ids": row, "labels": row if k // 16 % 4 in labelled else [-100] * len(row)}
        for k, row in enumerate(TEXT["text"])
    ]
    report = tune(tmp_path, "tuned", text=rows)
    assert report.end_to_end is None
    assert f"not trained end to end: {reason}" in report.notes


def test_too_little_text_to_hold_some_out(tmp_path: Path) -> None:
    few = {"calibration": CalibrationConfig(samples=2, length=24, batch_size=1)}
    report = tune(tmp_path, "out", **{**few, "text": token_lists(2, 24)})
    assert report.end_to_end is None
    assert "not trained end to end: too little text to hold some out" in report.notes


def test_numbers_are_evaluated_as_stored() -> None:
    scales = TrainableTensor.of_scales(torch.tensor([[0.01, -0.02]]))
    with torch.no_grad():
        scales.change.fill_(1e-3)
    value = scales.value()
    assert torch.equal(value.detach(), value.detach().half().float())
    value.sum().backward()
    assert scales.change.grad is not None
    torch.testing.assert_close(scales.change.grad, torch.tensor([[0.01, -0.02]]))
    gains = TrainableTensor.of_gains(torch.tensor([0.0, 2.0], dtype=torch.bfloat16))
    with torch.no_grad():
        gains.change.fill_(0.1)
    value = gains.value().detach()
    assert float(value[0]) > 0, "a gain of zero can move"
    assert torch.equal(value, value.bfloat16().float())
    small = torch.tensor([0.0, -1e-7, 2.0], dtype=torch.float16)
    value = TrainableTensor.of_gains(small).value().detach()
    assert torch.equal(value, small.float()), "only scales must not be 0"


@pytest.mark.parametrize(
    ("stored", "computing"), [("bfloat16", "float32"), ("float16", "bfloat16")]
)
def test_gains_are_those_of_the_files_whatever_the_dtype_of_computing(
    stored: str, computing: str, tmp_path: Path
) -> None:
    model = build_family("llama", num_hidden_layers=1)
    gains = model.model.layers[0].input_layernorm.weight
    gains.data.copy_(torch.linspace(0.5, 2, len(gains)))
    model.to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    small = {"calibration": CalibrationConfig(samples=2, length=24), "text": token_lists(2, 24)}
    report = quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32), **small)
    weights = ModelWeights(tmp_path / "base", torch.device("cpu"))
    weights.load_outside()
    names = [[module.name for module in report.modules]]
    shards = [tmp_path / "out" / "model-00001-of-00002.safetensors"]
    dtype = getattr(torch, computing)
    student = Student(weights, shards, names, dtype=dtype, resident=False)
    trained = student.trainable["model.layers.0.input_layernorm.weight"]
    assert torch.equal(trained.value().detach(), gains.float())
    with torch.no_grad():
        trained.change.fill_(1e-2)
    exported, _ = student.export_block(0)
    written = exported["model.layers.0.input_layernorm.weight"]
    assert torch.equal(trained.value().detach(), written.float())
    assert not torch.equal(written, gains)


def test_steps_without_match_base_are_refused() -> None:
    with pytest.raises(ConfigError, match="end_to_end_steps is 5 and match_base is False"):
        QuantConfig(end_to_end_steps=5)
