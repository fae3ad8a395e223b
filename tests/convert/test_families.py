"""Round trips through GGUF for architectures with special weight layouts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tests.helpers.checkpoints import Recipe, read_tensors, write_checkpoint
from tests.helpers.conversions import ATTENTION, write_source, write_tokenizer
from tests.helpers.families import FAMILIES
from tests.helpers.tiny_gptq import TinyLinear
from transformers import AutoConfig, AutoModelForCausalLM

import halfbyte
from halfbyte.convert.detect import open_source
from halfbyte.convert.gguf_architecture import find_architecture
from halfbyte.convert.gguf_config import check_complete, read_config
from halfbyte.convert.gguf_file import F32, Q4_0, Q8_0, open_gguf
from halfbyte.convert.run import ConversionConfig, convert
from halfbyte.errors import CheckpointError

CHANGES = {"qwen3_moe": {"norm_topk_prob": True}, "gpt2": {"tie_word_embeddings": True}}


IN_FLOAT32 = Recipe(dtype=torch.float32)


def write(folder, family, recipe=IN_FLOAT32, **changes):
    facts = {**FAMILIES[family], "vocab_size": 512, **CHANGES.get(family, {}), **changes}
    halfbyte.install_transformers()
    write_checkpoint(folder, AutoConfig.for_model(family, **facts), recipe)
    write_tokenizer(folder)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "family", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt2", "gpt_neox", "olmo2"]
)
def test_gguf_round_trip_restores_every_tensor(tmp_path, family, tied):
    write(tmp_path / "a", family, tie_word_embeddings=tied)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert report.is_exact
    convert(report.output, tmp_path / "c", config=ConversionConfig(to="gptq"), base=tmp_path / "a")
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == tensor.dtype, name
        assert torch.equal(after[name], tensor), name


@pytest.mark.parametrize("family", ["qwen2_moe", "olmoe", "gpt_neox"])
def test_tied_head_is_written_if_llama_cpp_requires_it(tmp_path, family):
    write(tmp_path / "a", family, tie_word_embeddings=True)
    config = ConversionConfig(to="gguf", head="q8_0")
    report = convert(tmp_path / "a", tmp_path / "b", config=config)
    tensors = open_gguf(report.output).tensors
    assert tensors["output.weight"].shape == tensors["token_embd.weight"].shape
    assert (tensors["output.weight"].kind, tensors["token_embd.weight"].kind) == (Q8_0, F32)
    assert any(note.startswith("output is Q8_0") for note in report.notes)


def test_the_experts_of_a_block_are_one_tensor(tmp_path):
    write(tmp_path / "a", "mixtral")
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    tensors = open_gguf(report.output).tensors
    assert (tensors["blk.0.ffn_down_exps.weight"].shape) == (4, 64, 96)
    assert tensors["blk.0.ffn_down_exps.weight"].kind == Q4_0


def test_experts_of_different_types_are_refused(tmp_path):
    bits = {r"experts\.2\.w1": 8}
    write(tmp_path / "a", "mixtral", Recipe(dtype=torch.float32, bits_for=bits))
    with pytest.raises(
        ValueError, match=r"the 4 experts of blk.0.ffn_gate_exps.weight .*\(Q4_0, Q8_0;"
    ):
        convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert not (tmp_path / "b").exists() or not list((tmp_path / "b").iterdir())


@torch.no_grad()
@pytest.mark.parametrize("with_head", [False, True])
def test_dense_weights_of_gpt2_are_stored_inputs_first(tmp_path, with_head):
    skip = "nothing" if with_head else Recipe().skip
    recipe = Recipe(dtype=torch.float32, skip=skip)
    write(tmp_path / "a", "gpt2", recipe, tie_word_embeddings=not with_head)
    assert ("lm_head.qweight" in read_tensors(tmp_path / "a")) == with_head
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
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    save_file(read_tensors(tmp_path / "a") | extra, file, metadata={"format": "pt"})
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert not any("inv_freq" in name for name in open_gguf(report.output).tensors)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_vectors_have_the_type_of_the_embeddings_without_base(tmp_path, family, dtype):
    write(tmp_path / "a", family, Recipe(dtype=getattr(torch, dtype)))
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    assert open_gguf(report.output).tensors["blk.0.attn_norm.weight"].kind == F32
    convert(report.output, tmp_path / "c", config=ConversionConfig(to="gptq"))
    before, after = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "c")
    assert {name: tensor.dtype for name, tensor in after.items()} == {
        name: tensor.dtype for name, tensor in before.items()
    }
    assert AutoConfig.from_pretrained(tmp_path / "c").dtype == getattr(torch, dtype)


def test_a_vector_that_the_models_type_would_round_stays_in_32_bits(tmp_path):
    write(tmp_path / "a", "llama", Recipe(dtype=torch.bfloat16), dtype="bfloat16")
    file = tmp_path / "a" / "model.safetensors"
    name = "model.layers.0.input_layernorm.weight"
    exact = torch.full((64,), 1.001)
    save_file(read_tensors(tmp_path / "a") | {name: exact}, file, metadata={"format": "pt"})
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    convert(report.output, tmp_path / "c", config=ConversionConfig(to="gptq"), base=tmp_path / "a")
    after = read_tensors(tmp_path / "c")
    assert torch.equal(after[name], exact)
    assert after["model.layers.1.input_layernorm.weight"].dtype == torch.bfloat16


@torch.no_grad()
def test_biases_of_attention_and_mlp_come_back_without_a_base(tmp_path):
    write(tmp_path / "a", "llama", attention_bias=True, mlp_bias=True)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    convert(report.output, tmp_path / "c", config=ConversionConfig(to="gptq"))
    ids = torch.arange(5, 25)[None]
    expected, found = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(ids).logits
        for name in "ac"
    )
    torch.testing.assert_close(found, expected)


def test_biases_without_a_config_key_need_a_base(tmp_path):
    linears = {f"{ATTENTION}.q_proj": TinyLinear(out_features=64, with_bias=True)}
    write_source(tmp_path / "a", linears, is_whole=True)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    with pytest.raises(CheckpointError, match=r"attn_q of a block has a bias.* with --base"):
        open_source(report.output)
    assert open_source(report.output, tmp_path / "a").linears


def test_metadata_with_a_number_per_block_is_refused(tmp_path):
    linears = {f"{ATTENTION}.q_proj": TinyLinear(out_features=64)}
    write_source(tmp_path / "a", linears, is_whole=True)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    file = open_gguf(report.output)
    plain = {**file.pairs, "llama.rope.scaling.type": "none"}
    config = read_config(replace(file, pairs=plain), None)
    assert config == read_config(file, None)
    each = {**plain, "llama.attention.head_count_kv": [config["num_key_value_heads"]]}
    with pytest.raises(CheckpointError, match=r"head_count_kv is \[.\]; one positive number"):
        read_config(replace(file, pairs=each), None)


@pytest.mark.parametrize(
    ("lost", "missing"),
    [
        (
            "model.layers.0.mlp.up_proj.weight",
            r"no tensor blk\.0\.ffn_up\.weight.*'llama' with 1 block",
        ),
        ("model.norm.weight", r"no tensor output_norm\.weight"),
    ],
)
def test_incomplete_model_is_refused(tmp_path, lost, missing):
    linears = {f"{ATTENTION}.q_proj": TinyLinear(out_features=64)}
    write_source(tmp_path / "a", linears, is_whole=True)
    file = tmp_path / "a" / "model.safetensors"
    tensors = read_tensors(tmp_path / "a")
    del tensors[lost]
    save_file(tensors, file, metadata={"format": "pt"})
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    for base in (None, tmp_path / "a"):
        with pytest.raises(CheckpointError, match=missing):
            open_source(report.output, base)


def test_blocks_must_have_the_same_tensors_and_the_number_of_the_base(tmp_path):
    write(tmp_path / "a", "llama")
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    file = open_gguf(report.output)
    extra = replace(file.tensors["output_norm.weight"], name="blk.2.attn_q.bias")
    uneven = replace(file, tensors={**file.tensors, "blk.2.attn_q.bias": extra})
    architecture = find_architecture({"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(CheckpointError, match=r"no tensor blk\.0\.attn_q\.bias"):
        check_complete(uneven, architecture, {})
    with pytest.raises(CheckpointError, match="has 3 blocks, but the base's config says 4"):
        check_complete(file, architecture, {"n_layer": 4})
    split = replace(file, pairs={**file.pairs, "split.count": 2})
    with pytest.raises(CheckpointError, match=r"one of 2 files .* llama-gguf-split --merge"):
        check_complete(split, architecture, {})


def test_a_base_without_a_config_is_refused_before_anything_is_written(tmp_path):
    write(tmp_path / "a", "qwen2")
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="gguf"))
    (tmp_path / "empty").mkdir()
    for base in ("none", "empty"):
        with pytest.raises(
            CheckpointError, match=rf"Cannot use .*{base} as the base .*config.json"
        ):
            convert(
                report.output,
                tmp_path / "c",
                config=ConversionConfig(to="gptq"),
                base=tmp_path / base,
            )
        assert not (tmp_path / "c").exists()
