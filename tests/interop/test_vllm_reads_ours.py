"""Tiny checkpoints of ours in vLLM: which it takes, and what it makes of them."""

from __future__ import annotations

import json

import pytest
import torch
from bench.peers.environments import PEERS
from tests.interop.conftest import IDS, OURS
from tests.interop.peers import needs, run_program
from transformers import AutoModelForCausalLM

from halfbyte import open_checkpoint
from halfbyte.checkpoint.check import check_consumers

PEER = PEERS["vllm"]

pytestmark = [pytest.mark.interop, needs("vllm")]

WINDOWS = IDS[:2]


@pytest.fixture(scope="module")
def readings(ours_tiny, tmp_path_factory):
    """What vLLM reads with each of our checkpoints, or why it refuses it."""
    folder = tmp_path_factory.mktemp("vllm")
    files = {name: folder / f"{i}.json" for i, name in enumerate(OURS)}
    runs = [
        {"checkpoint": ours_tiny[name], "dtype": "float16", "output": file}
        for name, file in files.items()
    ]
    run_program(PEER, "vllm_read", {"windows": WINDOWS.tolist(), "runs": runs}, folder)
    refused = {name: file.with_name(f"{file.name}.refused") for name, file in files.items()}
    return {
        name: refused[name].read_text() if refused[name].exists() else json.loads(file.read_text())
        for name, file in files.items()
    }


@pytest.mark.parametrize("name", OURS)
def test_check_says_whether_vllm_takes_our_checkpoint(ours_tiny, readings, name):
    verdicts = check_consumers(open_checkpoint(ours_tiny[name])).verdicts
    (verdict,) = (v for v in verdicts if (v.consumer, v.tensor_parallel) == ("vllm-cpu", 1))
    taken = isinstance(readings[name], dict)
    assert verdict.loads == taken, verdict.reasons if taken else readings[name]


@torch.no_grad()
def test_what_vllm_takes_it_computes_as_we_do(ours_tiny, readings):
    taken = {name: found for name, found in readings.items() if isinstance(found, dict)}
    assert {"group 64", "group 32", "one group per row"} <= set(taken)
    for name, found in taken.items():
        model = AutoModelForCausalLM.from_pretrained(ours_tiny[name], dtype=torch.float32)
        logits = model(WINDOWS).logits[:, :-1]
        nll = -logits.log_softmax(-1).gather(-1, WINDOWS[:, 1:, None])[..., 0]
        # In fp16, on logits with a spread of some nats; a wrong weight moves the mean by about one.
        difference = (torch.tensor(found["nll"]) - nll).abs()
        assert difference.mean() < 0.02, (name, difference.mean())
        assert nll.std() > 1
