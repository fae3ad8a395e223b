"""Comparing a calibration text with a workload: the same kind is close, another is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.helpers.families import VOCABULARY, build_family

from halfbyte.cli import main as cli
from halfbyte.errors import CalibrationError
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize.inspection import APART, CLOSE, FAR, inspect_calibration

CONFIG = CalibrationConfig(samples=24, length=32)


def text(seed: int, low: int = 0, high: int = VOCABULARY, count: int = 24) -> list[list[int]]:
    """Token ids of a kind: drawn from a range."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 32), generator=generator).tolist()


@pytest.fixture
def model() -> torch.nn.Module:
    return build_family("llama")


def test_other_text_of_the_same_kind_is_close(model: torch.nn.Module) -> None:
    found = inspect_calibration(model, text(0), text(1), config=CONFIG)
    assert found.verdict == CLOSE
    assert found.ratio < 1.5
    assert found.coverage == pytest.approx(1.0, abs=0.01)
    assert len(found.layers) == 21
    assert "times as far" in found.reasons[0]
    assert found.calibration_perplexity == pytest.approx(found.workload_perplexity, rel=0.1)


def test_text_of_another_kind_is_not(model: torch.nn.Module) -> None:
    found = inspect_calibration(model, text(0, 0, 20), text(1, 100), config=CONFIG)
    assert found.verdict in (APART, FAR)
    assert found.ratio > 2
    assert found.coverage == 0
    assert "100% of the workload's tokens do not occur" in found.reasons[1]


def test_missing_tokens_alone_keep_a_text_from_being_close(model: torch.nn.Module) -> None:
    found = inspect_calibration(model, text(0, 0, 110), text(1), config=CONFIG)
    assert 0.05 < 1 - found.coverage < 0.25
    assert found.verdict in (APART, FAR)


def test_perplexity_is_that_of_the_perplexity_command(model: torch.nn.Module) -> None:
    from halfbyte.evaluate.perplexity import perplexity

    found = inspect_calibration(model, text(0), text(1), config=CONFIG)
    whole = [token for row in text(1) for token in row]
    expected = perplexity(model, whole, window=32)
    assert found.workload_perplexity == pytest.approx(expected.perplexity, rel=1e-4)


def test_no_hook_is_left_on_the_model(model: torch.nn.Module) -> None:
    inspect_calibration(model, text(0), text(1), config=CONFIG)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_workload_too_short_to_be_split_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"holds 3 sequences of 32 tokens; 4 are needed"):
        inspect_calibration(model, text(0), text(1, count=3), config=CONFIG)


def test_workload_that_repeats_itself_is_refused(model: torch.nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"halves of the workload .* are the same"):
        inspect_calibration(model, text(0), text(1, count=4) * 2, config=CONFIG)


def test_the_command_prints_and_draws(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], model: torch.nn.Module
) -> None:
    model.save_pretrained(tmp_path / "model")
    for name, rows in (("mine.jsonl", text(0)), ("theirs.jsonl", text(1))):
        lines = [json.dumps({"input_ids": ids}) for ids in rows]
        (tmp_path / name).write_text("\n".join(lines))
    words = ["calibration", "inspect", str(tmp_path / "mine.jsonl")]
    words += ["--against", str(tmp_path / "theirs.jsonl"), "--model", str(tmp_path / "model")]
    words += ["--length", "32", "--plot", str(tmp_path / "picture.png")]
    assert cli.main(words) == 0
    assert "Verdict: close" in capsys.readouterr().out
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == CLOSE
