"""AWQ and compressed-tensors that were converted from our GPTQ, in vLLM."""

from __future__ import annotations

import json

import pytest
import torch
from bench.peers.environments import PEERS
from tests.interop.conftest import IDS
from tests.interop.peers import needs, run_program
from transformers import AutoModelForCausalLM

from halfbyte.convert.run import ConversionConfig, convert

PEER = PEERS["vllm"]

pytestmark = [pytest.mark.interop, needs("vllm")]

WINDOWS = IDS[:2]
CASES = [
    ("group 64", "awq"),
    ("group 32", "awq"),
    ("asymmetric", "awq"),
    ("group 64", "compressed-tensors"),
    ("asymmetric", "compressed-tensors"),
]


@pytest.fixture(scope="module")
def readings(ours_tiny, tmp_path_factory):
    """What vLLM reads with each conversion, or why it refuses it."""
    folder = tmp_path_factory.mktemp("vllm")
    runs = []
    for number, (name, to) in enumerate(CASES):
        report = convert(ours_tiny[name], folder / f"m{number}", config=ConversionConfig(to=to))
        assert report.is_exact
        output = folder / f"{number}.json"
        runs.append({"checkpoint": report.output, "dtype": "float16", "output": output})
    run_program(PEER, "vllm_read", {"windows": WINDOWS.tolist(), "runs": runs}, folder)
    found = {}
    for case, run in zip(CASES, runs, strict=True):
        refused = run["output"].with_name(f"{run['output'].name}.refused")
        found[case] = (
            refused.read_text() if refused.exists() else json.loads(run["output"].read_text())
        )
    return found


@torch.no_grad()
@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case))
def test_vllm_computes_what_we_do_from_the_gptq_checkpoint(ours_tiny, readings, case):
    found = readings[case]
    assert isinstance(found, dict), found
    model = AutoModelForCausalLM.from_pretrained(ours_tiny[case[0]], dtype=torch.float32)
    logits = model(WINDOWS).logits[:, :-1]
    nll = -logits.log_softmax(-1).gather(-1, WINDOWS[:, 1:, None])[..., 0]
    # In fp16, on logits with a spread of some nats; a wrong weight moves the mean by about one.
    assert (torch.tensor(found["nll"]) - nll).abs().mean() < 0.02
    assert nll.std() > 1
