from __future__ import annotations

import json

import pytest
import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.tiny_llama import build_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("merge") / "base"
    config = tiny_llama_config(vocab_size=64, hidden_size=128, intermediate_size=256)
    write_checkpoint(folder, config, Recipe(symmetric=False, act_order=True, dtype=torch.bfloat16))
    tokenizer = build_tokenizer()
    tokenizer.pad_token = "<pad>"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "task.jsonl"
    rows = [{"prompt": f"w{i} w{i + 1} ", "completion": f"w{i + 2} w{i + 3}"} for i in range(50)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
