from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch.nn import functional

from halfbyte.errors import ModelError
from halfbyte.nn.weight import QuantizedWeight


class Layer:
    """Counts how often its weight is dequantized."""

    def __init__(self):
        self.numbers = torch.arange(12.0).view(3, 4)
        self.times = 0

    def dequantize(self):
        self.times += 1
        return self.numbers.clone()


@pytest.fixture
def layer():
    return Layer()


@pytest.fixture
def weight(layer):
    return QuantizedWeight.of(layer, (3, 4), torch.float32, torch.device("cpu"))


def test_looking_at_it_makes_nothing(layer, weight):
    assert (weight.shape, weight.dtype, weight.device) == (
        (3, 4),
        torch.float32,
        torch.device("cpu"),
    )
    assert weight.numel() == 12
    assert not weight.requires_grad
    assert isinstance(weight, torch.Tensor)
    assert repr(weight) == "QuantizedWeight(shape=[3, 4], dtype=torch.float32)"
    assert weight.detach() is not None
    assert weight.data.shape == (3, 4)
    assert layer.times == 0


@pytest.mark.parametrize(
    "use",
    [
        lambda w: w + 0,
        lambda w: w.clone(),
        lambda w: w.data.clone(),
        lambda w: w.to(torch.float64).float(),
        lambda w: torch.cat([w]),
        lambda w: w[:],
        lambda w: copy.deepcopy(w),
        lambda w: pickle.loads(pickle.dumps(w)),
    ],
)
def test_using_it_gives_plain_numbers(layer, weight, use):
    result = use(weight)
    assert type(result) is torch.Tensor
    assert torch.equal(result, layer.numbers)


def test_gradient_passes_through_a_product_with_it(layer, weight):
    x = torch.randn(2, 4, requires_grad=True)
    functional.linear(x, weight).sum().backward()
    torch.testing.assert_close(x.grad, layer.numbers.sum(0).expand(2, 4))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.add_(1),
        lambda w: w.data.add_(1),
        lambda w: w.copy_(torch.zeros(3, 4)),
        lambda w: w.zero_(),
        lambda w: torch.add(torch.ones(3, 4), 1, out=w),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: setattr(w, "data", torch.zeros(3, 4)),
    ],
)
def test_writing_to_it_is_refused(weight, write):
    with pytest.raises(ModelError, match="Cannot write to the weight of a quantized linear"):
        write(weight)
