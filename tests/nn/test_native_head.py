from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tests.helpers.native import NEEDS_LIBRARY
from torch import nn

from halfbyte.errors import ConfigError
from halfbyte.nn.native_head import NativeHead, round_weight

pytestmark = NEEDS_LIBRARY


def make_head(dtype, *, width=72, bias=False):
    torch.manual_seed(0)
    return nn.Linear(width, 50, bias=bias).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 72, 7])
def test_a_stored_head_is_multiplied_exactly_as_it_is(isa, dtype, width):
    head = make_head(dtype, width=width)
    hidden = torch.randn(width)
    exact = head.weight.double() @ hidden.double()
    found = NativeHead(head)(hidden)
    assert found.dtype == torch.float32
    size = head.weight.double().abs() @ hidden.double().abs()
    assert ((found.double() - exact).abs() <= 1e-7 * (width + 2) * size).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [16, 8, 4])
def test_a_row_of_logits_does_not_depend_on_the_others(isa, dtype, bits):
    head = NativeHead(make_head(dtype, width=80), bits)
    hidden = torch.randn(15, 80, generator=torch.Generator().manual_seed(2))
    together = head(hidden)
    assert together.shape == (15, 50)
    for row, logits in zip(hidden, together, strict=True):
        assert torch.equal(head(row), logits)


@pytest.mark.parametrize("bits", [16, 8])
def test_no_rows_give_no_logits_where_nothing_ran_before(bits):
    head = NativeHead(make_head(torch.bfloat16), bits)
    with ThreadPoolExecutor(1) as fresh:
        assert fresh.submit(head, torch.empty(0, 72)).result().shape == (0, 50)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_heads_that_the_library_does_not_read_run_in_torch(dtype):
    head = make_head(dtype, bias=True)
    hidden = torch.randn(72)
    found = NativeHead(head)(hidden)
    assert torch.equal(found, head(hidden.to(dtype)).float())


@pytest.mark.parametrize("bits", [8, 4])
def test_a_rounded_head_is_off_by_half_a_step_at_most(bits):
    weight = torch.randn(64, 72)
    head = nn.Linear(72, 64, bias=False)
    head.weight.data = weight
    rounded = NativeHead(head, bits)
    found = torch.stack([rounded(column) for column in torch.eye(72)]).t()
    largest = weight.view(64, -1, 8).abs().amax(-1).repeat_interleave(8, 1)
    step = largest / (2 ** (bits - 1) - 1)
    # Half a step, and what the scale's own rounding to bf16 moves the ends by.
    assert ((found - weight).abs() <= 0.5 * step + largest * 2**-8).all()
    assert rounded.read_bytes == 64 * 72 * bits // 8 + 64 * 9 * 2 + 128


def test_other_bits_and_widths_are_refused():
    with pytest.raises(ConfigError, match=r"the head to 5 bits; allowed: \(16, 8, 4\)"):
        NativeHead(make_head(torch.float32), 5)
    with pytest.raises(ConfigError, match="head of width 7 to 8 bits: the width is not a mult"):
        round_weight(torch.randn(4, 7), 8)
