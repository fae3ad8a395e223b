"""Which weights AutoGPTQ's classes read, and what saving overwrites."""

from __future__ import annotations

import logging
import shutil
import tempfile
import weakref
from pathlib import Path

import pytest
from tests.helpers.checkpoints import Recipe, build_model, tiny_llama_config, write_checkpoint

from halfbyte.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig
from halfbyte.errors import CheckpointError, ConfigError
from halfbyte.integrations.auto_gptq_files import move_out_of_scratch
from halfbyte.integrations.load import load

CONFIG = tiny_llama_config(num_hidden_layers=1)
EIGHT_BITS = Recipe(bits=8, size=1 / 16, file_name="eight.safetensors", labels={"bits": None})


@pytest.fixture
def two(tmp_path):
    """A folder with an 8-bit checkpoint under another name beside the usual 4-bit one."""
    write_checkpoint(tmp_path, CONFIG, EIGHT_BITS)
    write_checkpoint(tmp_path, CONFIG, Recipe(labels={"bits": None}))
    return tmp_path


@pytest.fixture
def base(tmp_path):
    build_model(CONFIG).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def quantized(base, tmp_path, monkeypatch):
    """A model that is quantized, and not saved yet."""
    # What is kept after an error belongs to the test.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=False)
    model = AutoGPTQForCausalLM.from_pretrained(base, config)
    model.quantize([list(range(3, 40))])
    return model


def bits(model):
    return model.model.layers[0].mlp.up_proj.spec.bits


@pytest.mark.parametrize(
    ("basename", "expected"), [("eight", 8), ("eight.safetensors", 8), ("model", 4), (None, 4)]
)
def test_model_basename_chooses_the_weights(two, basename, expected):
    model = AutoGPTQForCausalLM.from_quantized(two, device="cpu", model_basename=basename)
    assert bits(model.model) == expected


def test_autogptqs_file_is_read_beside_an_unquantized_model(base):
    saved = Recipe(file_name="gptq_model-4bit-32g.safetensors")
    write_checkpoint(base, CONFIG, saved)
    assert bits(AutoGPTQForCausalLM.from_quantized(base, device="cpu").model) == 4


def test_model_basename_without_a_file_is_reported(two, caplog):
    with caplog.at_level(logging.WARNING, "halfbyte"):
        model = AutoGPTQForCausalLM.from_quantized(two, device="cpu", model_basename="renamed")
    assert "model_basename is 'renamed'" in caplog.text
    assert "has no renamed.safetensors: its usual weights are read" in caplog.text
    assert bits(model.model) == 4


def test_load_reads_the_named_weights(two, tmp_path):
    assert bits(load(two, weights_file="eight.safetensors")) == 8
    load(two).save_pretrained(two / "shards", max_shard_size="20KB")
    index = two / "shards" / "model.safetensors.index.json"
    index.rename(index.with_name("parts.safetensors.index.json"))
    write_checkpoint(two / "shards", CONFIG, EIGHT_BITS)
    assert bits(load(two / "shards", weights_file="parts.safetensors.index.json")) == 4
    with pytest.raises(CheckpointError, match=r"is missing the file nine\.safetensors"):
        load(two, weights_file="nine.safetensors")


def test_saving_replaces_an_earlier_checkpoint(quantized, tmp_path):
    write_checkpoint(tmp_path / "out", CONFIG, EIGHT_BITS)
    (tmp_path / "out" / "eight.safetensors").rename(tmp_path / "out" / "model.safetensors")
    quantized.save_quantized(tmp_path / "out")
    assert bits(AutoGPTQForCausalLM.from_quantized(tmp_path / "out", device="cpu").model) == 4


def test_chat_templates_of_an_earlier_checkpoint_are_replaced(tmp_path):
    scratch, target = tmp_path / "scratch", tmp_path / "saved"
    for text in ("first", "second"):
        templates = scratch / "model" / "additional_chat_templates"
        templates.mkdir(parents=True)
        (templates / "tools.jinja").write_text(text)
        owner: set[str] = set()
        move_out_of_scratch(
            scratch / "model", target, weakref.finalize(owner, shutil.rmtree, scratch)
        )
        assert not scratch.exists()
    assert [p.read_text() for p in target.rglob("*.jinja")] == ["second"]


def test_base_model_is_not_overwritten_and_the_result_is_kept(quantized, base, tmp_path, caplog):
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    scratch = Path(quantized.source)
    with pytest.raises(ConfigError, match=r"holds an unquantized model \(model\.safetensors\)"):
        quantized.save_quantized(base)
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before
    assert f"was not saved; it stays in {scratch}" in caplog.text
    quantized.save_quantized(tmp_path / "out")
    assert bits(quantized.model) == 4
    with pytest.raises(ConfigError, match="holds an unquantized model"):
        quantized.save_quantized(base)


def test_result_outlives_the_program_if_it_cannot_be_saved(quantized, tmp_path):
    scratch = Path(quantized.source)
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigError, match="file: it is a file"):
        quantized.save_quantized(tmp_path / "file")
    del quantized
    assert (scratch / "config.json").is_file()
