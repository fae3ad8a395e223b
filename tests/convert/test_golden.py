"""The expected bytes of each format for a small linear, from the formats' specifications."""

from __future__ import annotations

import struct

import pytest
import torch

from halfbyte.convert.awq import AwqTarget, pack_outputs, unpack_outputs
from halfbyte.convert.coded_linear import CodedLinear
from halfbyte.convert.compressed_tensors import CompressedTensorsTarget
from halfbyte.convert.gguf_blocks import decode_blocks, decode_plain, encode_blocks, encode_plain
from halfbyte.convert.gguf_file import BF16, F16, F32, Q4_0, Q4_1, Q6_K, Q8_0
from halfbyte.convert.gptq import GptqTarget
from halfbyte.convert.mlx import MlxTarget
from halfbyte.packing import pack_rows

CODES = [i % 16 for i in range(32)]
HALF = struct.pack("<e", 0.5)


def linear(codes=(CODES,), zero=8, bits=4, scale=0.5):
    table = torch.tensor(codes, dtype=torch.uint8)
    grid = (table.shape[0], table.shape[1] // 32)
    return CodedLinear(
        words=pack_rows(table, bits),
        scales=torch.full(grid, scale, dtype=torch.float16),
        zeros=torch.full(grid, zero, dtype=torch.int16),
        bits=bits,
        group_size=32,
        g_idx=None,
        bias=None,
    )


def test_q4_0_pairs_the_halves_of_a_block():
    # byte j: code j in the low half, code j + 16 in the high half
    data = encode_blocks(linear(), Q4_0)
    assert bytes(data.flatten().tolist()) == HALF + bytes(0x11 * j for j in range(16))
    mixed = encode_blocks(linear([[*range(16), *reversed(range(16))]]), Q4_0)
    assert bytes(mixed.flatten().tolist()) == HALF + bytes(j | (15 - j) << 4 for j in range(16))


def test_q4_1_has_the_minimum_after_the_scale():
    data = encode_blocks(linear(zero=3), Q4_1)
    assert bytes(data.flatten().tolist()[:4]) == HALF + struct.pack("<e", -1.5)


def test_q8_0_has_signed_bytes():
    data = encode_blocks(linear([[0, 127, 128, 255] * 8], zero=128, bits=8), Q8_0)
    assert bytes(data.flatten().tolist()) == HALF + struct.pack("<32b", *[-128, -1, 0, 127] * 8)


def test_awq_word_has_outputs_in_the_order_of_its_kernels():
    # AutoAWQ: nibble i of a word holds output order_map[i] of eight
    words = pack_outputs(torch.arange(8, dtype=torch.uint8)[:, None])
    assert words.item() % 2**32 == 0x75316420
    assert unpack_outputs(words).flatten().tolist() == list(range(8))


def test_awq_linear():
    codes = [[(o + i) % 16 for i in range(32)] for o in range(8)]
    tensors = AwqTarget(group_size=32).encode(linear(codes, zero=5))
    assert [tensors[s].shape for s in ("qweight", "qzeros", "scales")] == [(32, 1), (1, 1), (1, 8)]
    assert tensors["qweight"][0].item() % 2**32 == 0x75316420
    assert tensors["qzeros"].item() == 0x55555555


def test_gptq_linear():
    tensors = GptqTarget(dialect="gptq").encode(linear([CODES] * 32))
    assert tensors["qweight"].shape == (4, 32)
    assert [w % 2**32 for w in tensors["qweight"][:2, 0].tolist()] == [0x76543210, 0xFEDCBA98]
    assert set(tensors["qzeros"].flatten().tolist()) == {0x77777777}
    assert GptqTarget(dialect="gptq_v2").encode(linear([CODES] * 32, zero=0))["qzeros"].sum() == 0


def test_mlx_linear():
    tensors = MlxTarget().encode(linear())
    assert tensors["weight"].dtype == torch.uint32
    assert tensors["weight"].tolist() == [[0x76543210, 0xFEDCBA98] * 2]
    assert tensors["biases"].tolist() == [[-4.0]]


def test_compressed_tensors_linear():
    tensors = CompressedTensorsTarget().encode(linear([CODES] * 8, zero=3))
    assert [w % 2**32 for w in tensors["weight_packed"][0].tolist()] == [0x76543210, 0xFEDCBA98] * 2
    assert tensors["weight_shape"].tolist() == [8, 32]
    assert tensors["weight_zero_point"].tolist() == [[0x33333333]]
    assert "weight_zero_point" not in CompressedTensorsTarget().encode(linear())


@pytest.mark.parametrize(("kind", "zero", "bits"), [(Q4_0, 8, 4), (Q4_1, 3, 4), (Q8_0, 128, 8)])
def test_blocks_read_back(kind, zero, bits):
    first = linear([CODES, CODES[::-1]], zero=zero, bits=bits)
    data = encode_blocks(first, kind)
    again = decode_blocks("x", data.view(-1), kind, (2, 32))
    assert torch.equal(again.words, first.words)
    assert torch.equal(again.scales, first.scales)
    assert torch.equal(again.zeros, first.zeros)
    assert torch.equal(decode_plain("x", data.view(-1), kind, (2, 32)), first.dequantize())


@pytest.mark.parametrize(
    ("kind", "bound"), [(F32, 0), (F16, 2**-11), (BF16, 2**-8), (Q8_0, 0.006), (Q6_K, 0.02)]
)
def test_plain_numbers_read_back_within_their_rounding(kind, bound):
    gguf = pytest.importorskip("gguf")
    values = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    data = encode_plain(values, kind)
    again = decode_plain("x", data, kind, (3, 512))
    assert float((again.float() - values).norm() / values.norm()) <= bound
    theirs = gguf.dequantize(data.numpy().reshape(3, -1), gguf.GGMLQuantizationType(kind.number))
    assert torch.equal(torch.from_numpy(theirs).view(3, 512), again.float())


def test_q6_k_of_zeros_is_zero():
    data = encode_plain(torch.zeros(1, 256), Q6_K)
    assert not bool(decode_plain("x", data, Q6_K, (1, 256)).any())
