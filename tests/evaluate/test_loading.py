import pytest
import torch

from halfbyte.errors import CheckpointError, ConfigError, ModelError
from halfbyte.evaluate.loading import load_tokenizer, open_subject, resolve_windows


def test_loaded_model_is_put_in_evaluation_mode(model):
    model.train()
    subject = open_subject(model)
    assert not subject.model.training
    assert (subject.vocabulary, subject.longest, subject.name) == (64, 128, "LlamaForCausalLM")


def test_folder_loads_with_its_tokenizer(folder):
    subject = open_subject(folder, device="cpu")
    assert subject.tokenizer("w1")["input_ids"] == [5]
    assert subject.dtype_name == "float32"
    assert not subject.model.training


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ModelError, match="nowhere': no such folder"):
        open_subject(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"it has no config.json"):
        open_subject(str(tmp_path))


def test_folder_without_weights_is_rejected_with_the_reason(folder):
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no .safetensors file among its \d+ files"):
        open_subject(folder)


def test_truncated_weights_are_rejected(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"Cannot load the model .*holds a causal language model"):
        open_subject(folder)


def test_damaged_tokenizer_is_rejected(folder):
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match=r"Cannot load the tokenizer of .*base"):
        load_tokenizer(folder)


def test_unknown_dtype_and_device_are_rejected(folder):
    with pytest.raises(ConfigError, match="dtype is 'int4'; allowed are auto, float32, bfloat16"):
        open_subject(folder, dtype="int4")
    with pytest.raises(ConfigError, match="device is 'gpu0', which this machine or this build"):
        open_subject(folder, device="gpu0")


def test_dtype_can_be_a_torch_dtype(folder):
    assert open_subject(folder, dtype=torch.bfloat16).dtype_name == "bfloat16"


def test_text_without_a_tokenizer_is_rejected(model):
    with pytest.raises(ConfigError, match="'LlamaForCausalLM': it has no tokenizer"):
        resolve_windows(open_subject(model), "w1", window=4, limit=None, add_bos=False)


def test_default_text_is_the_shipped_one(model, tokenizer):
    subject = open_subject(model, tokenizer=tokenizer)
    windows = resolve_windows(subject, None, window=128, limit=3, add_bos=False)
    assert windows.ids.shape == (3, 128)
