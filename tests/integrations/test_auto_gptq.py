from __future__ import annotations

import gc
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from tests.helpers.checkpoints import (
    Recipe,
    build_model,
    read_tensors,
    tiny_llama_config,
    write_checkpoint,
)
from tests.helpers.hub import put_into_cache
from transformers import BatchEncoding

from halfbyte.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from halfbyte.errors import CheckpointError, ConfigError, ModelError
from halfbyte.quant_config import CalibrationConfig
from halfbyte.quantize import pipeline
from halfbyte.quantize.source import find_model

IDS = torch.tensor([[5, 9, 2, 77]])


def make_examples(number=4, length=12):
    generator = torch.Generator().manual_seed(0)
    return [
        BatchEncoding(
            {
                "input_ids": torch.randint(3, 128, (1, length), generator=generator),
                "attention_mask": torch.ones(1, length, dtype=torch.int64),
            }
        )
        for _ in range(number)
    ]


@pytest.fixture
def base(tmp_path):
    """The folder of a tiny dense model."""
    build_model(tiny_llama_config(num_hidden_layers=1)).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def fake_quantize(monkeypatch):
    """Instead of a run: remember the call, and write a ready checkpoint."""
    calls = []

    def quantize(model, output, **keywords):
        calls.append((model, keywords))
        write_checkpoint(Path(output), tiny_llama_config(num_hidden_layers=1))
        return "the report"

    monkeypatch.setattr(pipeline, "quantize", quantize)
    return calls


def test_old_script_runs_word_for_word(base, tmp_path):
    quantized_dir = str(tmp_path / "quantized")
    quantize_config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False, damp_percent=0.1)
    model = AutoGPTQForCausalLM.from_pretrained(str(base), quantize_config=quantize_config)
    model.quantize(make_examples())
    model.save_quantized(quantized_dir)
    before = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    model = AutoGPTQForCausalLM.from_quantized(quantized_dir, device="cpu")
    after = model.generate(input_ids=IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(before, after)
    assert model(input_ids=IDS).logits.shape == (1, 4, 128)
    labels = json.loads((tmp_path / "quantized" / "quantize_config.json").read_text())
    assert (labels["bits"], labels["group_size"], labels["damp_percent"]) == (4, 32, 0.1)


def test_config_takes_autogptqs_order_and_defaults():
    config = BaseQuantizeConfig(3, 64, 0.05, False)
    assert (config.bits, config.group_size, config.damp_percent, config.desc_act) == (
        3, 64, 0.05, False,
    )  # fmt: skip
    ours = BaseQuantizeConfig().to_quant_config()
    assert (ours.bits, ours.group_size, ours.damping) == (4, -1, 0.01)
    assert (ours.symmetric, ours.desc_act) == (True, True)


@pytest.mark.parametrize(
    ("desc_act", "static_groups", "ours"),
    [(True, False, True), (True, True, False), (False, False, False), (False, True, False)],
)
def test_static_groups_need_no_desc_act(desc_act, static_groups, ours):
    config = BaseQuantizeConfig(desc_act=desc_act, static_groups=static_groups)
    assert config.to_quant_config().desc_act is ours


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"bits": 5}, "bits is 5; allowed are 2, 3, 4, 8"),
        ({"damp_percent": 1.5}, r"damping is 1\.5"),
        ({"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'; only 'gptq'"),
        ({"quant_method": "awq"}, "quant_method 'awq'"),
    ],
)
def test_config_that_cannot_be_followed_is_refused(setting, message):
    with pytest.raises(ConfigError, match=message):
        BaseQuantizeConfig(**setting)


def test_config_is_saved_and_read_again(tmp_path):
    config = BaseQuantizeConfig(bits=8, group_size=64, sym=False, desc_act=False, damp_percent=0.2)
    config.save_pretrained(tmp_path)
    assert BaseQuantizeConfig.from_pretrained(tmp_path) == config
    with pytest.raises(ModelError, match="There is no model folder"):
        BaseQuantizeConfig.from_pretrained(tmp_path / "missing")


def test_quantize_hands_on_examples_and_settings(base, fake_quantize):
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False, damp_percent=0.1)
    model = AutoGPTQForCausalLM.from_pretrained(base, config)
    examples = make_examples(number=3, length=12) + make_examples(number=2, length=9)
    assert model.quantize(examples, batch_size=2) == "the report"
    ((source, keywords),) = fake_quantize
    assert source == base
    assert keywords["text"] == examples
    assert keywords["config"] == config.to_quant_config()
    calibration = keywords["calibration"]
    assert (calibration.samples, calibration.length, calibration.batch_size) == (5, 12, 2)


@pytest.mark.parametrize(
    "example", [{"input_ids": [[5, 6, 7]]}, [5, 6, 7], torch.tensor([5, 6, 7])]
)
def test_examples_may_be_plain_lists_too(base, fake_quantize, example):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize(row for row in [example])
    assert fake_quantize[0][1]["calibration"].length == 3


@pytest.mark.parametrize("in_list", [False, True])
def test_every_row_of_a_padded_batch_counts(base, fake_quantize, in_list):
    rows = {"input_ids": [[5, 6, 7], [8, 9, 0]], "attention_mask": [[1, 1, 1], [1, 1, 0]]}
    batch = BatchEncoding(rows, tensor_type="pt")
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize([batch] if in_list else batch)
    calibration = fake_quantize[0][1]["calibration"]
    assert (calibration.samples, calibration.length) == (2, 3)


def test_texts_are_examples_too(base, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize(["one text", "another"])
    ((_, keywords),) = fake_quantize
    assert keywords["text"] == ["one text", "another"]
    assert keywords["calibration"] == CalibrationConfig()


def test_base_model_is_not_loaded_to_be_quantized(base, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    assert model.config.num_hidden_layers == 1
    model.quantize(make_examples())
    assert model._model is None


def test_old_switches_are_taken_with_one_line(base, tmp_path, fake_quantize, caplog):
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = AutoGPTQForCausalLM.from_pretrained(
            base, BaseQuantizeConfig(), max_memory={0: "8GB"}, torch_dtype=torch.float16
        )
        model.quantize(make_examples(), use_triton=False, cache_examples_on_gpu=True)
        model.save_quantized(tmp_path / "out", use_safetensors=False)
        AutoGPTQForCausalLM.from_quantized(
            tmp_path / "out", device="cpu", use_triton=True, strict=False, quantize_config=None
        ).warmup_triton()
    lines = [record.getMessage() for record in caplog.records]
    assert [line.partition(". halfbyte")[0] for line in lines] == [
        "from_pretrained: these AutoGPTQ options have no effect: max_memory",
        "quantize: these AutoGPTQ options have no effect: use_triton, cache_examples_on_gpu",
        "save_quantized: these AutoGPTQ options have no effect: use_safetensors=False",
        "from_quantized: these AutoGPTQ options have no effect: use_triton, strict",
    ]


def test_other_settings_count_or_are_an_error(base, tmp_path, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    with pytest.raises(TypeError, match="new_switch"):
        model.quantize(make_examples(), new_switch=1)
    model.quantize(make_examples())
    model.save_quantized(tmp_path / "out")
    with pytest.raises(TypeError, match="unheard_of"):
        AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu", unheard_of=3)
    eager = {"device": "cpu", "attn_implementation": "eager"}
    model = AutoGPTQForCausalLM.from_quantized(tmp_path / "out", **eager)
    assert model.config._attn_implementation == "eager"


def test_quantized_revision_is_the_one_that_was_asked_for(tmp_path):
    config = tiny_llama_config(num_hidden_layers=1)
    write_checkpoint(put_into_cache(tmp_path, "me/two", "main"), config)
    other = put_into_cache(tmp_path, "me/two", "b8")
    write_checkpoint(other, config, Recipe(bits=8, size=1 / 16, labels={"damp_percent": 0}))
    found = {"revision": "b8", "cache_dir": tmp_path, "local_files_only": True}
    model = AutoGPTQForCausalLM.from_quantized("me/two", device="cpu", use_auth_token=None, **found)
    assert model.model.model.layers[0].mlp.up_proj.spec.bits == 8
    assert (model.quantize_config.bits, model.quantize_config.group_size) == (8, 32)


def test_base_revision_is_quantized_and_loaded_as_asked_for(tmp_path, fake_quantize):
    for number, revision in enumerate(("main", "v2"), 1):
        model = build_model(tiny_llama_config(num_hidden_layers=number))
        model.save_pretrained(put_into_cache(tmp_path, "me/base", revision))
    found = {"revision": "v2", "cache_dir": tmp_path, "local_files_only": True}
    model = AutoGPTQForCausalLM.from_pretrained("me/base", BaseQuantizeConfig(), **found)
    assert model.config.num_hidden_layers == len(model.model.model.layers) == 2
    model.quantize(make_examples())
    ((source, keywords),) = fake_quantize
    assert source == "me/base"
    config = json.loads((find_model(source, keywords["hub"]) / "config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_base_model_answers_before_it_is_quantized(base):
    model = AutoGPTQForCausalLM.from_pretrained(
        base, BaseQuantizeConfig(), torch_dtype=torch.float32
    )
    assert model(input_ids=IDS).logits.dtype == torch.float32
    assert model.device.type == "cpu"


def test_saving_moves_the_files_once_and_copies_them_afterwards(base, tmp_path, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize(make_examples())
    scratch = Path(model.source)
    model.save_quantized(tmp_path / "one")
    assert not scratch.exists()
    model.save_pretrained(tmp_path / "two")
    # As in AutoGPTQ's own example, which saves twice into the same folder.
    model.save_quantized(tmp_path / "one", use_safetensors=True)
    one, two = read_tensors(tmp_path / "one"), read_tensors(tmp_path / "two")
    assert one.keys() == two.keys()


def test_scratch_folder_goes_with_the_object(base, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize(make_examples())
    scratch = Path(model.source)
    assert scratch.is_dir()
    del model
    gc.collect()
    assert not scratch.exists()


def test_loaded_model_is_saved_with_both_configs(tmp_path):
    write_checkpoint(tmp_path / "in", tiny_llama_config(num_hidden_layers=1))
    model = AutoGPTQForCausalLM.from_quantized(tmp_path / "in", device="cpu")
    model.save_quantized(tmp_path / "out")
    section = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert json.loads((tmp_path / "out" / "quantize_config.json").read_text()) == section
    assert AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu").quantized


def test_old_checkpoint_loads_by_its_file_name_and_separate_config(tmp_path):
    recipe = Recipe(file_name="gptq_model-4bit-32g.safetensors", config_in="quantize_config.json")
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    model = AutoGPTQForCausalLM.from_quantized(
        tmp_path, device="cpu", torch_dtype=torch.float32, model_basename="gptq_model-4bit-32g"
    )
    assert (model.quantize_config.bits, model.quantize_config.group_size) == (4, 32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, reference(IDS).logits, rtol=1e-5, atol=1e-5)


def test_trainable_model_is_in_training_mode(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    assert AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu", trainable=True).training
    model = AutoGPTQForCausalLM.from_quantized(tmp_path, device_map={"": "cpu"})
    assert not model.training
    assert model.hf_device_map is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("device", ["cuda:0", 0])
def test_gpu_that_is_not_there_is_an_error_with_the_way_out(tmp_path, device):
    with pytest.raises(ConfigError, match=r"device is 'cuda:0'.*Use auto or cpu"):
        AutoGPTQForCausalLM.from_quantized(tmp_path, device=device)


def test_wrong_order_of_calls_is_an_error(base, tmp_path, fake_quantize):
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    with pytest.raises(ConfigError, match="not quantized yet"):
        model.save_quantized(tmp_path / "out")
    model.quantize(make_examples())
    with pytest.raises(ConfigError, match="already quantized"):
        model.quantize(make_examples())
    model.save_quantized(tmp_path / "out")


def test_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")


@pytest.mark.parametrize("saved_before", [False, True])
def test_push_to_hub_uploads_the_folder(base, tmp_path, fake_quantize, monkeypatch, saved_before):
    uploads = []

    class Api:
        def __init__(self, token):
            assert token == "secret"

        def create_repo(self, repo_id, *, private, exist_ok):
            assert (private, exist_ok) == (True, True)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def upload_folder(self, *, repo_id, folder_path, commit_message, create_pr):
            names = {path.name for path in Path(folder_path).iterdir()}
            uploads.append((repo_id, names, commit_message, create_pr))
            return "https://hub/commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    model = AutoGPTQForCausalLM.from_pretrained(base, BaseQuantizeConfig())
    model.quantize(make_examples())
    if saved_before:
        model.save_quantized(tmp_path / "out")
    address = model.push_to_hub("tiny", token="secret", private=True, commit_message="First")
    assert address == "https://hub/commit"
    ((repo_id, names, message, create_pr),) = uploads
    assert (repo_id, message, create_pr) == ("me/tiny", "First", False)
    assert {"config.json", "model.safetensors"} <= names
    model.save_quantized(tmp_path / "later")
    model.push_to_hub("tiny", tmp_path / "later", use_auth_token="secret", private=True)
    assert uploads[1][1] == names
