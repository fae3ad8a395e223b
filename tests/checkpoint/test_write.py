from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.helpers.tiny_gptq import TinyLinear, make_linear

from halfbyte.checkpoint.dynamic import resolve_dynamic
from halfbyte.checkpoint.labels import read_labels
from halfbyte.checkpoint.read import open_checkpoint
from halfbyte.checkpoint.shards import TensorFiles
from halfbyte.checkpoint.write import (
    build_quantization_config,
    pack_linear,
    shard_name,
    spec_of,
    stream_shard,
    write_configs,
    write_index,
    write_shard,
)
from halfbyte.errors import CheckpointError
from halfbyte.packing import unpack_weight, unpack_zeros
from halfbyte.quant_config import QuantConfig, Scheme

GROUPS = [
    ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    ["self_attn.o_proj"],
    ["mlp.down_proj"],
]


def scheme(bits=4, group_size=128, symmetric=True):
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def schemes(layers=2, **changes):
    return {
        f"model.layers.{layer}.{name}": scheme(**changes)
        for layer in range(layers)
        for group in GROUPS
        for name in group
    }


def build(config=None, quantized=None, skipped=None):
    return build_quantization_config(
        config or QuantConfig(),
        quantized=schemes() if quantized is None else quantized,
        skipped=skipped or {},
        module_groups=GROUPS,
        version="1.2.3",
    )


TENSORS = {
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
    "a": torch.arange(3, dtype=torch.int32),
    "c.empty": torch.zeros(0, 4, dtype=torch.float16),
    "d": torch.tensor(True),
    "e": torch.arange(12.0, dtype=torch.float64).reshape(3, 4).t(),
    "f": torch.arange(5, dtype=torch.uint8)[::2],
}


def test_shard_is_what_the_library_reads(tmp_path):
    digest = write_shard(tmp_path / "x.safetensors", TENSORS, {"made_by": "halfbyte"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
    with safe_open(tmp_path / "x.safetensors", "pt") as handle:
        assert handle.metadata() == {"format": "pt", "made_by": "halfbyte"}
    assert digest.tensor_bytes == sum(t.numel() * t.element_size() for t in TENSORS.values())
    assert digest.num_bytes == (tmp_path / "x.safetensors").stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


def test_every_tensor_of_a_shard_starts_aligned(tmp_path):
    write_shard(tmp_path / "model.safetensors", TENSORS)
    for info in TensorFiles.open(tmp_path).infos.values():
        assert info.offset % info.dtype.itemsize == 0


def test_same_tensors_give_the_same_bytes_in_any_order(tmp_path):
    first = write_shard(tmp_path / "1.safetensors", TENSORS)
    second = write_shard(tmp_path / "2.safetensors", dict(reversed(TENSORS.items())))
    assert first.sha256 == second.sha256
    assert first.tensors == second.tensors
    assert (tmp_path / "1.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_shard_replaces_an_older_one_and_a_leftover(tmp_path):
    path = tmp_path / "model.safetensors"
    write_shard(path, {"old": torch.ones(1)})
    (tmp_path / "model.safetensors.partial").write_bytes(b"left by a killed run" * 1000)
    write_shard(path, {"new": torch.ones(2)})
    assert set(TensorFiles.open(tmp_path).infos) == {"new"}
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_element_type_without_a_name_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"Cannot write tensor z: .* torch.complex128"):
        write_shard(tmp_path / "x.safetensors", {"z": torch.zeros(1, dtype=torch.complex128)})
    assert list(tmp_path.iterdir()) == []


def test_index_and_shards_open_together(tmp_path):
    weight_map, total = {}, 0
    for number, name in enumerate(("b", "a"), start=1):
        file_name = shard_name(number, 2)
        total += write_shard(tmp_path / file_name, {name: TENSORS[name]}).tensor_bytes
        weight_map[name] = file_name
    write_index(tmp_path, weight_map, total)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 24}
    assert list(index["weight_map"]) == ["a", "b"]
    assert index["weight_map"]["b"] == "model-00001-of-00002.safetensors"
    assert torch.equal(TensorFiles.open(tmp_path).load(["a"])["a"], TENSORS["a"])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_packing_matches_an_independent_implementation(bits, symmetric):
    linear = TinyLinear(bits=bits, symmetric=symmetric, with_bias=True, act_order=True)
    expected, _ = make_linear(linear)
    tensors = pack_linear(
        unpack_weight(expected["qweight"], bits),
        unpack_zeros(expected["qzeros"], bits, 1),
        expected["scales"].t().float(),
        bits=bits,
        g_idx=expected["g_idx"].long(),
        bias=expected["bias"],
    )
    assert set(tensors) == set(expected)
    for suffix, tensor in tensors.items():
        assert torch.equal(tensor, expected[suffix]), suffix
        assert tensor.dtype == expected[suffix].dtype
        assert tensor.is_contiguous()


def pack(**changes):
    parts = {
        "codes": torch.zeros(32, 64, dtype=torch.uint8),
        "zeros": torch.full((32, 2), 8),
        "scales": torch.ones(32, 2),
        "g_idx": torch.arange(64) // 32,
        **changes,
    }
    return pack_linear(**parts, bits=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zeros": torch.zeros(32, 2)}, r"zeros 0\.\.0 in 4 bits with offset 1: .* 1\.\.15"),
        ({"zeros": torch.full((32, 3), 8)}, r"codes \[32, 64\], zeros \[32, 3\], scales \[32, 2\]"),
        ({"g_idx": torch.zeros(63)}, r"g_idx \[63\] do not fit"),
        ({"codes": torch.full((32, 64), 16)}, r"codes 16\.\.16 in 4 bits"),
        ({"scales": torch.full((32, 2), 7e4)}, r"64 of 64 scales .* \(largest 70000; the limit"),
        ({"scales": torch.full((32, 2), torch.nan)}, "64 of 64 scales are not finite"),
    ],
)
def test_what_cannot_be_packed_is_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        pack(**changes)


def test_config_has_exactly_the_agreed_keys():
    config = build()
    assert config == {
        "bits": 4,
        "group_size": 128,
        "desc_act": False,
        "sym": True,
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "lm_head": False,
        "pack_dtype": "int32",
        "dynamic": {},
        "modules_in_block_to_quantize": GROUPS,
        "damp_percent": 0.01,
        "static_groups": True,
        "true_sequential": True,
        "meta": {"quantizer": ["halfbyte:1.2.3"]},
    }
    assert json.loads(json.dumps(config)) == config


def test_both_config_files_say_the_same(tmp_path):
    config = build()
    write_configs(tmp_path, {"model_type": "llama", "quantization_config": {"old": 1}}, config)
    model_config = json.loads((tmp_path / "config.json").read_text())
    assert model_config == {"model_type": "llama", "quantization_config": config}
    assert json.loads((tmp_path / "quantize_config.json").read_text()) == config
    labels = read_labels(tmp_path)
    assert labels.notes == ()
    assert labels.raw == config


def test_layers_with_a_smaller_group_are_in_dynamic():
    narrow = {n: s for n, s in schemes(group_size=64).items() if "down_proj" not in n}
    config = build(quantized={**schemes(), **narrow})
    assert config["group_size"] == 128
    for name, expected in {**schemes(), **narrow}.items():
        found = {**config, **(resolve_dynamic(config["dynamic"], name) or {})}
        assert found["group_size"] == expected.group_size
    assert len(config["dynamic"]) == 1
    assert "qkv_proj" in next(iter(config["dynamic"]))


def test_unused_group_size_is_replaced_by_the_most_common():
    config = build(quantized=schemes(group_size=64))
    assert config["group_size"] == 64
    assert config["dynamic"] == {}


def test_skipped_layers_are_named_and_left_out_of_the_list():
    quantized = {n: s for n, s in schemes().items() if "o_proj" not in n}
    skipped = {n: "width 100" for n in schemes() if "o_proj" in n}
    config = build(quantized=quantized, skipped=skipped)
    assert ["self_attn.o_proj"] not in config["modules_in_block_to_quantize"]
    assert all(resolve_dynamic(config["dynamic"], name) is None for name in skipped)
    assert all(resolve_dynamic(config["dynamic"], name) == {} for name in quantized)


def test_quantized_head_is_declared_and_listed():
    config = build(quantized={**schemes(), "lm_head": scheme(bits=8)})
    assert config["lm_head"] is True
    assert config["modules_in_block_to_quantize"][-1] == ["lm_head"]
    assert resolve_dynamic(config["dynamic"], "lm_head") == {"bits": 8}


def test_desc_act_is_declared():
    config = build(QuantConfig(desc_act=True, damping=0.05))
    assert (config["desc_act"], config["static_groups"]) == (True, False)
    assert config["damp_percent"] == 0.05


@pytest.mark.parametrize(
    ("quantized", "skipped", "message"),
    [({}, {"a": "x"}, "no linear is quantized"), ({"a": scheme()}, {"a": "x"}, "a is both")],
)
def test_inconsistent_config_is_refused(quantized, skipped, message):
    with pytest.raises(CheckpointError, match=message):
        build(quantized=quantized, skipped=skipped)


def test_what_is_written_is_what_is_read(tmp_path):
    linear = TinyLinear(symmetric=False, in_features=96, group_size=64)
    tensors, weight = make_linear(linear)
    name = "model.layers.0.mlp.down_proj"
    write_shard(tmp_path / shard_name(1, 1), {f"{name}.{s}": t for s, t in tensors.items()})
    write_index(tmp_path, {f"{name}.{s}": shard_name(1, 1) for s in tensors}, 0)
    config = build(
        QuantConfig(symmetric=False, group_size=64),
        quantized={name: scheme(group_size=64, symmetric=False)},
    )
    write_configs(tmp_path, {}, config)
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.notes == ()
    assert torch.equal(checkpoint.dequantize(name), weight.float())


def test_streamed_shard_is_identical(tmp_path):
    order = sorted(TENSORS, key=lambda name: (-TENSORS[name].element_size(), name))
    specs = {name: spec_of(TENSORS[name]) for name in order}
    write_shard(tmp_path / "whole.safetensors", TENSORS)
    pairs = ((name, TENSORS[name]) for name in order)
    digest = stream_shard(tmp_path / "streamed.safetensors", specs, pairs)
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert (tmp_path / "streamed.safetensors").read_bytes() == whole
    assert digest.num_bytes == len(whole)
    pairs = ((name, TENSORS[name]) for name in order)
    plain = stream_shard(tmp_path / "plain.safetensors", specs, pairs, with_digests=False)
    assert (tmp_path / "plain.safetensors").read_bytes() == whole
    assert plain.sha256 == ""


def test_tensor_that_differs_from_its_spec_is_refused(tmp_path):
    specs = {"a": spec_of(torch.zeros(2))}
    with pytest.raises(CheckpointError, match=r"got tensor b as .* but expected a as"):
        stream_shard(tmp_path / "x.safetensors", specs, iter([("b", torch.zeros(2))]))
    with pytest.raises(CheckpointError, match=r"got tensor a as .*shape=\(3,\)"):
        stream_shard(tmp_path / "x.safetensors", specs, iter([("a", torch.zeros(3))]))
    assert not (tmp_path / "x.safetensors").exists()
