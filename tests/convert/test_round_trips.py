"""GPTQ -> other format -> GPTQ restores every tensor bit for bit."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tests.helpers.conversions import (
    ATTENTION,
    MLP,
    assert_same_checkpoint,
    assert_same_weights,
    write_source,
)
from tests.helpers.tiny_gptq import TinyLinear

from halfbyte.convert.detect import open_source
from halfbyte.convert.gguf_file import open_gguf
from halfbyte.convert.run import ConversionConfig, convert
from halfbyte.errors import CheckpointError

FORMATS = ("gguf", "awq", "mlx", "compressed-tensors", "gptq")


def there_and_back(folder: Path, to: str, **options: object):
    """Convert ``folder/a`` to another format and back; return the first report."""
    report = convert(folder / "a", folder / "b", config=ConversionConfig(to=to, **options))
    base = folder / "a" if to == "gguf" else None
    back = convert(report.output, folder / "c", config=ConversionConfig(to="gptq"), base=base)
    assert back.is_exact
    return report


def linears(**facts):
    return {
        f"{ATTENTION}.q_proj": TinyLinear(out_features=64, **facts),
        f"{MLP}.down_proj": TinyLinear(in_features=96, out_features=64, with_bias=True, **facts),
    }


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    to=st.sampled_from(FORMATS),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    zero_offset=st.sampled_from([0, 1]),
    blocks=st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (4, 2), (6, 2), (6, 3)]),
    rows=st.sampled_from([32, 64, 96]),
    seed=st.integers(0, 10**6),
)
def test_every_exact_pair_gives_every_weight_back(
    to, bits, symmetric, zero_offset, blocks, rows, seed
):
    """Over bits, shapes, groups and both dialects; refusals give a reason."""
    inputs, group = blocks[0] * 32, blocks[1] * 32
    linear = TinyLinear(
        bits=bits, in_features=inputs, out_features=rows, group_size=group, symmetric=symmetric,
        zero_offset=zero_offset,
    )  # fmt: skip
    can = {
        "gguf": symmetric or bits < 4,
        "awq": bits <= 4,
        "mlx": symmetric,
        "compressed-tensors": True,
        "gptq": True,
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_source(folder / "a", {f"{MLP}.down_proj": linear}, seed=seed, is_whole=True)
        try:
            report = there_and_back(folder, to)
        except ValueError:
            assert not can[to]
            return
        assert report.is_exact
        assert_same_weights(folder / "a", folder / "c")


@pytest.mark.parametrize(
    ("to", "facts"),
    [
        ("gguf", {}),
        ("gguf", {"bits": 8}),
        ("gguf", {"bits": 3}),
        ("gguf", {"bits": 2}),
        ("awq", {}),
        ("awq", {"symmetric": False}),
        ("mlx", {}),
        ("mlx", {"bits": 3}),
        ("mlx", {"bits": 8}),
        ("compressed-tensors", {}),
        ("compressed-tensors", {"bits": 3, "symmetric": False}),
        ("compressed-tensors", {"bits": 8, "symmetric": False}),
        ("gptq", {"symmetric": False, "act_order": True}),
    ],
)
def test_every_tensor_comes_back_bit_for_bit(tmp_path, to, facts):
    write_source(tmp_path / "a", linears(**facts), is_whole=True)
    assert there_and_back(tmp_path, to).is_exact
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize(("to", "bits"), [("awq", 4), ("gguf", 2), ("gguf", 3), ("gguf", 4)])
def test_larger_groups_and_fewer_bits_are_restored(tmp_path, to, bits):
    """Groups of 64 and of 128, the last one ragged: AWQ has one size for all."""
    source = {
        f"{MLP}.down_proj": TinyLinear(in_features=128, out_features=64, group_size=64, bits=bits),
        f"{MLP}.up_proj": TinyLinear(in_features=256, out_features=64, group_size=128, bits=bits),
        f"{MLP}.gate_proj": TinyLinear(in_features=192, out_features=64, group_size=128, bits=bits),
    }
    write_source(tmp_path / "a", source, is_whole=True)
    there_and_back(tmp_path, to)
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


def test_zero_of_0_is_written_as_v2(tmp_path):
    source = linears(symmetric=False, zero_offset=0)
    write_source(tmp_path / "a", source, is_whole=True)
    there_and_back(tmp_path, "awq")
    assert open_source(tmp_path / "c").checkpoint.labels.checkpoint_format == "gptq_v2"
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


@pytest.mark.parametrize("to", ["awq", "mlx", "compressed-tensors", "gguf"])
def test_ragged_groups_become_even_ones(tmp_path, to):
    ragged = TinyLinear(in_features=96, out_features=64, group_size=64)
    write_source(tmp_path / "a", {f"{MLP}.down_proj": ragged}, is_whole=True)
    there_and_back(tmp_path, to)
    assert_same_weights(tmp_path / "a", tmp_path / "c")


def test_mixed_bits_and_groups_are_kept(tmp_path):
    source = {
        f"{MLP}.up_proj": TinyLinear(bits=8),
        f"{MLP}.down_proj": TinyLinear(bits=3, group_size=64),
        f"{ATTENTION}.o_proj": TinyLinear(symmetric=False),
    }
    write_source(tmp_path / "a", source, sym=False)
    there_and_back(tmp_path, "compressed-tensors")
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


def test_float32_is_exact(tmp_path):
    weights = write_source(tmp_path / "a", linears(symmetric=False, act_order=True))
    config = ConversionConfig(to="hf", dtype="float32")
    report = convert(tmp_path / "a", tmp_path / "b", config=config)
    assert report.is_exact
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(tensors[f"{name}.weight"].double(), weight)


def test_sixteen_bits_round_each_weight_once(tmp_path):
    weights = write_source(tmp_path / "a", linears())
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="hf"))
    assert 0 < max(found.relative_error for found in report.rounded) < 2**-11
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name, weight in weights.items():
        assert torch.equal(tensors[f"{name}.weight"], weight.to(torch.float16))


def test_shards_are_cut_between_linears(tmp_path):
    from halfbyte.convert.compressed_tensors import CompressedTensorsTarget
    from halfbyte.convert.folder import write_folder

    write_source(tmp_path / "a", linears())
    source = open_source(tmp_path / "a")
    specs = {name: source.describe(name) for name in source.linears}
    target = CompressedTensorsTarget()
    write_folder(source, specs, target, tmp_path / "b", allow_error=False, shard_bytes=3000)
    assert len(list((tmp_path / "b").glob("model-0000*-of-00002.safetensors"))) == 2
    convert(tmp_path / "b", tmp_path / "c", config=ConversionConfig(to="gptq"))
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


def test_card_has_base_model_license_and_description(tmp_path):
    write_source(tmp_path / "a", linears())
    card = "---\nlicense: mit\nbase_model: org/base\nbase_model_relation: quantized\n---\n# A\n"
    (tmp_path / "a" / "README.md").write_text(card)
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="mlx"))
    text = (tmp_path / "b" / "README.md").read_text()
    assert "license: mit\nbase_model: org/base\nbase_model_relation: quantized" in text
    assert "Converted from gptq to mlx" in text
    assert "every weight is exact" in text


def test_additional_chat_templates_are_copied(tmp_path):
    write_source(tmp_path / "a", linears())
    (tmp_path / "a" / "additional_chat_templates").mkdir()
    (tmp_path / "a" / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="awq"))
    copy = tmp_path / "b" / "additional_chat_templates" / "tool_use.jinja"
    assert copy.read_text() == "{{ tools }}"


def test_invalid_tokenizer_leaves_no_folder(tmp_path):
    write_source(tmp_path / "a", linears())
    (tmp_path / "a" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        convert(tmp_path / "a", tmp_path / "b" / "x.gguf", config=ConversionConfig(to="gguf"))
    assert not (tmp_path / "b").exists()


def test_invalid_companions_are_refused_before_writing_weights(tmp_path):
    write_source(tmp_path / "a", linears())
    (tmp_path / "a" / "LICENSE").symlink_to(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="missing the file LICENSE, which is a link to"):
        convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="awq"))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("to", ["gguf", "awq"])
def test_error_during_writing_leaves_no_file(tmp_path, to):
    write_source(tmp_path / "a", linears())
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    tensors[f"{MLP}.down_proj.bias"][0] = float("nan")
    save_file(tensors, tmp_path / "a" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not a number"):
        convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to=to))
    assert not list((tmp_path / "b").iterdir())


@pytest.mark.parametrize("file", ["config.json", "quant_config.json"])
def test_awq_is_detected_by_either_config_file(tmp_path, file):
    """Early versions of AutoAWQ wrote a separate file, with other names and no method."""
    write_source(tmp_path / "a", linears())
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="awq"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    section = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    del config["quantization_config"]
    if file == "config.json":
        config["quantization_config"] = section
    else:
        (tmp_path / "b" / file).write_text(json.dumps(section))
    (tmp_path / "b" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "b", tmp_path / "c", config=ConversionConfig(to="gptq"))
    assert_same_checkpoint(tmp_path / "a", tmp_path / "c")


def test_dense_weights_have_one_type_in_the_config(tmp_path):
    write_source(tmp_path / "a", linears())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    config["torch_dtype"] = config.pop("dtype")
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="hf", dtype="bfloat16"))
    found = json.loads((tmp_path / "b" / "config.json").read_text())
    assert {key: found[key] for key in found if "dtype" in key} == {"dtype": "bfloat16"}


@pytest.mark.parametrize("to", ["hf", "mlx"])
def test_quantization_config_of_the_source_is_removed(tmp_path, to):
    write_source(tmp_path / "a", {f"{ATTENTION}.q_proj": TinyLinear(out_features=64)})
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    section = config.pop("quantization_config")
    config["text_config"] = {"hidden_size": 64, "quantization_config": section}
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to=to))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["text_config"] == {"hidden_size": 64}


def test_all_base_models_of_a_merge_are_named(tmp_path):
    write_source(tmp_path / "a", linears())
    card = "---\nbase_model:\n- a/x\n- b/y\n---\n# A\n"
    (tmp_path / "a" / "README.md").write_text(card)
    convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to="mlx"))
    assert "base_model:\n- a/x\n- b/y\n" in (tmp_path / "b" / "README.md").read_text()
    path = convert(tmp_path / "a", tmp_path / "c", config=ConversionConfig(to="gguf")).output
    pairs = open_gguf(path).pairs
    assert [pairs[f"general.base_model.{n}.name"] for n in (0, 1)] == ["x", "y"]
    assert pairs["general.base_model.count"] == 2
