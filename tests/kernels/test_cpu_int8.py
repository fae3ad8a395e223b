"""int8 activations on every instruction set of this machine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.native import NEEDS_LIBRARY
from tests.helpers.packed import KINDS, make_linear, make_linear_of

from halfbyte.kernels.cpu_int8 import CpuInt8
from halfbyte.kernels.cpu_native import ROWS_LIMIT, CpuNative
from halfbyte.kernels.registry import KERNELS, find_kernel, select

pytestmark = NEEDS_LIBRARY
LAYERS = [
    (4, 64, 64, 32),
    (4, 576, 192, 128),  # ragged last group
    (4, 144, 40, 16),  # channels that fill no block
    (4, 136, 8, 136),  # one group for the whole row, which is no multiple of 16
    (4, 120, 24, 24),
    (8, 100, 24, 20),
    (8, 256, 64, 64),
    (2, 144, 48, 16),
    (2, 256, 32, 128),
]
"""bits, in, out, group size."""
ROWS = (1, 2, 3, 7, 8, 13, ROWS_LIMIT + 5)


def multiply(linear, x, bias=None):
    kernel = CpuInt8()
    assert kernel.find_mismatch(linear.spec) is None
    operands = replace(linear.stored, weight=kernel.prepare(linear.stored, linear.spec))
    return kernel.apply(x, operands, bias, linear.spec)


def groups_of(linear):
    spec = linear.spec
    plain = torch.arange(spec.in_features) // spec.group_size
    return plain if linear.stored.g_idx is None else linear.stored.g_idx.long()


def half_steps(linear, x):
    """Largest error of each number of x: [rows, in]."""
    groups = groups_of(linear)
    most = torch.zeros(len(x), linear.spec.num_groups, dtype=torch.float64)
    most = most.scatter_reduce(1, groups.expand(len(x), -1), x.double().abs(), "amax")
    return most[:, groups] / (2 * 127)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_number_of_x_is_off_by_half_a_step_at_most(isa, layer, kind, dtype):
    linear = make_linear_of(layer, kind, dtype)
    _, in_features, out_features, _ = layer
    for rows in ROWS:
        # Groups of very different size, so that a step of another group would show.
        x = torch.randn(rows, in_features) * torch.logspace(-2, 2, in_features)
        x, bias = x.to(dtype), torch.randn(out_features).to(dtype)
        found = multiply(linear, x, bias)
        exact = x.double() @ linear.weight.t() + bias.double()
        weight = linear.weight.abs().t()
        steps = half_steps(linear, x)
        # Beside the steps (and the fp32 in which they are computed) as the exact kernel.
        size = (x.double().abs() + steps) @ weight + bias.double().abs()
        bound = 1.0001 * steps @ weight + CpuNative().error_bound(linear.spec) * size
        assert ((found.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_of_a_step_are_multiplied_exactly(isa, layer, kind):
    linear = make_linear_of(layer, kind)
    in_features = layer[1]
    groups = groups_of(linear)
    for rows in ROWS:
        x = torch.randint(-127, 128, (rows, in_features)).float()
        for group in groups.unique():
            x[:, (groups == group).nonzero()[0]] = -127.0
        x *= 2.0 ** (groups % 5 - 2).float()
        exact = x.double() @ linear.weight.t()
        size = x.double().abs() @ linear.weight.abs().t()
        # Only the scales' products and the sum of the groups are rounded.
        bound = (linear.spec.num_groups + 4) * 2**-23 * size
        assert ((multiply(linear, x).double() - exact).abs() <= bound).all()


def test_a_row_does_not_depend_on_the_others(isa):
    linear = make_linear(in_features=576, out_features=72, group_size=64, symmetric=False)
    x = torch.randn(13, 576)
    together = multiply(linear, x)
    for row in range(13):
        assert torch.equal(multiply(linear, x[row]), together[row])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_makes_its_row_not_a_number(isa, bad):
    linear = make_linear(symmetric=False)
    x = torch.randn(3, 128)
    x[1, 70] = bad
    found = multiply(linear, x)
    assert found[1].isnan().all()
    assert found[[0, 2]].isfinite().all()


def test_zeros_and_the_smallest_numbers_give_zero(isa):
    linear = make_linear(symmetric=False)
    x = torch.zeros(2, 128)
    x[1] = 1e-38
    assert torch.equal(multiply(linear, x), torch.zeros(2, linear.spec.out_features))


def test_it_says_what_it_cannot_run():
    kernel = CpuInt8()
    assert "2, 4 or 8" in kernel.find_mismatch(make_linear(bits=3, in_features=96).spec)
    spec = replace(make_linear(bits=8).spec, in_features=2**17, group_size=2**17)
    assert "32 bits" in kernel.find_mismatch(spec)


def test_it_is_chosen_by_name_only():
    spec = make_linear().spec
    assert select(spec).kernel.name != "cpu_int8"
    assert select(spec, forced="cpu_int8").kernel.name == "cpu_int8"
    assert isinstance(find_kernel("cpu_int8"), CpuInt8)
    assert "cpu_int8" not in [entry.name for entry in KERNELS]
