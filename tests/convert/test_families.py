"""Families that keep their weights in another order than most: there and back, and run."""

from __future__ import annotations

import pytest
import torch
from tests.helpers.checkpoints import Recipe, read_tensors, write_checkpoint
from tests.helpers.conversions import write_tokenizer
from tests.helpers.families import FAMILIES
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte.convert.gguf_file import Q4_0, open_gguf
from halfbyte.convert.run import ConversionConfig, convert

CHANGES = {"qwen3_moe": {"norm_topk_prob": True}, "gpt2": {"tie_word_embeddings": True}}


IN_FLOAT32 = Recipe(dtype=torch.float32)


def write(folder, family, recipe=IN_FLOAT32):
    facts = {**FAMILIES[family], "vocab_size": 512, **CHANGES.get(family, {})}
    halfbyte.install_transformers()
    write_checkpoint(folder, AutoConfig.for_model(family, **facts), recipe)
    write_tokenizer(folder)


@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt2", "gpt_neox"]
)
def test_gguf_gives_every_tensor_back(tmp_path, family):
    write(tmp_path / "a", family)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert report.is_exact
    convert(report.output, tmp_path / "c", config=ConversionConfig(to="gptq"), base=tmp_path / "a")
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        # Vectors and biases are 32 bits wide in GGUF.
        assert torch.equal(after[name].to(tensor.dtype), tensor), name


def test_the_experts_of_a_block_are_one_tensor(tmp_path):
    write(tmp_path / "a", "mixtral")
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    tensors = open_gguf(report.output).tensors
    assert (tensors["blk.0.ffn_down_exps.weight"].shape) == (4, 64, 96)
    assert tensors["blk.0.ffn_down_exps.weight"].kind == Q4_0


def test_experts_that_are_not_alike_are_refused(tmp_path):
    bits = {r"experts\.2\.w1": 8}
    write(tmp_path / "a", "mixtral", Recipe(dtype=torch.float32, bits_for=bits))
    with pytest.raises(
        ValueError, match=r"the 4 experts of blk.0.ffn_gate_exps.weight .*\(Q4_0, Q8_0;"
    ):
        convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


@torch.no_grad()
def test_dense_weights_of_gpt2_are_stored_as_it_reads_them(tmp_path):
    write(tmp_path / "a", "gpt2")
    config = ConversionConfig(to="hf", dtype="float32")
    convert(tmp_path / "a", tmp_path / "b", config=config)
    ids = torch.arange(5, 25)[None]
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
        for name in "ab"
    )
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_buffers_of_older_files_are_left_out_of_gguf(tmp_path):
    write(tmp_path / "a", "llama")
    file = tmp_path / "a" / "model.safetensors"
    from safetensors.torch import save_file

    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(read_tensors(tmp_path / "a") | extra, file, metadata={"format": "pt"})
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert not any("inv_freq" in name for name in open_gguf(report.output).tensors)
