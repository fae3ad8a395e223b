"""The verbs finetune, merge and repair from the command line, in the order of a user."""

from __future__ import annotations

import json
import re

import pytest
from tests.helpers.checkpoints import tiny_llama_config
from tests.helpers.families import token_lists
from tests.helpers.runs import quantize
from tests.helpers.tiny_llama import build_tokenizer
from transformers import AutoModelForCausalLM

from halfbyte.cli.main import main
from halfbyte.quant_config import QuantConfig

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

TRAIN = ["--epochs", "1", "--batch-size", "8", "--length", "32", "--rank", "4", "--device", "cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """original/, base/ (2 bits) and train.jsonl."""
    root = tmp_path_factory.mktemp("cli")
    config = tiny_llama_config(vocab_size=64, hidden_size=64)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "original")
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(root / "original")
    text = [[token % 64 for token in row] for row in token_lists(6, 32)]
    quantize(root / "original", root / "base", QuantConfig(bits=2, group_size=32), text=text)
    rows = [{"prompt": f"w{i} ", "completion": f"w{i + 1} w{i + 2}"} for i in range(40)]
    (root / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def run(capsys, *words):
    code = main([str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_from_data_to_one_model(folder, capsys):
    data, adapter = folder / "train.jsonl", folder / "adapter"
    code, out, err = run(
        capsys, "finetune", folder / "base", "--data", data, "-o", adapter, *TRAIN, "--json"
    )
    assert code == 0, err
    report = json.loads(out)
    assert report["steps"] == 5
    assert "36 examples in 36 rows" in err
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folder / "base")

    code, out, err = run(
        capsys, "finetune", folder / "base", "--data", data, "-o", adapter, *TRAIN, "--resume"
    )
    assert code == 0, err
    assert "5; kept: step" in out

    code, out, err = run(
        capsys, "merge", folder / "base", adapter, "-o", folder / "merged", "--data", data
    )
    assert code == 0, err
    assert "KL to base plus adapter" in out
    assert "in 16 bits, on the task" in out
    assert re.search("Keeps the task|Loses part of the task|Cannot tell", out)
    assert err == "", "no bars and remarks of other libraries"

    code, out, err = run(
        capsys, "merge", folder / "base", adapter, "-o", folder / "again", "--data", data,
        "--quantize", "--samples", 6, "--length", 32, "--json",
    )  # fmt: skip
    assert code == 0, err
    report = json.loads(out)
    assert set(report["scores"]) == {"adapted", "merged", "quantized"}
    assert report["verdict"].startswith(("Keeps the task", "Loses part of the task", "Cannot tell"))
    labels = json.loads((folder / "again" / "quantize_config.json").read_text())
    assert (labels["bits"], labels["group_size"]) == (2, 32)


def test_repair(folder, capsys):
    code, out, err = run(
        capsys, "repair", folder / "base", folder / "original", "-o", folder / "repair",
        "--rank", 4, "--samples", 4, "--length", 32,
    )  # fmt: skip
    assert code == 0, err
    assert "14, rank 4" in out
    assert (folder / "repair" / "adapter_model.safetensors").is_file()


def test_quantizing_a_merge_needs_the_tasks_data(folder, capsys):
    code, _, err = run(capsys, "merge", folder / "base", "x", "-o", folder / "x", "--quantize")
    assert code == 2
    assert "--quantize needs --data" in err


def test_wrong_setting_is_a_usage_error(folder, capsys):
    code, _, err = run(
        capsys, "finetune", folder / "base", "--data", folder / "none", "-o", folder / "y",
        "--rank", "0",
    )  # fmt: skip
    assert code == 2
    assert "rank is 0; it must be a whole number, 1 or more" in err


def test_adapter_is_not_written_into_the_models_folder(folder, capsys):
    base, data = folder / "base", folder / "train.jsonl"
    code, _, err = run(capsys, "finetune", base, "--data", data, "-o", base / "adapter", *TRAIN)
    assert code == 2
    assert f"{base / 'adapter'} is inside the model's own folder {base}" in " ".join(err.split())
    assert not (base / "adapter").exists()
