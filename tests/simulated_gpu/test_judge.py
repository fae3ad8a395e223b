"""Measurements on a GPU equal those on the CPU."""

from __future__ import annotations

import json
from concurrent.futures import Future

import pytest
import torch
from tests.helpers.runs import quantize
from tests.helpers.tiny_llama import build_model, build_tokenizer

from halfbyte.cli.main import main
from halfbyte.judge import profile as profiling
from halfbyte.judge.compare import compare
from halfbyte.judge.setup import CompareConfig
from halfbyte.judge.tasks import read_tasks
from halfbyte.quant_config import QuantConfig

pytestmark = pytest.mark.simulated_gpu

WORDS = [f"w{i * i % 60}" for i in range(400)]


@pytest.fixture
def folders(tmp_path):
    """A model, and the same in 4 bits."""
    build_model(longest=64).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    text = torch.randint(4, 60, (6, 32), generator=torch.Generator().manual_seed(0)).tolist()
    config = QuantConfig(group_size=16)
    quantize(tmp_path / "base", tmp_path / "small", config, text=text, quality=False)
    return tmp_path / "base", tmp_path / "small"


def test_comparison(folders, tmp_path):
    choices = {"choices": [" w1", " w2 w5"], "answer": 0, "kind": "choice"}
    written = {"answer": " w1", "kind": "written", "max_new_tokens": 3}
    rows = [{"prompt": f"w{i} w{2 * i}", **(written if i % 2 else choices)} for i in range(8)]
    (tmp_path / "tasks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [
        compare(
            *folders,
            items=read_tasks([tmp_path / "tasks.jsonl"]),
            documents={"prose": [" ".join(WORDS[i : i + 60]) for i in (0, 50)]},
            config=CompareConfig(device=device, window=32, edge_cases=False),
            cache=tmp_path / device,
        )
        for device in ("cpu", "cuda")
    ]
    for part in ("verdict", "text", "layers", "generation", "overall", "noise", "notes"):
        assert getattr(found[0], part) == getattr(found[1], part), part
    assert found[1].layers is not None


@pytest.mark.parametrize("verb", ["perplexity", "divergence"])
def test_commands_print_the_same(folders, tmp_path, capsys, verb):
    (tmp_path / "text.txt").write_text(" ".join(WORDS))
    models = [str(folder) for folder in folders[verb == "perplexity" :]]
    options = ["--text", str(tmp_path / "text.txt"), "--window", "40", "--json"]
    found = []
    for device in ("cpu", "cuda"):
        assert main([verb, *models, *options, "--device", device]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]


def test_profile_measures_the_gpu(folders, monkeypatch):
    class Here:
        """Runs in this process what would start in another one, without the simulation."""

        def __init__(self, *_, **__): ...
        def __enter__(self):
            return self

        def __exit__(self, *_): ...
        def submit(self, work, *arguments):
            done = Future()
            done.set_result(work(*arguments))
            return done

    monkeypatch.setattr(profiling, "ProcessPoolExecutor", Here)
    result = profiling.profile(folders[1], requests=2, context=32, new_tokens=4, device="cuda")
    assert result.measured.prefill_seconds > 0
