"""Converted files read with other packages, compared with the dequantized weights."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.helpers.conversions import ATTENTION, HEADS, MLP, write_source
from tests.helpers.tiny_gptq import TinyLinear

from halfbyte.convert.run import ConversionConfig, convert

NAMES = (f"{ATTENTION}.q_proj", f"{ATTENTION}.k_proj", f"{MLP}.up_proj", f"{MLP}.down_proj")
KINDS = {
    "symmetric": {},
    "asymmetric": {"symmetric": False},
    "3 bits": {"bits": 3},
    "8 bits": {"bits": 8},
    "group 64": {"in_features": 128, "group_size": 64},
}


def write(tmp_path, to, facts, **options):
    linears = {name: TinyLinear(**{"out_features": 64, **facts}) for name in NAMES}
    weights = write_source(tmp_path / "a", linears)
    report = convert(tmp_path / "a", tmp_path / "b", config=ConversionConfig(to=to, **options))
    return weights, report


@pytest.mark.parametrize("facts", [KINDS[k] for k in ("symmetric", "3 bits", "8 bits", "group 64")])
def test_gguf_package_reads_blocks_names_and_pairs(tmp_path, facts):
    gguf = pytest.importorskip("gguf")
    weights, report = write(tmp_path, "gguf", facts)
    reader = gguf.GGUFReader(report.output)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, theirs in zip(NAMES, ("attn_q", "attn_k", "ffn_up", "ffn_down"), strict=True):
        tensor = tensors[f"blk.0.{theirs}.weight"]
        weight = weights[name]
        assert tensor.tensor_type.name == ("Q8_0" if facts.get("bits") == 8 else "Q4_0")
        if "attn" in theirs:  # llama.cpp lets the halves of a head alternate
            rows = weight.view(HEADS, 2, -1, weight.shape[1]).transpose(1, 2)
            weight = rows.reshape(weight.shape)
        read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(read.double(), weight)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "llama"
    assert fields["llama.attention.head_count"] == HEADS
    assert fields["tokenizer.ggml.pre"] == "gpt-2"
    assert fields["tokenizer.ggml.merges"] == ["t h", "th e"]
    assert fields["tokenizer.ggml.tokens"][256:] == ["<s>", "</s>", "th", "the"]
    assert fields["tokenizer.ggml.token_type"][255:] == [1, 3, 3, 1, 1]
    assert fields["tokenizer.ggml.bos_token_id"] == 256
    assert fields["tokenizer.chat_template"] == "{{ messages[0].content }}"


def test_gguf_wider_blocks_hold_asymmetric_codes_exactly(tmp_path):
    gguf = pytest.importorskip("gguf")
    weights, report = write(tmp_path, "gguf", KINDS["asymmetric"], widen=True)
    assert report.holds == {"Q8_0": 4}
    tensor = next(
        t for t in gguf.GGUFReader(report.output).tensors if t.name == "blk.0.ffn_up.weight"
    )
    read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(read.double(), weights[f"{MLP}.up_proj"])


def test_gguf_minima_differ_only_by_rounding(tmp_path):
    gguf = pytest.importorskip("gguf")
    weights, report = write(tmp_path, "gguf", KINDS["asymmetric"], allow_error=True)
    assert report.holds == {"Q4_1": 4}
    assert 0 < max(found.relative_error for found in report.rounded) < 2**-11
    tensor = next(
        t for t in gguf.GGUFReader(report.output).tensors if t.name == "blk.0.ffn_up.weight"
    )
    read = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type)).double()
    # a minimum is 15 scales at most; fp16 rounds it by half of its last bit
    bound = 15 * 0.02 * 2**-11
    assert 0 < float((read - weights[f"{MLP}.up_proj"]).abs().max()) <= bound


@pytest.mark.parametrize("facts", [KINDS[k] for k in ("symmetric", "3 bits", "8 bits", "group 64")])
def test_mlx_computes_the_weights(tmp_path, facts):
    mx = pytest.importorskip("mlx.core")
    weights, report = write(tmp_path, "mlx", facts)
    assert report.is_exact
    tensors = mx.load(str(tmp_path / "b" / "model.safetensors"))
    section = json.loads((tmp_path / "b" / "config.json").read_text())["quantization"]
    assert section == {
        "group_size": facts.get("group_size", 32), "bits": facts.get("bits", 4), "mode": "affine",
    }  # fmt: skip
    for name in NAMES:
        grid = [tensors[f"{name}.{part}"] for part in ("scales", "biases")]
        read = mx.dequantize(
            tensors[f"{name}.weight"],
            *(part.astype(mx.float32) for part in grid),
            group_size=section["group_size"],
            bits=section["bits"],
        )
        assert np.array_equal(np.array(read), weights[name].numpy())


@pytest.mark.parametrize("facts", KINDS.values(), ids=KINDS)
def test_compressed_tensors_decompresses_the_weights(tmp_path, facts):
    library = pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationConfig

    weights, report = write(tmp_path, "compressed-tensors", facts)
    assert report.is_exact, library
    section = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    config = QuantizationConfig.model_validate(section)
    assert config.ignore == ["lm_head"]
    scheme = config.config_groups["group_0"]
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    for name in NAMES:
        parts = {
            key.rpartition(".")[2]: tensor
            for key, tensor in tensors.items()
            if key.startswith(f"{name}.")
        }
        parts["weight_scale"] = parts["weight_scale"].float()  # it multiplies in the scale's type
        read = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
        assert torch.equal(read.double(), weights[name])


@pytest.mark.parametrize("facts", [KINDS[k] for k in ("symmetric", "asymmetric", "group 64")])
def test_awq_matches_the_packing_of_autoawq(tmp_path, facts):
    """Unpack word by word as AutoAWQ's WQLinear_GEMM: nibble i has output order_map[i]."""
    weights, report = write(tmp_path, "awq", facts)
    assert report.is_exact
    config = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["version"]) == (
        4, facts.get("group_size", 32), "gemm",
    )  # fmt: skip
    tensors = load_file(tmp_path / "b" / "model.safetensors")
    order_map = [0, 2, 4, 6, 1, 3, 5, 7]
    for name in NAMES:
        words, zeros, scales = (
            tensors[f"{name}.{suffix}"].tolist() for suffix in ("qweight", "qzeros", "scales")
        )
        read = torch.zeros(weights[name].shape, dtype=torch.float64)
        for i, row in enumerate(words):
            group = i // config["group_size"]
            for c, word in enumerate(row):
                for place, output in enumerate(order_map):
                    o = 8 * c + output
                    code = (word >> (4 * place)) & 15
                    zero = (zeros[group][c] >> (4 * place)) & 15
                    read[o, i] = scales[group][o] * (code - zero)
        assert torch.equal(read, weights[name])


def test_transformers_takes_the_awq_config(tmp_path):
    from transformers import AwqConfig

    write(tmp_path, "awq", KINDS["symmetric"])
    section = json.loads((tmp_path / "b" / "config.json").read_text())["quantization_config"]
    config = AwqConfig.from_dict(section)
    assert (config.bits, config.group_size, config.zero_point) == (4, 32, True)


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_transformers_computes_the_same_from_compressed_tensors(tmp_path):
    """With the compressed-tensors library; symmetric, as 0.20 loads no packed zeros."""
    pytest.importorskip("compressed_tensors")
    from tests.helpers.checkpoints import Recipe, tiny_llama_config, write_checkpoint
    from transformers import AutoModelForCausalLM

    write_checkpoint(tmp_path / "a", tiny_llama_config(), Recipe())
    config = ConversionConfig(to="compressed-tensors")
    assert convert(tmp_path / "a", tmp_path / "b", config=config).is_exact
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in "ab"
    ]
    ids = torch.arange(3, 40)[None]
    first, second = (model(ids).logits for model in models)
    assert torch.equal(first, second)
