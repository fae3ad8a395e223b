"""Our checkpoint in GPTQModel: the same weights, the same words."""

from __future__ import annotations

import json

import pytest
import torch
from bench.peers.environments import PEERS
from tests.interop.greedy import answer, check_is_greedy
from tests.interop.peers import needs, run_program

from halfbyte import open_checkpoint

PEER = PEERS["gptqmodel"]

pytestmark = [pytest.mark.interop, needs("gptqmodel")]

NEW_TOKENS = 48
RUNS = {
    "float32": {"backend": "TORCH", "dtype": "float16", "to_float32": True},
    "own choice": {"backend": "AUTO", "dtype": "bfloat16", "to_float32": False},
}


@pytest.fixture(scope="module")
def readings(ours, tmp_path_factory):
    """What GPTQModel makes of our checkpoint, by kind of run."""
    folder = tmp_path_factory.mktemp("gptqmodel")
    files = {name: folder / f"{i}.json" for i, name in enumerate(RUNS)}
    job = {
        "checkpoint": ours.folder,
        "prompts": ours.prompts,
        "new_tokens": NEW_TOKENS,
        "windows": ours.windows.tolist(),
        "runs": [{**RUNS[name], "output": file} for name, file in files.items()],
    }
    run_program(PEER, "gptqmodel_run", job, folder)
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def test_answers_are_the_same_in_float32(ours, readings):
    expected = [answer(ours.float32, prompt, NEW_TOKENS) for prompt in ours.prompts]
    assert readings["float32"]["answers"] == expected


def test_its_own_kernel_answers_the_same_but_for_ties(ours, readings):
    others = [
        check_is_greedy(ours.float32, ours.bfloat16, prompt, reply)
        for prompt, reply in zip(ours.prompts, readings["own choice"]["answers"], strict=True)
    ]
    assert sum(others) <= 0.1 * NEW_TOKENS * len(ours.prompts)


def test_half_of_our_scales_are_negative_and_it_multiplies_with_them(ours, readings):
    checkpoint = open_checkpoint(ours.folder)
    scales = [checkpoint.load_linear(name).scales.flatten() for name in checkpoint.linears]
    assert 0.2 < (torch.cat(scales) < 0).double().mean() < 0.8
    nll, first = ours.reading
    found = torch.tensor(readings["float32"]["nll"])
    torch.testing.assert_close(found, nll, rtol=0, atol=1e-4)
    assert torch.equal(torch.tensor(readings["float32"]["first_choice"]), first)


def test_its_own_kernel_reads_a_text_as_we_do(ours, readings):
    nll, first = ours.reading
    found = torch.tensor(readings["own choice"]["nll"])
    # Perplexity within a percent, where bfloat16 alone moves it by .2%.
    assert abs((found.mean() - nll.mean()).item()) < 0.01
    same = torch.tensor(readings["own choice"]["first_choice"]) == first
    assert same.double().mean() > 0.95
