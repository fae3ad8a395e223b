"""Work that threads share comes to the same bits as one thread's."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from tests.helpers.checkpoints import tiny_llama_config, write_checkpoint
from tests.helpers.native import NEEDS_LIBRARY
from tests.helpers.packed import make_linear
from torch import nn

import halfbyte
from halfbyte.kernels.cpu_int8 import CpuInt8
from halfbyte.kernels.cpu_native import ROWS_LIMIT, SHARED_BYTES, CpuNative
from halfbyte.nn.native_decoder import NativeDecoder
from halfbyte.nn.native_head import NativeHead

pytestmark = NEEDS_LIBRARY


@contextmanager
def threads(count):
    """Let torch, and the library with it, have so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def assert_same(compute):
    with threads(1):
        alone = compute()
    for count in (2, 3):
        with threads(count):
            assert torch.equal(compute(), alone), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 3, 13, ROWS_LIMIT + 5])
@pytest.mark.parametrize("kernel", [CpuNative(), CpuInt8()], ids=lambda kernel: kernel.name)
def test_products(isa, kernel, rows, dtype):
    linear = make_linear(in_features=576, out_features=200, group_size=64, dtype=dtype)
    operands = replace(linear.stored, weight=kernel.prepare(linear.stored, linear.spec))
    x = torch.randn(rows, 576, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same(lambda: kernel.apply(x, operands, None, linear.spec))


def test_packing_of_a_weight_that_is_worth_sharing():
    linear = make_linear(in_features=1024, out_features=2048, group_size=64)
    (packed,) = CpuNative().prepare(linear.stored, linear.spec)
    assert packed.nbytes >= SHARED_BYTES
    assert_same(lambda: CpuNative().prepare(linear.stored, linear.spec)[0])


@pytest.mark.parametrize("bits", [16, 8])
def test_the_head(isa, bits):
    torch.manual_seed(0)
    head = NativeHead(nn.Linear(80, 500, bias=False).requires_grad_(False), bits)
    hidden = torch.randn(3, 80)
    assert_same(lambda: head(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_decoder(isa, dtype, tmp_path):
    config = tiny_llama_config(max_position_embeddings=512)
    write_checkpoint(tmp_path, config)
    model = halfbyte.load(tmp_path, dtype=dtype)
    tokens = torch.randint(3, 128, (300,), generator=torch.Generator().manual_seed(1)).tolist()
    # Enough rows that norms and activations are shared too.
    assert len(tokens) * config.hidden_size >= 1 << 14

    def compute():
        decoder = NativeDecoder(model, 301)
        prompt = decoder.run(tokens, list(range(300)), [0], [0] * 300, prompt=True)
        return torch.cat([prompt.reshape(300, -1), decoder.step(5, 300).reshape(1, -1)])

    with torch.inference_mode():
        assert_same(compute)
