"""Minima that are not products of a zero and a scale, as MLX and llama.cpp quantize."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.helpers.conversions import ATTENTION, MLP, TINY_CONFIG, write_source, write_tokenizer
from tests.helpers.tiny_gptq import TinyLinear

from halfbyte.convert.detect import open_source
from halfbyte.convert.gguf_file import Q4_1, open_gguf
from halfbyte.convert.run import ConversionConfig, convert
from halfbyte.packing import pack_rows

NAME = f"{MLP}.down_proj"
FREE = "minima that are not integer multiples"


@pytest.fixture
def mlx(tmp_path):
    """A model with two linears, and the weight of the one with arbitrary minima."""
    dice = torch.Generator().manual_seed(0)
    tensors = {"model.norm.weight": torch.ones(64)}
    for name, is_free in ((NAME, True), (f"{MLP}.up_proj", False)):
        codes = torch.randint(0, 16, (64, 96), generator=dice)
        scales = (torch.rand(64, 3, generator=dice) * 0.01 + 0.01).half()
        minima = (-scales * (torch.rand(64, 3, generator=dice) * 9 if is_free else 8)).half()
        tensors |= {
            f"{name}.weight": pack_rows(codes.to(torch.uint8), 4).view(torch.uint32),
            f"{name}.scales": scales,
            f"{name}.biases": minima,
        }
        if is_free:
            spread = [part.double().repeat_interleave(32, 1) for part in (scales, minima)]
            weight = codes * spread[0] + spread[1]
    folder = tmp_path / "a"
    write_tokenizer(folder)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    section = {"group_size": 32, "bits": 4}
    (folder / "config.json").write_text(json.dumps({**TINY_CONFIG, "quantization": section}))
    return folder, weight


def test_stored_minima_are_decoded_exactly(mlx, tmp_path):
    folder, weight = mlx
    convert(folder, tmp_path / "b", config=ConversionConfig(to="hf", dtype="float32"))
    found = load_file(tmp_path / "b" / "model.safetensors")[f"{NAME}.weight"]
    assert torch.equal(found, weight.float())
    convert(folder, tmp_path / "c", config=ConversionConfig(to="hf"))
    found = load_file(tmp_path / "c" / "model.safetensors")[f"{NAME}.weight"]
    torch.testing.assert_close(found.double(), weight, rtol=2**-11, atol=0)


@pytest.mark.parametrize("to", ["mlx", "gguf"])
def test_formats_with_minima_store_them_exactly(mlx, tmp_path, to):
    folder, weight = mlx
    report = convert(folder, tmp_path / "b", config=ConversionConfig(to=to))
    assert report.is_exact
    if to == "gguf":
        tensors = open_gguf(report.output).tensors
        assert tensors["blk.0.ffn_down.weight"].kind == Q4_1
        return  # not a whole model; what reads it back is below
    assert torch.equal(open_source(report.output).load_linear(NAME).dequantize(), weight.float())


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_formats_with_zero_points_fall_back_to_dense_if_errors_are_allowed(mlx, tmp_path, to):
    folder, weight = mlx
    with pytest.raises(
        ValueError, match=rf"cannot represent 1 of 2 linears \(.*down_proj has {FREE}"
    ):
        convert(folder, tmp_path / "b", config=ConversionConfig(to=to))
    report = convert(folder, tmp_path / "b", config=ConversionConfig(to=to, allow_error=True))
    assert [found.name for found in report.rounded] == [NAME]
    found = load_file(tmp_path / "b" / "model.safetensors")[f"{NAME}.weight"]
    assert torch.equal(found, weight.half())


def test_widening_does_not_represent_rounded_minima(mlx, tmp_path):
    folder, _ = mlx
    tensors = load_file(folder / "model.safetensors")
    for part in ("scales", "biases"):
        tensors[f"{NAME}.{part}"] = tensors[f"{NAME}.{part}"].bfloat16()
    tensors[f"{NAME}.biases"][0, 0] = 2.0**-30
    save_file(tensors, folder / "model.safetensors", metadata={"format": "mlx"})
    with pytest.raises(ValueError, match=r"an asymmetric grid: Q4_1 rounds the minimum to fp16\)"):
        convert(folder, tmp_path / "b", config=ConversionConfig(to="gguf", widen=True))


def test_q4_1_with_arbitrary_minima_is_read(tmp_path):
    linears = {
        f"{ATTENTION}.q_proj": TinyLinear(out_features=64),
        NAME: TinyLinear(in_features=96, out_features=64, symmetric=False),
    }
    write_source(tmp_path / "a", linears, is_whole=True, sym=False)
    config = ConversionConfig(to="gguf", allow_error=True)
    path = convert(tmp_path / "a", tmp_path / "x.gguf", config=config).output
    file = open_gguf(path)
    info = file.tensors["blk.0.ffn_down.weight"]
    blocks = file.load(info.name).view(-1, Q4_1.num_bytes)
    minima = torch.randn(len(blocks), 1, generator=torch.Generator().manual_seed(0)).half()
    blocks[:, 2:4] = minima.view(torch.uint8)
    content = bytearray(path.read_bytes())
    content[info.offset : info.offset + info.num_bytes] = bytes(blocks.flatten().tolist())
    path.write_bytes(content)
    source = open_source(path)
    linear = source.load_linear(NAME)
    assert torch.equal(linear.free_minima.view(-1, 1), minima)
    gguf = pytest.importorskip("gguf")
    kind = gguf.GGMLQuantizationType.Q4_1
    theirs = torch.from_numpy(gguf.dequantize(blocks.numpy().reshape(64, -1), kind))
    assert torch.equal(linear.dequantize(), theirs)
    again = convert(
        path, tmp_path / "y.gguf", config=ConversionConfig(to="gguf"), base=tmp_path / "a"
    )
    assert again.is_exact
    assert torch.equal(open_gguf(again.output).load(info.name).view(-1, Q4_1.num_bytes), blocks)
