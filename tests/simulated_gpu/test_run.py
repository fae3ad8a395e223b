"""Loading, generating, saving and serving on a GPU give what they give on the CPU."""

from __future__ import annotations

import asyncio

import pytest
import torch
from tests.helpers.checkpoints import Recipe, read_tensors, tiny_llama_config, write_checkpoint
from tests.helpers.families import build_family, token_lists, write_decided_family
from tests.helpers.runs import quantize
from tests.serve import helpers_engine

import halfbyte
from halfbyte.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.quant_config import QuantConfig

pytestmark = pytest.mark.simulated_gpu

IDS = torch.randint(4, 60, (2, 24), generator=torch.Generator().manual_seed(0))
LLAMA = tiny_llama_config(num_hidden_layers=2)


def compute(model):
    """Logits, tokens by two ways of sampling, and how they were generated."""
    generator = Generator(model)
    generator.ends = frozenset()
    with torch.inference_mode():
        logits = model(IDS.to(model.device)).logits.cpu()
    samplings = (Sampling(max_new_tokens=8), Sampling(max_new_tokens=8, temperature=1.0, seed=1))
    tokens = [list(generator.stream([1, 5, 9, 33], sampling)) for sampling in samplings]
    return logits, tokens, generator.describe_decoding()


def assert_same_on_both(load):
    logits, tokens, _ = compute(load("cpu"))
    found = compute(load("cuda"))
    assert torch.equal(found[0], logits)
    assert found[1] == tokens
    return found[2]


@pytest.mark.parametrize(
    "recipe",
    [Recipe(group_size=32), Recipe(bits=8, symmetric=False, act_order=True, size=1 / 16)],
    ids=["symmetric", "act-order"],
)
def test_checkpoint_is_run_and_saved(tmp_path, recipe):
    write_checkpoint(tmp_path / "in", LLAMA, recipe)
    models = {
        device: halfbyte.load(tmp_path / "in", device=device, dtype=torch.float32)
        for device in ("cpu", "cuda")
    }
    assert assert_same_on_both(models.get).startswith("one CUDA graph per token")
    models["cuda"].save_pretrained(tmp_path / "out")
    before, after = read_tensors(tmp_path / "in"), read_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name]), name


@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "opt"])
def test_steps_that_wait_for_the_gpu_are_not_captured(tmp_path, family, quantized):
    model = build_family(family, num_hidden_layers=1)
    if quantized:
        model.save_pretrained(tmp_path / "base")
        quantize(tmp_path / "base", tmp_path / "out", QuantConfig(group_size=32))
    way = assert_same_on_both(
        lambda device: (
            halfbyte.load(tmp_path / "out", device=device, dtype=torch.float32)
            if quantized
            else model.to(device)
        )
    )
    reason = "the CPU waits for results of the GPU within a step"
    if quantized and family == "mixtral":
        # Without Triton, as on the simulated GPU.
        reason = (
            "which experts run is decided on the CPU, because they run on torch_reference, not on "
            "cuda or triton"
        )
    assert way.endswith(f"(no CUDA graph: {reason})")


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("place", ["auto", "cpu", "disk"])
def test_placed_and_offloaded_layers_run_on_the_gpu(tmp_path, place):
    reference = write_checkpoint(tmp_path, LLAMA).float()
    on_gpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {**dict.fromkeys(on_gpu, 0), "model.layers.1": place}
    model = halfbyte.load(
        tmp_path,
        device_map="auto" if place == "auto" else places,
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=True,
        dtype=torch.float32,
    )
    with torch.inference_mode():
        found, expected = model(IDS.cuda()).logits.cpu(), reference(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    model.save_pretrained(tmp_path / "again")
    after = read_tensors(tmp_path / "again")
    for name, tensor in read_tensors(tmp_path).items():
        assert torch.equal(tensor, after[name]), name


def test_code_for_autogptq_uses_the_gpu(tmp_path):
    write_decided_family(tmp_path / "base", num_hidden_layers=1)
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(tmp_path / "base", config)
    report = model.quantize([{"input_ids": [ids]} for ids in token_lists(4, 16)])
    assert "on cuda" in " ".join(report.notes)
    model.save_quantized(tmp_path / "out")
    model = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device=0)
    assert model.device == torch.device("cuda", 0)
    assert model.generate(input_ids=IDS[:1].cuda(), max_new_tokens=3).shape[0] == 1


def test_engine_serves_the_same_tokens(tmp_path, monkeypatch):
    helpers_engine.write_model(tmp_path)

    async def answer():
        async with helpers_engine.open_tiny(tmp_path) as engine:
            return await helpers_engine.all_tokens(engine, helpers_engine.mixed_requests(4))

    found = []
    for device in ("cpu", "cuda"):
        model = halfbyte.load(tmp_path, dtype=torch.float32, device=device)
        monkeypatch.setattr(helpers_engine, "load_float32", lambda _, model=model: model)
        found.append(asyncio.run(answer()))
    assert found[0] == found[1]
