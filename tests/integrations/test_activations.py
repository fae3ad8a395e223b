"""int8 activations in whole models."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
from tests.helpers.native import NEEDS_LIBRARY
from transformers import LlamaForCausalLM

import halfbyte
from halfbyte.errors import ConfigError
from halfbyte.integrations.activations import round_activations
from halfbyte.integrations.generation import Generator, Sampling
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.native_decoder import NativeDecoder, find_obstacle

pytestmark = NEEDS_LIBRARY
TOKENS = torch.randint(3, 128, (1, 40), generator=torch.Generator().manual_seed(1))


def kernels_of(model):
    return {
        name: module.selection.kernel.name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear)
    }


def deviation(found, expected):
    return float((found - expected).norm() / expected.norm())


def test_every_layer_that_can_rounds_its_input_and_little_changes(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe())
    exact = halfbyte.load(tmp_path, dtype=torch.float32)
    rounded = halfbyte.load(tmp_path, dtype=torch.float32, activations="int8")
    assert set(kernels_of(exact).values()) == {"cpu_native"}
    assert set(kernels_of(rounded).values()) == {"cpu_int8"}
    with torch.inference_mode():
        error = deviation(rounded(TOKENS).logits, exact(TOKENS).logits)
    assert 1e-4 < error < 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_decoder_rounds_too(tmp_path, dtype):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(act_order=True, symmetric=False))
    models = [
        halfbyte.load(tmp_path, dtype=dtype, activations=activations)
        for activations in ("float", "int8")
    ]
    states = []
    for model in models:
        assert find_obstacle(model) is None
        decoder = NativeDecoder(model, 40)
        with torch.inference_mode():
            decoder.prefill(TOKENS[0, :4].tolist())
            states.append(torch.stack([decoder.step(int(TOKENS[0, i]), i) for i in range(4, 40)]))
            expected = model.model(TOKENS).last_hidden_state[0, 4:].float()
        # A number near the middle of two steps may go either way in the two.
        assert deviation(states[-1], expected) < 0.06
    assert 1e-4 < deviation(*states) < 0.1


def test_what_it_writes_is_the_stored_checkpoint(tmp_path):
    write_checkpoint(tmp_path / "packed", tiny_llama_config(), Recipe())
    model = halfbyte.load(tmp_path / "packed", activations="int8")
    model.save_pretrained(tmp_path / "again")
    before = load_file(tmp_path / "packed" / "model.safetensors")
    after = load_file(tmp_path / "again" / "model.safetensors")
    words = [name for name in before if name.endswith("qweight")]
    assert words
    assert all(torch.equal(before[name], after[name]) for name in words)


def test_layers_of_3_bits_stay_as_they_are(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(bits=3))
    with pytest.raises(ConfigError, match=r"no layer supports them: .*needs bits of 2, 4 or 8"):
        halfbyte.load(tmp_path, activations="int8")


def test_a_model_that_is_not_quantized_cannot(tmp_path):
    model = LlamaForCausalLM(tiny_llama_config())
    with pytest.raises(ConfigError, match="the model has no quantized layers"):
        round_activations(model)
    assert round_activations(model, "float") == 0
    with pytest.raises(ConfigError, match="activations is 'int4'; allowed: 'float', 'int8'"):
        round_activations(model, "int4")


def test_another_kernel_cannot(tmp_path, monkeypatch):
    monkeypatch.setenv("HALFBYTE_KERNEL", "torch_reference")
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe())
    with pytest.raises(ConfigError, match="runs on torch_reference, not cpu_native"):
        halfbyte.load(tmp_path, activations="int8")


def test_a_generator_takes_such_a_model(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(eos_token_id=None), Recipe())
    generator = Generator(halfbyte.load(tmp_path, dtype=torch.float32, activations="int8"))
    assert generator.obstacle is None
    tokens = list(generator.stream(TOKENS[0, :8].tolist(), Sampling(max_new_tokens=6)))
    assert len(tokens) == 6
