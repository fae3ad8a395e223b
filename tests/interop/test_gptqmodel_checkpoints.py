"""Tiny checkpoints, from GPTQModel to us and from us to GPTQModel: the same weights to the bit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from bench.peers.environments import PEERS
from safetensors.torch import load_file
from tests.interop.conftest import IDS, OURS
from tests.interop.peers import needs, run_program
from transformers import AutoModelForCausalLM

from halfbyte import open_checkpoint
from halfbyte.checkpoint.check import check_consumers

PEER = PEERS["gptqmodel"]

pytestmark = [pytest.mark.interop, needs("gptqmodel")]

THEIRS = {
    "group 64": {"group_size": 64},
    "group 128, ragged": {"group_size": 128},
    "group 128, ragged, asymmetric": {"group_size": 128, "sym": False},
    "desc_act": {"group_size": 64, "desc_act": True, "act_group_aware": False},
    "desc_act, ragged, asymmetric": {
        "group_size": 128,
        "sym": False,
        "desc_act": True,
        "act_group_aware": False,
    },
    "v2, asymmetric": {"group_size": 64, "sym": False, "format": "gptq_v2"},
    "one group per row": {"group_size": -1, "act_group_aware": False},
    "8 bits": {"group_size": 128, "bits": 8},
    "3 bits": {"group_size": 64, "bits": 3},
    "2 bits, asymmetric": {"group_size": 32, "bits": 2, "sym": False},
}
"""Settings of GPTQModel's QuantizeConfig; 4 bits where nothing is said. 192 = 128 + 64 columns."""


def decode(checkpoints, folder):
    """Give what GPTQModel sees in each checkpoint: weights by module name, or why it refuses."""
    files = {name: folder / f"decoded-{i}.safetensors" for i, name in enumerate(checkpoints)}
    runs = [{"checkpoint": checkpoints[name], "output": file} for name, file in files.items()]
    run_program(PEER, "gptqmodel_decode", {"runs": runs}, folder)
    refused = {name: file.with_name(f"{file.name}.refused") for name, file in files.items()}
    return {
        name: refused[name].read_text() if refused[name].exists() else load_file(file)
        for name, file in files.items()
    }


@pytest.fixture(scope="module")
def theirs(tiny, tmp_path_factory):
    """GPTQModel's checkpoints, each with what GPTQModel decodes from it."""
    folder = tmp_path_factory.mktemp("theirs")
    checkpoints = {name: folder / f"{i}" for i, name in enumerate(THEIRS)}
    runs = [
        {"output": checkpoints[name], "settings": {"bits": 4, **settings}}
        for name, settings in THEIRS.items()
    ]
    job = {"model": tiny, "ids": IDS.tolist(), "runs": runs}
    run_program(PEER, "gptqmodel_quantize", job, folder)
    decoded = decode(checkpoints, folder)
    return {name: (checkpoints[name], decoded[name]) for name in THEIRS}


@pytest.fixture(scope="module")
def ours_decoded(ours_tiny, tmp_path_factory):
    """Our checkpoints, each with what GPTQModel decodes from it."""
    decoded = decode(ours_tiny, tmp_path_factory.mktemp("ours-decoded"))
    return {name: (ours_tiny[name], decoded[name]) for name in OURS}


@pytest.fixture(scope="module")
def relabelled(ours_tiny, tmp_path_factory):
    """What GPTQModel decodes from our asymmetric checkpoints when it takes them for its own."""
    folder = tmp_path_factory.mktemp("relabelled")
    copies = {}
    for name in (name for name, config in OURS.items() if not config.symmetric):
        copies[name] = folder / f"{len(copies)}"
        shutil.copytree(ours_tiny[name], copies[name])
        file = copies[name] / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"]["meta"]["quantizer"] = ["gptqmodel:7.7.0"]
        file.write_text(json.dumps(config))
        (copies[name] / "quantize_config.json").unlink()
    return decode(copies, folder)


@torch.no_grad()
def check_same_weights_and_logits(tiny, folder, decoded):
    assert isinstance(decoded, dict), decoded
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.linears) == sorted(decoded)
    for name, weight in decoded.items():
        assert torch.equal(checkpoint.dequantize(name), weight), name
    plain = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    left_over = plain.load_state_dict({f"{n}.weight": w for n, w in decoded.items()}, strict=False)
    assert not left_over.unexpected_keys
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected, found = plain(IDS[:2]).logits, loaded(IDS[:2]).logits
    # The weights are equal bit for bit. Sums of fp32 in another order differ by up to 1.2e-5.
    torch.testing.assert_close(found, expected, rtol=0, atol=3e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", THEIRS)
def test_a_checkpoint_of_gptqmodel_means_here_what_it_means_there(tiny, theirs, name):
    check_same_weights_and_logits(tiny, *theirs[name])


@pytest.mark.parametrize("name", [name for name, config in OURS.items() if config.symmetric])
def test_our_checkpoint_means_in_gptqmodel_what_it_means_here(tiny, ours_decoded, name):
    check_same_weights_and_logits(tiny, *ours_decoded[name])


@pytest.mark.parametrize("name", [name for name, config in OURS.items() if not config.symmetric])
def test_only_the_name_of_its_maker_keeps_gptqmodel_from_our_asymmetric_checkpoint(
    tiny, ours_decoded, relabelled, name
):
    folder, refusal = ours_decoded[name]
    assert "only supported if produced by gptqmodel" in refusal
    check_same_weights_and_logits(tiny, folder, relabelled[name])


@pytest.mark.parametrize("name", OURS)
def test_check_says_whether_gptqmodel_takes_our_checkpoint(ours_decoded, name):
    folder, decoded = ours_decoded[name]
    verdicts = {v.consumer: v for v in check_consumers(open_checkpoint(folder)).verdicts}
    assert verdicts["gptqmodel"].loads == isinstance(decoded, dict), verdicts["gptqmodel"].reasons


def test_checkpoints_of_gptqmodel_are_not_all_trivial(theirs):
    """What was asked of GPTQModel is in the files: else the tests above would prove less."""
    module = "model.layers.0.self_attn.q_proj"
    q_proj = {n: open_checkpoint(folder).load_info(module) for n, (folder, _) in theirs.items()}
    assert not q_proj["desc_act"].has_trivial_groups
    assert not q_proj["v2, asymmetric"].zeros.is_symmetric
    assert q_proj["v2, asymmetric"].zeros.zero_offset == 0
    assert q_proj["group 128, ragged"].layout.num_groups == 2
    assert q_proj["3 bits"].layout.bits == 3
