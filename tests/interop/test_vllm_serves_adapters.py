"""A PEFT adapter on our checkpoint: the same in PEFT, over the 16-bit base, and in vLLM."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from bench.peers.environments import PEERS
from tests.interop.conftest import IDS
from tests.interop.greedy import answer, check_is_greedy
from tests.interop.peers import needs, run_program
from transformers import AutoModelForCausalLM

from halfbyte.finetune.adapter import attach_adapter
from halfbyte.finetune.config import AdapterConfig
from halfbyte.finetune.loss import ChunkedLoss

PEER = PEERS["vllm"]

pytestmark = [
    pytest.mark.interop,
    needs("vllm"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

WINDOWS = IDS[:2]
PROMPTS = IDS[:4, :32].tolist()


@pytest.fixture(scope="module")
def adapter(ours_tiny, tmp_path_factory):
    """Trained on token ids, as the tiny model has no words of its own, and saved as always."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(ours_tiny["group 64"], dtype=torch.float32)
    model = attach_adapter(base, AdapterConfig(rank=8, dropout=0.0)).train()
    loss = ChunkedLoss(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(12):
        optimizer.zero_grad()
        loss({"input_ids": WINDOWS, "labels": WINDOWS}).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def rate(model):
    logits = model(WINDOWS).logits[:, :-1]
    return -logits.log_softmax(-1).gather(-1, WINDOWS[:, 1:, None])[..., 0]


def load(folder, adapter, dtype=torch.float32):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return peft.PeftModel.from_pretrained(model, adapter).eval()


def test_vllm_answers_as_peft_does(ours_tiny, adapter, tmp_path):
    base = ours_tiny["group 64"]
    output = tmp_path / "found.json"
    run = {"checkpoint": base, "dtype": "bfloat16", "adapter": adapter, "output": output}
    run_program(PEER, "vllm_read", {"windows": PROMPTS, "runs": [run]}, tmp_path)
    refused = output.with_name(f"{output.name}.refused")
    assert not refused.exists(), refused.read_text()
    replies = json.loads(output.read_text())["replies"]
    exact, rounded = load(base, adapter), load(base, adapter, torch.bfloat16)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    for prompt, reply in zip(PROMPTS, replies, strict=True):
        check_is_greedy(exact, rounded, prompt, reply)
        assert answer(plain, prompt, len(reply)) != reply, "the adapter changes nothing"


def test_it_is_the_same_adapter_on_the_16_bit_base(ours_tiny, tiny, adapter):
    base = ours_tiny["group 64"]
    adapted, dense = rate(load(base, adapter)), rate(load(tiny, adapter))
    plain = rate(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    # Off by what rounding the base cost, far from what the adapter does.
    assert (plain - adapted).abs().mean() > 0.5
    assert (dense - adapted).abs().mean() < 0.5 * (plain - adapted).abs().mean()
