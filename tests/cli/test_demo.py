import json
import pickle
from pathlib import Path
from unittest.mock import create_autospec

import pytest
import torch

from halfbyte import demo as module
from halfbyte.cli.demo import make_step_progress
from halfbyte.cli.main import main
from halfbyte.demo import DemoResult, Step, run_demo
from halfbyte.evaluate.divergence import DivergenceAccumulator
from halfbyte.quantize.progress import PlainProgress


@pytest.fixture
def shown(monkeypatch):
    accumulator = DivergenceAccumulator()
    logits = torch.randn(3, 10, 7, generator=torch.Generator().manual_seed(0))
    accumulator.update(logits, logits * 1.5, logits.argmax(dim=2))
    result = DemoResult(
        base=Path("demo/base"),
        quantized=Path("demo/small"),
        base_bytes=269_060_552,
        quantized_bytes=112_700_000,
        bits_per_weight=4.28125,
        divergence=accumulator.result(),
        prompt="Why?",
        base_answer="Because [of] that.",
        quantized_answer="Because of this.",
        steps=(
            Step(name="Get", seconds=16.0, peak_memory_bytes=1_500_000_000, note="written"),
            Step(name="Quantize", seconds=80.25, peak_memory_bytes=2_000_000, note="done"),
        ),
    )
    fake = create_autospec(run_demo, return_value=result)
    monkeypatch.setattr(module, "run_demo", fake)
    return fake


def test_tables_have_size_quality_cost_and_answers(shown, capsys):
    assert main(["demo", "--wheel", "w.whl"]) == 0
    out = capsys.readouterr().out
    compared = shown.return_value.divergence
    for part in (
        "269.1 MB",
        "112.7 MB",
        "4.28",
        f"{compared.base.perplexity:.2f} ± {compared.base.standard_error:.2f}",
        f"{compared.kl_nats:.4f} ± {compared.kl_standard_error:.4f}",
        f"{100 * compared.top1_agreement:.1f}",
        "3 windows of 11 tokens",
        "80.2",
        "1500.0 MB",
        "96.2",
        "16 bits: Because [of] that.",
        "4 bits: Because of this.",
        "demo/small",
    ):
        assert part in out
    assert shown.call_args.args == (Path("demo"),)
    assert shown.call_args.kwargs["wheel"] == Path("w.whl")


def test_json_has_every_field(shown, capsys):
    assert main(["demo", "--folder", "d", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == shown.return_value.to_dict() | {
        "steps": [
            {"name": s.name, "seconds": s.seconds, "peak_memory_bytes": s.peak_memory_bytes}
            | {"note": s.note}
            for s in shown.return_value.steps
        ]
    }
    assert shown.call_args.args == (Path("d"),)


def test_progress_can_be_made_in_another_process():
    assert isinstance(pickle.loads(pickle.dumps(make_step_progress))(), PlainProgress)
