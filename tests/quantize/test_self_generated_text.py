"""Self-generated calibration text: its distribution, seed, and reuse by a resumed run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.helpers.families import VOCABULARY, build_family, token_lists

import halfbyte
from halfbyte.errors import ModelError
from halfbyte.quant_config import CalibrationConfig, QuantConfig
from halfbyte.quantize import run_text
from halfbyte.quantize.attempt import Attempt
from halfbyte.quantize.progress import SilentProgress
from halfbyte.quantize.report import QuantizationReport
from halfbyte.quantize.self_generated_text import generate_text, save_text

CONFIG = CalibrationConfig(samples=5, length=24, batch_size=2)


def test_sequences_have_the_length_and_begin_a_text() -> None:
    seen: list[tuple[int, int]] = []
    found = generate_text(
        build_family("llama"), CONFIG, batch_size=2, on_batch=lambda *done: seen.append(done)
    )
    assert [len(ids) for ids in found] == [24] * 5
    assert {ids[0] for ids in found} == {1}, "BOS"
    assert all(0 <= token < VOCABULARY for ids in found for token in ids)
    assert seen == [(2, 5), (4, 5), (5, 5)]


@pytest.mark.parametrize(
    "settings",
    [
        {"eos_token_id": list(range(VOCABULARY))},
        {"repetition_penalty": 20.0},
        {"suppress_tokens": list(range(5, VOCABULARY))},
        {"min_p": 0.9},
    ],
)
def test_the_models_own_settings_do_not_change_the_text(settings: dict[str, Any]) -> None:
    model = build_family("llama", initializer_range=0.5)
    expected = generate_text(model, CONFIG)
    assert [len(ids) for ids in expected] == [24] * 5, "an end of text does not end a sequence"
    model.generation_config.update(**settings)
    assert generate_text(model, CONFIG) == expected
    for name, value in settings.items():
        assert getattr(model.generation_config, name) == value, "they stay the model's"


def test_seed_determines_the_text() -> None:
    model = build_family("llama")
    first, again = (generate_text(model, CONFIG) for _ in range(2))
    other = generate_text(model, CalibrationConfig(samples=5, length=24, seed=1))
    assert first == again
    assert first != other


@torch.no_grad()
def test_tokens_follow_the_models_own_distribution() -> None:
    """The second token over many sequences, against the softmax that it is drawn from."""
    model = build_family("llama", initializer_range=0.5)
    count = 4000
    found = generate_text(model, CalibrationConfig(samples=count, length=2), batch_size=count)
    drawn = torch.bincount(torch.tensor([ids[1] for ids in found]), minlength=VOCABULARY)
    chances = model(torch.tensor([[1]])).logits[0, -1].double().softmax(-1)
    spread = (chances * (1 - chances) / count).sqrt()
    assert bool(((drawn / count - chances).abs() < 5 * spread + 1e-3).all())
    assert float(chances.max()) > 3 / VOCABULARY, "far enough from uniform to tell"


def test_broken_model_is_refused() -> None:
    model = build_family("llama")
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(ModelError, match=r"cannot generate text in float32: .*for damage"):
        generate_text(model, CONFIG)


def test_array_of_ids_is_not_mistaken_for_self(tmp_path: Path) -> None:
    build_family("llama").save_pretrained(tmp_path / "base")
    report = halfbyte.quantize(
        tmp_path / "base",
        tmp_path / "out",
        config=QuantConfig(group_size=32),
        calibration=CONFIG,
        text=np.array(token_lists(5, 24)),
    )
    assert report.calibration.tokens == 5 * 24


def test_saved_text_can_be_loaded(tmp_path: Path) -> None:
    save_text([[1, 2, 3], [4, 5]], tmp_path / "own.jsonl")
    lines = (tmp_path / "own.jsonl").read_text().splitlines()
    assert lines == ['{"input_ids": [1, 2, 3]}', '{"input_ids": [4, 5]}']


def test_resumed_run_reuses_the_generated_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_family("llama").save_pretrained(tmp_path / "base")
    calls = []
    phases: list[str] = []

    class Watching(SilentProgress):
        def phase(self, name: str) -> None:
            phases.append(name)

    def count(*args: Any, **keywords: Any) -> list[list[int]]:
        calls.append(keywords)
        return generate_text(*args, **keywords)

    monkeypatch.setattr(run_text, "generate_text", count)

    def quantize(resume: bool) -> QuantizationReport:
        return halfbyte.quantize(
            tmp_path / "base",
            tmp_path / "out",
            config=QuantConfig(group_size=32),
            calibration=CONFIG,
            text="self",
            resume=resume,
            progress=Watching(),
        )

    finish = Attempt._finish
    monkeypatch.setattr(Attempt, "_finish", lambda *_: pytest.fail("stopped"))
    with pytest.raises(BaseException, match="stopped"):
        quantize(False)
    monkeypatch.setattr(Attempt, "_finish", finish)
    report = quantize(True)
    assert [(call["dtype"], call["device"]) for call in calls] == [
        (torch.float32, torch.device("cpu"))
    ], "as the run computes, on a machine with a GPU too"
    assert phases.count("generating calibration text with the model: 5 of 5") == 1
    assert report.calibration.samples == 5
    assert report.calibration.source.startswith("input-self-")
    assert quantize(True).calibration == report.calibration
    assert len(calls) == 1, "of a complete run it is not written again"
