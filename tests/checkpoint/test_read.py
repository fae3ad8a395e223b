from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.tiny_gptq import TinyLinear, write_model
from torch import Tensor

from halfbyte.checkpoint.read import Checkpoint, open_checkpoint
from halfbyte.errors import CheckpointError

Q, D = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)


def assert_weights(folder: Path, weights: dict[str, Tensor]) -> Checkpoint:
    checkpoint = open_checkpoint(folder)
    assert sorted(checkpoint.linears) == sorted(weights)
    for name, weight in weights.items():
        found = checkpoint.dequantize(name)
        assert found.dtype == torch.float32
        # Exact: a product of an fp16 or bf16 scale and a small integer fits fp32.
        assert torch.equal(found.double(), weight.to(torch.float32).double())
    return checkpoint


DIALECTS = {
    "v1": TinyLinear(),
    "v2": TinyLinear(zero_offset=0),
    "asymmetric v1": TinyLinear(symmetric=False),
    "asymmetric v2": TinyLinear(symmetric=False, zero_offset=0),
    "2 bits": TinyLinear(bits=2, symmetric=False),
    "3 bits": TinyLinear(bits=3, symmetric=False),
    "3 bits v2": TinyLinear(bits=3, zero_offset=0),
    "8 bits": TinyLinear(bits=8, symmetric=False),
    "no g_idx": TinyLinear(with_g_idx=False),
    "act order": TinyLinear(act_order=True, symmetric=False),
    "ragged": TinyLinear(in_features=96, group_size=64),
    "ragged, no g_idx": TinyLinear(in_features=96, group_size=64, with_g_idx=False),
    "ragged act order": TinyLinear(in_features=96, group_size=64, act_order=True),
    "one group": TinyLinear(group_size=64),
    "bias": TinyLinear(with_bias=True),
    "bf16 scales": TinyLinear(scale_dtype=torch.bfloat16),
    "fp32 scales": TinyLinear(scale_dtype=torch.float32, bits=2),
}


@pytest.mark.parametrize("linear", DIALECTS.values(), ids=DIALECTS.keys())
def test_every_dialect_is_dequantized_correctly(tmp_path, linear):
    weights = write_model(tmp_path, {Q: linear, D: linear})
    checkpoint = assert_weights(tmp_path, weights)
    assert checkpoint.notes == ()
    packed = checkpoint.load_linear(Q)
    assert packed.layout.group_size == linear.group_size
    assert packed.zero_offset == linear.zero_offset
    assert packed.g_idx.dtype == torch.int32
    assert (packed.bias is not None) == linear.with_bias
    facts = checkpoint.load_info(Q)
    assert facts.zeros.is_symmetric == linear.symmetric
    assert facts.has_trivial_groups != linear.act_order


@pytest.mark.parametrize("file_name", ["gptq_model-4bit-128g.safetensors", "odd.safetensors"])
@pytest.mark.parametrize("config_file", ["quantize_config.json", "quant_config.json"])
def test_old_file_names_are_read(tmp_path, file_name, config_file):
    linear = TinyLinear(zero_offset=0, symmetric=False)
    weights = write_model(tmp_path, {Q: linear}, file_name=file_name, config_file=config_file)
    assert assert_weights(tmp_path, weights).labels.source == config_file


def test_mixed_bits_are_taken_from_the_shapes_with_a_note(tmp_path):
    weights = write_model(tmp_path, {Q: TinyLinear(), D: TinyLinear(bits=8)})
    checkpoint = assert_weights(tmp_path, weights)
    assert checkpoint.linears[D].bits == 8
    assert "1 of 2 linears have other bits than config.json says" in checkpoint.notes[0]


def test_mixed_bits_that_dynamic_declares_need_no_note(tmp_path):
    rules = {r"+:.*down_proj": {"bits": 8, "sym": False}}
    linears = {Q: TinyLinear(), D: TinyLinear(bits=8, symmetric=False)}
    weights = write_model(tmp_path, linears, labels={"dynamic": rules})
    assert assert_weights(tmp_path, weights).notes == ()


@pytest.mark.parametrize("label", ["gptq", "gptq_v2", ...])
@pytest.mark.parametrize("zero_offset", [0, 1])
def test_mislabelled_symmetric_zeros_are_read_by_their_words(tmp_path, label, zero_offset):
    linear = TinyLinear(zero_offset=zero_offset)
    weights = write_model(tmp_path, {Q: linear}, labels={"checkpoint_format": label})
    assert_weights(tmp_path, weights)


def test_wrong_group_size_label_does_not_matter_where_g_idx_is_there(tmp_path):
    linear = TinyLinear(in_features=96, group_size=64)
    weights = write_model(tmp_path, {Q: linear}, labels={"group_size": 48})
    checkpoint = assert_weights(tmp_path, weights)
    assert checkpoint.load_info(Q).layout.group_size == 64


def test_no_config_at_all_is_read_as_v1(tmp_path):
    weights = write_model(tmp_path, {Q: TinyLinear(symmetric=False)})
    (tmp_path / "config.json").unlink()
    assert "No quantization config" in assert_weights(tmp_path, weights).notes[0]


def test_files_that_disagree_on_the_dialect_matter_only_where_zeros_cannot_tell(tmp_path):
    other = json.dumps({"checkpoint_format": "gptq_v2"})
    weights = write_model(tmp_path / "sym", {Q: TinyLinear()})
    (tmp_path / "sym/quantize_config.json").write_text(other)
    assert len(assert_weights(tmp_path / "sym", weights).notes) == 1
    write_model(tmp_path / "asym", {Q: TinyLinear(symmetric=False)})
    (tmp_path / "asym/quantize_config.json").write_text(other)
    with pytest.raises(CheckpointError, match=rf"{Q}.qzeros .*checkpoint_format is gptq in config"):
        open_checkpoint(tmp_path / "asym").load_linear(Q)


def test_int64_g_idx_is_read(tmp_path):
    weights = write_model(tmp_path, {Q: TinyLinear(act_order=True)})
    change_tensors(tmp_path, lambda t: t.update({f"{Q}.g_idx": t[f"{Q}.g_idx"].long()}))
    assert_weights(tmp_path, weights)


def test_full_precision_model_is_refused_with_what_to_do(tmp_path):
    write_model(tmp_path, {Q: TinyLinear()})
    save_file({"model.norm.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"no quantized linear among its 1 tensors.*halfbyte q"
    ):
        open_checkpoint(tmp_path)


def test_bits_label_that_fits_no_linear_is_refused(tmp_path):
    write_model(tmp_path, {Q: TinyLinear(), D: TinyLinear()}, labels={"bits": 8})
    with pytest.raises(
        CheckpointError, match=r"config.json says 8 bits, but .*down_proj.*: 4 bits"
    ):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales"])
def test_missing_tensor_is_named(tmp_path, suffix):
    write_model(tmp_path, {Q: TinyLinear(), D: TinyLinear()})
    change_tensors(tmp_path, lambda tensors: tensors.pop(f"{Q}.{suffix}"))
    with pytest.raises(CheckpointError, match=rf"{Q}.{suffix}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "dtype", "message"),
    [
        ("qweight", torch.float32, "float32; allowed are int32"),
        ("qzeros", torch.int64, "int64; allowed are int32"),
        ("scales", torch.int16, "int16; allowed are float16, bfloat16, float32"),
        ("g_idx", torch.float32, "float32; allowed are int32, int64"),
        ("bias", torch.int32, "int32; allowed are float16"),
    ],
)
def test_wrong_element_type_is_named(tmp_path, suffix, dtype, message):
    write_model(tmp_path, {Q: TinyLinear(with_bias=True)})
    name = f"{Q}.{suffix}"
    change_tensors(tmp_path, lambda t: t.update({name: t[name].to(dtype)}))
    with pytest.raises(CheckpointError, match=f"{name} has the element type {message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("suffix", "message"),
    [("weight", "unclear which of the two is valid"), ("bjas", "but no 'bjas'")],
)
def test_unknown_tensor_beside_packed_ones_is_refused(tmp_path, suffix, message):
    write_model(tmp_path, {Q: TinyLinear()})
    change_tensors(tmp_path, lambda t: t.update({f"{Q}.{suffix}": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=rf"Cannot read {Q}.{suffix} .*{message}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("suffix", ["scales", "bias"])
def test_values_that_are_not_finite_are_refused(tmp_path, suffix, value):
    write_model(tmp_path, {Q: TinyLinear(with_bias=True)})
    name = f"{Q}.{suffix}"
    change_tensors(tmp_path, lambda t: t[name].view(-1)[:3].fill_(value))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=rf"{name} has 3 of [0-9]+ values that are infinite"):
        checkpoint.load_linear(Q)


def test_group_out_of_range_is_refused(tmp_path):
    write_model(tmp_path, {Q: TinyLinear()})
    change_tensors(tmp_path, lambda t: t[f"{Q}.g_idx"][5:6].fill_(2))
    with pytest.raises(CheckpointError, match=rf"{Q}.g_idx has values 0\.\.2; allowed are 0\.\.1"):
        open_checkpoint(tmp_path).load_info(Q)


def test_group_that_took_a_column_of_the_next_is_refused(tmp_path):
    write_model(tmp_path, {Q: TinyLinear()})
    change_tensors(tmp_path, lambda t: t[f"{Q}.g_idx"][32:33].fill_(0))
    with pytest.raises(CheckpointError, match=rf"{Q}.g_idx divides .* into groups of 33; .* 32"):
        open_checkpoint(tmp_path).load_info(Q)


def test_odd_zero_of_a_symmetric_linear_is_refused(tmp_path):
    write_model(tmp_path, {Q: TinyLinear()})
    change_tensors(tmp_path, lambda t: t[f"{Q}.qzeros"][0, 0:1].bitwise_xor_(1))
    with pytest.raises(CheckpointError, match=rf"{Q}.qzeros does not store 7"):
        open_checkpoint(tmp_path).dequantize(Q)


def test_act_order_without_its_tensor_is_refused(tmp_path):
    linear = TinyLinear(act_order=True, with_g_idx=False)
    write_model(tmp_path, {Q: linear})
    with pytest.raises(CheckpointError, match=rf"no {Q}.g_idx, .*desc_act: true: .* its 2 groups"):
        open_checkpoint(tmp_path)
    write_model(tmp_path, {Q: TinyLinear(act_order=True, with_g_idx=False, group_size=64)})
    assert open_checkpoint(tmp_path).load_info(Q).has_trivial_groups


def test_unknown_module_is_named(tmp_path):
    write_model(tmp_path, {Q: TinyLinear()})
    with pytest.raises(CheckpointError, match=rf"no quantized module x; it has 1 .* {Q}"):
        open_checkpoint(tmp_path).load_linear("x")
