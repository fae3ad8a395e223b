from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import (
    Recipe,
    build_model,
    edit_tensors,
    tiny_llama_config,
    write_checkpoint,
)
from tests.helpers.hub import put_into_cache
from transformers import AutoModelForCausalLM

import halfbyte
from halfbyte.errors import CheckpointError, ConfigError, ModelError
from halfbyte.integrations.load import load, load_model
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


@pytest.mark.parametrize("file_name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_plain_transformers_finds_the_config_of_a_folder_too(tmp_path, file_name):
    """It would initialize the linears randomly."""
    recipe = Recipe(config_in="quantize_config.json", file_name=file_name)
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)
    assert model.config.quantization_config.to_dict()["bits"] == 4


def test_dense_folder_with_a_leftover_config_loads_as_before(tmp_path):
    reference = build_model(tiny_llama_config(num_hidden_layers=1))
    reference.save_pretrained(tmp_path)
    (tmp_path / "quantize_config.json").write_text('{"bits": 4, "group_size": 32}')
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(model(IDS).logits, reference(IDS).logits)


def test_old_folder_of_another_method_is_refused_by_plain_transformers_too(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(config_in="quant_config.json"))
    (tmp_path / "quant_config.json").write_text('{"quant_method": "awq", "bits": 4}')
    with pytest.raises(CheckpointError, match=r"method in quant_config\.json is 'awq'"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_uses_halfbytes_loader_even_where_it_is_switched_off(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    halfbyte.uninstall_transformers()
    assert isinstance(load(tmp_path).model.layers[0].mlp.up_proj, QuantLinear)


def test_device_beside_a_device_map_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"device is 'cpu' and device_map is 'auto'"):
        load(tmp_path, device="cpu", device_map="auto")


def test_folder_without_a_model_config_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        load(tmp_path)


def test_dense_folder_is_refused_with_the_way_to_quantize_it(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(skip="proj|lm_head"))
    with pytest.raises(CheckpointError, match=r"no quantized linear .* halfbyte quantize"):
        load(tmp_path)


@pytest.mark.parametrize("place", ["config.json", "quantize_config.json"])
@pytest.mark.parametrize("file_name", ["model.safetensors", "gptq_model-4bit-32g.safetensors"])
def test_a_name_on_the_hub_is_loaded_as_its_folder_is(tmp_path, place, file_name):
    folder = put_into_cache(tmp_path, "me/old", "main")
    recipe = Recipe(config_in=place, file_name=file_name)
    reference = write_checkpoint(folder, tiny_llama_config(), recipe)
    found = {"cache_dir": tmp_path, "local_files_only": True}
    model = load("me/old", dtype=torch.float32, device="cpu", **found)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)
    # What an adapter notes as its base.
    assert model.name_or_path == model.config.name_or_path == "me/old"


def test_labels_and_weights_are_of_the_same_revision_and_subfolder(tmp_path):
    config = tiny_llama_config(num_hidden_layers=1)
    write_checkpoint(put_into_cache(tmp_path, "me/two", "main"), config)
    other = put_into_cache(tmp_path, "me/two", "b8") / "small"
    write_checkpoint(other, config, Recipe(bits=8, size=1 / 16))
    found = {"cache_dir": tmp_path, "local_files_only": True}
    model = load("me/two", revision="b8", subfolder="small", device="cpu", **found)
    assert model.config.quantization_config.to_dict()["bits"] == 8
    assert model.model.layers[0].mlp.up_proj.spec.bits == 8
    assert load(other.parent, subfolder="small", device="cpu").name_or_path == str(other)
    assert load(other, subfolder=None, device="cpu").name_or_path == str(other)
    with pytest.raises(ModelError, match=r"has no subfolder large"):
        load(other.parent, subfolder="large")
    with pytest.raises(ModelError, match=r"cannot be fetched .* at revision b3"):
        load("me/two", revision="b3", **found)


def test_a_setting_that_nobody_knows_is_an_error(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    with pytest.raises(TypeError, match="unheard_of"):
        load(tmp_path, unheard_of=1)
    model = load(tmp_path, attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("norm.weight", r"missing model\.layers\.0\.input_layernorm\.weight and 2 more tensors"),
        ("up_proj", r"missing model\.layers\.0\.mlp\.up_proj\.weight of a LlamaForCausalLM"),
    ],
)
def test_what_is_missing_is_an_error_and_not_random(tmp_path, lost, message):
    def lose(tensors):
        for name in [name for name in tensors if lost in name]:
            del tensors[name]

    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    edit_tensors(tmp_path, lose)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_a_dense_model_that_is_not_complete_is_refused_too(tmp_path):
    build_model(tiny_llama_config(num_hidden_layers=1)).save_pretrained(tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"is missing model\.norm\.weight of a Llama"):
        load_model(tmp_path)
