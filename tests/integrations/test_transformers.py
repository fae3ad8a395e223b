"""Checkpoints loaded by plain Transformers, against the equivalent dense model."""

from __future__ import annotations

import gc
import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from tests.helpers.checkpoints import (
    Recipe,
    edit_tensors,
    read_tensors,
    tiny_llama_config,
    write_checkpoint,
)
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaForCausalLM

import halfbyte
from halfbyte.errors import CheckpointError
from halfbyte.integrations.transformers import GPTQConfig
from halfbyte.kernels import cpu_native, native_library
from halfbyte.nn.linear import QuantLinear
from halfbyte.nn.model_loading import SMALL_BYTES

IDS = torch.tensor([[5, 9, 2, 77, 31, 8], [3, 3, 64, 100, 7, 1]])

TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "pad_token_id": 0,
}
FAMILIES = {
    "qwen2": TINY,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 128},
    "mixtral": {**TINY, "num_local_experts": 3, "num_experts_per_tok": 2},
    "qwen3_moe": {
        **TINY,
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "head_dim": 16,
    },
}


@pytest.fixture(autouse=True)
def _installed():
    halfbyte.install_transformers()


def load(folder, **settings):
    """Load, and fail where Transformers reports a tensor that it did not find or not use."""
    settings = {"dtype": torch.float32, **settings}
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same(model, reference):
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-5, atol=1e-5)


def packed_tensors(folder):
    tensors = read_tensors(folder)
    return {k: v for k, v in tensors.items() if f"{k.rpartition('.')[0]}.qweight" in tensors}


def assert_same_tensors(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("family", FAMILIES)
def test_computes_the_dense_model_and_saves_the_stored_bits(tmp_path, family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    reference = write_checkpoint(tmp_path, config)
    model = load(tmp_path)
    assert_same(model, reference)
    packed = [name for name, m in reference.named_modules() if _is_packed(model, name)]
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == len(packed) > 0
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(packed_tensors(tmp_path / "again"), packed_tensors(tmp_path))
    assert_same(load(tmp_path / "again"), reference)


def _is_packed(model, name):
    return isinstance(model.get_submodule(name), QuantLinear)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(bits=2, group_size=-1),
        Recipe(bits=3, group_size=64, symmetric=False),
        Recipe(bits=8, symmetric=False, zero_offset=0),
        Recipe(act_order=True, symmetric=False),
        Recipe(with_g_idx=False),
        Recipe(bits_for={"down_proj": 8, "q_proj": 2}),
        Recipe(zero_offset=0, labels={"checkpoint_format": "gptq"}),
        Recipe(skip=r"lm_head|layers\.0\.mlp"),
        Recipe(labels={"checkpoint_format": None, "format": "gptq", "bits": None, "w_bit": 4}),
    ],
    ids=[
        "2-bit-channel",
        "3-bit-ragged",
        "8-bit-v2",
        "act-order",
        "no-g_idx",
        "mixed-bits",
        "mislabelled",
        "skipped",
        "old-keys",
    ],
)
def test_reads_every_dialect(tmp_path, recipe):
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    assert_same(load(tmp_path), reference)


def test_mislabelled_zeros_are_reported(tmp_path, caplog):
    recipe = Recipe(zero_offset=0, labels={"checkpoint_format": "gptq"})
    write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    with caplog.at_level(logging.WARNING, "halfbyte"):
        load(tmp_path)
    assert "stores 8 everywhere, which is gptq_v2" in caplog.text
    assert "(14 linears)" in caplog.text


@pytest.mark.parametrize("tied", [False, True])
def test_loads_a_packed_head(tmp_path, tied):
    config = tiny_llama_config(tie_word_embeddings=tied)
    reference = write_checkpoint(tmp_path, config, Recipe(skip="nothing"))
    model = load(tmp_path)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.config.tie_word_embeddings is False
    assert_same(model, reference)
    model.save_pretrained(tmp_path / "again")
    assert_same(load(tmp_path / "again"), reference)


def test_tied_embeddings_stay_tied_where_the_head_is_dense(tmp_path):
    reference = write_checkpoint(tmp_path, tiny_llama_config(tie_word_embeddings=True))
    model = load(tmp_path)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert_same(model, reference)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_loads_dense_experts_beside_packed_ones(tmp_path, family):
    config = AutoConfig.for_model(family, **FAMILIES[family])
    skip = r"lm_head|gate$|layers\.1\..*experts|experts\.1\.(w2|down_proj)"
    reference = write_checkpoint(tmp_path, config, Recipe(skip=skip))
    model = load(tmp_path)
    assert type(model.model.layers[0].mlp.experts.get_submodule("1")) is nn.Module
    assert_same(model, reference)


def test_loads_the_base_model_without_its_head(tmp_path):
    reference = write_checkpoint(tmp_path, tiny_llama_config())
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    with torch.no_grad():
        found, expected = model(IDS)[0], reference.model(IDS)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_loads_names_without_the_base_prefix(tmp_path):
    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    reference = write_checkpoint(tmp_path, tiny_llama_config())
    edit_tensors(tmp_path, strip)
    assert_same(load(tmp_path), reference)


def test_loads_an_old_file_name_and_saves_the_usual_one(tmp_path):
    recipe = Recipe(file_name="gptq_model-4bit-32g.safetensors")
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    model = load(tmp_path)
    assert_same(model, reference)
    model.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "model.safetensors").is_file()
    assert "transformers_weights" not in (tmp_path / "again" / "config.json").read_text()


def test_config_keeps_the_keys_that_transformers_drops(tmp_path):
    extra = {
        "dynamic": {"-:lm_head": {}},
        "lm_head": False,
        "pack_dtype": "int32",
        "static_groups": True,
        "meta": {"quantizer": ["halfbyte:0.1.0"]},
        "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]],
    }
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(labels=extra))
    load(tmp_path).save_pretrained(tmp_path / "again")
    before, after = (
        json.loads((folder / "config.json").read_text())["quantization_config"]
        for folder in (tmp_path, tmp_path / "again")
    )
    assert after == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"])
def test_dtype_decides_the_arithmetic_and_not_what_is_stored(tmp_path, dtype):
    config = tiny_llama_config(intermediate_size=128)
    reference = write_checkpoint(tmp_path, config)
    model = load(tmp_path, dtype=dtype)
    expected = torch.float16 if dtype == "auto" else dtype
    assert logits(model).dtype == expected
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == expected
    assert layer.scales.dtype == torch.float16
    difference = (logits(model).float() - logits(reference)).abs().max()
    assert difference < 0.05
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(packed_tensors(tmp_path / "again"), packed_tensors(tmp_path))


def test_the_articles_snippet_runs_on_a_local_folder(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", trust_remote_code=False
    )
    output = model.generate(inputs=IDS[:1], max_new_tokens=8, do_sample=False)
    assert output.shape[0] == 1
    assert output.shape[1] > IDS.shape[1]


@pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules")
@pytest.mark.parametrize("offload_buffers", [False, True])
def test_offloaded_layers_run_and_are_saved(tmp_path, offload_buffers):
    reference = write_checkpoint(tmp_path, tiny_llama_config())
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    model = load(
        tmp_path,
        device_map={**dict.fromkeys(on_cpu, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "offload"),
        offload_buffers=offload_buffers,
    )
    assert model.model.layers[1].mlp.up_proj.scales.is_meta == offload_buffers
    assert_same(model, reference)
    model.save_pretrained(tmp_path / "again")
    assert_same_tensors(packed_tensors(tmp_path / "again"), packed_tensors(tmp_path))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system lists no mappings")
def test_no_shard_stays_mapped_for_a_norm_or_a_scale(tmp_path):
    folder = tmp_path / "model"
    write_checkpoint(folder, tiny_llama_config(), Recipe())
    model = load(folder)
    gc.collect()
    mapped = Path("/proc/self/maps").read_text()
    kept = [p for p in model.parameters() if p.nbytes > SMALL_BYTES]
    assert not kept, "the tiny model has a tensor that is too large to be copied"
    assert not [path for path in folder.glob("*.safetensors") if str(path) in mapped]


def test_takes_transformers_own_config_from_the_user(tmp_path):
    reference = write_checkpoint(tmp_path, tiny_llama_config())
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        model = load(tmp_path, quantization_config=transformers.GPTQConfig(bits=4, backend="auto"))
    assert_same(model, reference)


def test_finds_the_config_beside_the_model_where_the_user_names_the_method(tmp_path):
    recipe = Recipe(config_in="quantize_config.json", symmetric=False)
    reference = write_checkpoint(tmp_path, tiny_llama_config(), recipe)
    model = load(tmp_path, quantization_config=GPTQConfig(bits=4))
    assert_same(model, reference)


def test_model_is_marked_as_quantized_and_trainable(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    model = load(tmp_path)
    assert model.is_quantized
    assert model.quantization_method == "gptq"
    assert model.hf_quantizer.is_trainable
    assert model.hf_quantizer.is_compileable
    with pytest.raises(ValueError, match="cannot cast a GPTQ model"):
        model.to(torch.float16)


def test_compiles_without_a_graph_break(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config(num_hidden_layers=1))
    model = load(tmp_path)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(model))


def test_dequantize_gives_an_ordinary_model(tmp_path):
    reference = write_checkpoint(tmp_path, tiny_llama_config())
    model = load(tmp_path).dequantize()
    assert not any(isinstance(m, QuantLinear) for m in model.modules())
    assert not hasattr(model.config, "quantization_config")
    assert_same(model, reference)
    model.save_pretrained(tmp_path / "dense")
    assert_same(load(tmp_path / "dense"), reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_converts_the_whole_model_to_the_dtype(tmp_path, dtype):
    write_checkpoint(tmp_path, tiny_llama_config(tie_word_embeddings=True))
    model = load(tmp_path, dtype=torch.float16).dequantize(dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert logits(model).dtype == dtype


def test_says_which_kernels_run_it(tmp_path, caplog, monkeypatch):
    absent = native_library.NativeLibrary(functions=None, obstacle="not built", isa="")
    monkeypatch.setattr(cpu_native, "open_library", lambda: absent)
    write_checkpoint(tmp_path, tiny_llama_config(), Recipe(bits=3))
    with caplog.at_level(logging.INFO, "halfbyte"):
        load(tmp_path)
    assert "14 quantized linears run on torch_reference: the fastest one that fits" in caplog.text
    assert "cpu_native: not built; torch_int4: supports 4 bits, not 3" in caplog.text


def damage_scales(tensors):
    tensors["model.layers.1.mlp.up_proj.scales"][0, 3] = float("inf")


def drop_zeros(tensors):
    del tensors["model.layers.1.mlp.up_proj.qzeros"]


def shrink_layer(tensors):
    for suffix in ("qweight", "qzeros", "scales"):
        name = f"model.layers.1.mlp.up_proj.{suffix}"
        tensors[name] = tensors[name][:, : tensors[name].shape[1] // 3].contiguous()


def rename_all(tensors):
    for name in list(tensors):
        tensors[name.replace("layers", "floors")] = tensors.pop(name)


def unpack_all(tensors):
    for name in list(tensors):
        if name.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx"):
            del tensors[name]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_scales, r"model\.layers\.1\.mlp\.up_proj\.scales has 1 of 192 values"),
        (drop_zeros, r"no model\.layers\.1\.mlp\.up_proj\.qzeros"),
        (shrink_layer, r"up_proj\.qweight is a 64 -> 32 linear of 4 bits, but .* is 64 -> 96"),
        (rename_all, r"None of the 14 packed linears .* is in a LlamaForCausalLM"),
        (unpack_all, r"has no quantized linear among its 7 tensors"),
    ],
)
def test_damaged_checkpoint_is_refused_by_name(tmp_path, damage, message):
    write_checkpoint(tmp_path, tiny_llama_config())
    edit_tensors(tmp_path, damage)
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path)


def test_state_dict_in_memory_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    config = AutoConfig.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="Pass the folder to from_pretrained"):
        LlamaForCausalLM.from_pretrained(None, config=config, state_dict=read_tensors(tmp_path))


def test_second_checkpoint_in_the_folder_is_refused(tmp_path):
    write_checkpoint(tmp_path, tiny_llama_config())
    shutil.copy(tmp_path / "model.safetensors", tmp_path / "model.fp16.safetensors")
    with pytest.raises(
        CheckpointError, match=r"read model\.fp16\.safetensors, but .* is model\.safetensors"
    ):
        load(tmp_path, variant="fp16")
