from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint

import halfbyte
from halfbyte.errors import CheckpointError
from halfbyte.integrations.load import load
from halfbyte.nn.linear import QuantLinear

IDS = torch.tensor([[5, 9, 2, 77]])


@pytest.fixture(autouse=True)
def _put_back():
    yield
    halfbyte.install_transformers()


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json", "quant_config.json"])
@pytest.mark.parametrize("file_name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_takes_the_config_from_wherever_it_stands(tmp_path, place, file_name):
    recipe = Recipe(config_in=place, file_name=file_name, symmetric=False, zero_offset=0)
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    model = load(tmp_path, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


def test_uses_halfbytes_loader_even_where_it_is_switched_off(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    halfbyte.uninstall_transformers()
    assert isinstance(load(tmp_path).model.layers[0].mlp.up_proj, QuantLinear)


def test_folder_without_a_model_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        load(tmp_path)


def test_dense_folder_is_refused_with_the_way_to_quantize_it(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(skip="proj|lm_head"))
    with pytest.raises(CheckpointError, match=r"no quantized linear .* halfbyte quantize"):
        load(tmp_path)
