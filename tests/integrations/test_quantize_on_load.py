"""Transformers' way to quantize: from_pretrained with a GPTQConfig that has a dataset."""

from __future__ import annotations

import gc
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.checkpoints import read_tensors
from tests.helpers.tiny_llama import build_tokenizer
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaConfig, LlamaForCausalLM

import halfbyte
from halfbyte.errors import CalibrationError, ConfigError
from halfbyte.quant_config import CalibrationConfig, QuantConfig

TEXTS = [" ".join(f"w{(7 * i + j) % 40}" for i in range(30)) for j in range(6)]


@pytest.fixture
def base(tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    build_tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(base, **settings):
    settings = {"bits": 4, "group_size": 32} | settings
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=GPTQConfig(**settings))


def test_the_model_is_that_of_quantize(base, tmp_path, caplog):
    tokenizer = build_tokenizer()
    model = load(base, dataset=TEXTS, tokenizer=tokenizer, desc_act=True, damp_percent=0.05)
    assert "Quantizing" in caplog.text
    rows = [tokenizer(text)["input_ids"] for text in TEXTS]
    halfbyte.quantize(
        base,
        tmp_path / "expected",
        config=QuantConfig(group_size=32, desc_act=True, damping=0.05),
        calibration=CalibrationConfig(samples=len(rows), length=max(map(len, rows))),
        text=rows,
        quality=False,
    )
    expected = halfbyte.load(tmp_path / "expected")
    ids = torch.tensor([rows[0]])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, expected(ids).logits)
    assert model.config.quantization_config.bits == 4
    model.save_pretrained(tmp_path / "saved")
    saved, written = read_tensors(tmp_path / "saved"), read_tensors(tmp_path / "expected")
    assert saved.keys() == written.keys()
    assert all(torch.equal(tensor, written[name]) for name, tensor in saved.items())
    with torch.inference_mode():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits
    assert torch.equal(again, model(ids).logits)


def test_nothing_is_left_behind(base):
    model = load(base, dataset=TEXTS, tokenizer=build_tokenizer())
    scratch = Path(tempfile.gettempdir())
    assert list(scratch.iterdir())
    del model
    gc.collect()
    assert not list(scratch.iterdir())
    with pytest.raises(TypeError, match="no_such_option"):
        AutoModelForCausalLM.from_pretrained(
            base, quantization_config=GPTQConfig(bits=4, dataset=TEXTS), no_such_option=1
        )
    gc.collect()
    assert not list(scratch.iterdir())


def test_named_datasets_are_the_built_in_text(base, caplog):
    model = load(base, dataset="c4", model_seqlen=32)
    assert "'c4', which is not downloaded: halfbyte's built-in" in caplog.text
    assert type(model.model.layers[0].mlp.up_proj).__name__ == "QuantLinear"


def test_a_choice_of_modules_is_refused(base):
    settings = GPTQConfig(bits=4, dataset=TEXTS)
    # Its constructor would ask for optimum.
    settings.modules_in_block_to_quantize = [["self_attn.q_proj"]]
    with pytest.raises(ConfigError, match=r"modules_in_block_to_quantize.*QuantConfig\(skip"):
        AutoModelForCausalLM.from_pretrained(base, quantization_config=settings)


def test_a_run_that_fails_leaves_nothing_behind(base):
    with pytest.raises(CalibrationError):
        load(base, dataset=[], tokenizer=build_tokenizer())
    assert not list(Path(tempfile.gettempdir()).iterdir())


def test_files_other_than_the_quantized_ones_are_refused(base):
    """Transformers tells a quantizer no subfolder, and no revision of a model on the Hub."""
    other = shutil.copytree(base, base / "other") / "model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(other).items()}
    save_file(tensors, other, {"format": "pt"})
    settings = GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=build_tokenizer())
    with pytest.raises(ConfigError, match=r"base were quantized, but .*other.model\.saf"):
        AutoModelForCausalLM.from_pretrained(base, subfolder="other", quantization_config=settings)
