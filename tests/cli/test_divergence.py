import json
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from halfbyte.cli.divergence import divergence_rows
from halfbyte.cli.main import main
from halfbyte.evaluate import divergence as module
from halfbyte.evaluate.divergence import DivergenceAccumulator, divergence


def measure(windows):
    accumulator = DivergenceAccumulator()
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(windows, 40, 9, generator=generator)
    moved = base + torch.randn(base.shape, generator=generator) / 3
    accumulator.update(base, moved, base.argmin(dim=2))
    return accumulator.result(base_dtype="float32", quantized_dtype="bfloat16", note="A note.")


@pytest.fixture
def measured(monkeypatch):
    fake = create_autospec(divergence, return_value=measure(4))
    monkeypatch.setattr(module, "divergence", fake)
    return fake


def test_table_has_numbers_with_errors_and_the_windows(measured, capsys):
    assert main(["divergence", "base", "small", "--window", "41"]) == 0
    out = capsys.readouterr().out
    result = measured.return_value
    for part in (
        f"{result.kl_nats:.4f}",
        f"± {result.kl_standard_error:.4f}",
        f"{100 * result.top1_agreement:.1f}",
        f"{result.quantized.perplexity:.3f}",
        f"± {result.base.standard_error:.3f}",
        f"{result.perplexity_ratio:.4f}",
        "4 windows of 41 tokens (160 predicted)",
        "base float32, quantized bfloat16",
        "Note: A note.",
    ):
        assert part in out
    assert measured.call_args.args == (Path("base"), Path("small"))


def test_json_has_every_field(measured, capsys):
    assert main(["divergence", "base", "small", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    expected = measured.return_value.to_dict()
    assert values.items() >= expected.items()
    assert (values["base_model"], values["quantized_model"]) == ("base", "small")


def test_one_window_shows_no_error():
    rows = divergence_rows(measure(1))
    assert {row[2] for row in rows} == {"–", ""}
