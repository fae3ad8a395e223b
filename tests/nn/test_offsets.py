"""Offsets against float64 loops, in every order of groups, with their gradient."""

from __future__ import annotations

import pytest
import torch

from halfbyte.nn.offsets import multiply_offsets, spread_offsets, sum_groups

IN, OUT = 24, 5
ORDERS = {
    "even": (8, None),
    "ragged": (9, None),
    "one group": (24, None),
    "shuffled": (8, torch.randperm(IN, generator=torch.Generator().manual_seed(1)) // 8),
}


@pytest.mark.parametrize("order", ORDERS)
def test_offsets_are_a_weight_that_is_constant_over_groups(order: str) -> None:
    size, g_idx = ORDERS[order]
    dice = torch.Generator().manual_seed(0)
    groups = g_idx if g_idx is not None else torch.arange(IN) // size
    offsets = torch.randn(int(groups.max()) + 1, OUT, generator=dice)
    x = torch.randn(2, 3, IN, dtype=torch.float64, generator=dice).requires_grad_()
    weight = torch.empty(OUT, IN, dtype=torch.float64)
    for row in range(OUT):
        for column in range(IN):
            weight[row, column] = float(offsets[groups[column], row])
    assert torch.equal(spread_offsets(offsets, IN, size, g_idx).double(), weight)
    expected = x @ weight.t()
    found = multiply_offsets(x, offsets, size, g_idx)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-13)
    gradient = torch.randn(found.shape, dtype=torch.float64, generator=dice)
    (to_x,) = torch.autograd.grad(found, x, gradient)
    torch.testing.assert_close(to_x, gradient @ weight, rtol=0, atol=1e-13)


def test_sums_of_16_bit_inputs_are_not_rounded_on_the_way() -> None:
    x = torch.tensor([[256.0] + [1.0] * 7], dtype=torch.bfloat16)
    assert float(sum_groups(x, 8, None)) != 263.0, "bfloat16 cannot hold it"
    assert float(multiply_offsets(x, torch.ones(1, 1), 8, None)) == 263.0
