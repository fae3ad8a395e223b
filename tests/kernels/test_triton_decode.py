"""What a decode step does between its linears, in Triton's interpreter, against float64.

The interpreter multiplies no bfloat16 and has no early start: programs run here in float16, and
test_gpu_machine_code.py looks at both as they are compiled.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.interpreted import interpret

from halfbyte.kernels import triton_decode
from halfbyte.kernels.triton_decode import AttentionShape, add_norm, attend, choose_splits, gate

pytest.importorskip("triton")

NAME = "halfbyte.kernels.triton_decode_programs"
HALF = 2**-11
"""Half a unit in the last place of a float16, of a number between 1 and 2."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, NAME)


def norm(x, weight, epsilon):
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


@pytest.mark.parametrize("width", [64, 96, 576])
def test_add_and_norm(width):
    x, delta, weight = torch.randn(3, width).half()
    total, found = add_norm(x, delta, weight, 1e-5)
    assert torch.equal(total, x + delta)
    # Rounded twice, as Transformers does.
    expected = norm(total.double(), weight.double(), 1e-5)
    assert ((found - expected).abs() <= 3 * HALF * expected.abs() + 1e-6).all()
    same, found = add_norm(x, None, weight, 1e-5)
    assert same is x
    expected = norm(x.double(), weight.double(), 1e-5)
    assert ((found - expected).abs() <= 3 * HALF * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("width", [96, 256, 600])
def test_gate(width):
    gate_up = torch.randn(2 * width).half() * 3
    found = gate(gate_up)
    first, up = gate_up.double().chunk(2)
    expected = first / (1 + (-first).exp()) * up
    assert ((found - expected).abs() <= 3 * HALF * expected.abs() + 1e-6).all()


def turn(x, cosine, sine):
    rotary = len(cosine)
    part = x[..., :rotary]
    first, second = part.chunk(2, dim=-1)
    turned = part * cosine + torch.cat([-second, first], -1) * sine
    return torch.cat([turned, x[..., rotary:]], -1)


def attend_exactly(qkv, norms, rotary, position, keys, values, shape):
    """In float64, over the positions before this one and the token's own."""
    sizes = [shape.heads, shape.key_heads, shape.key_heads]
    q, k, v = qkv.double().view(-1, shape.width).split(sizes)
    if norms is not None:
        q = norm(q, norms[0].double(), shape.epsilon)
        k = norm(k, norms[1].double(), shape.epsilon)
    cosine, sine = (part[position].double() for part in rotary)
    q, k = turn(q, cosine, sine), turn(k, cosine, sine)
    group = shape.heads // shape.key_heads
    results = []
    for head in range(shape.heads):
        own = head // group
        all_keys = torch.cat([keys[0, own, :position].double(), k[own][None]])
        all_values = torch.cat([values[0, own, :position].double(), v[own][None]])
        shares = torch.softmax(all_keys @ q[head] * shape.scale, 0)
        results.append(shares @ all_values)
    return torch.cat(results), k, v


@pytest.mark.parametrize("position", [0, 1, 31, 32, 33, 150])
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width", "rotary", "with_norms"),
    [(8, 2, 32, 32, False), (3, 3, 24, 16, True), (6, 1, 64, 64, True)],
)
def test_attention(monkeypatch, position, splits, heads, key_heads, width, rotary, with_norms):
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, key_heads: splits)
    capacity = 160
    shape = AttentionShape(
        heads=heads, key_heads=key_heads, width=width, scale=width**-0.5, epsilon=1e-6
    )
    qkv = torch.randn((heads + 2 * key_heads) * width).half()
    norms = tuple(torch.rand(2, width).half() + 0.5) if with_norms else None
    angles = torch.rand(capacity, rotary // 2).repeat(1, 2) * 6
    table = angles.cos().half(), angles.sin().half()
    # What is not yet written must not be read: it may be anything.
    keys = torch.full((1, key_heads, capacity, width), float("nan")).half()
    values = keys.clone()
    keys[:, :, :position] = torch.randn(1, key_heads, position, width).half()
    values[:, :, :position] = torch.randn(1, key_heads, position, width).half()
    before = keys.clone(), values.clone()
    expected, key, value = attend_exactly(qkv, norms, table, position, keys, values, shape)
    found = attend(qkv, norms, table, torch.tensor([position]), (keys, values), shape)
    # Queries, key and shares are rounded to float16 once each (with norms three times).
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=8e-3)
    torch.testing.assert_close(keys[0, :, position].double(), key, rtol=4 * HALF, atol=2e-3)
    assert torch.equal(values[0, :, position].double(), value)
    others = torch.arange(capacity) != position
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache[:, :, others].nan_to_num(9), old[:, :, others].nan_to_num(9))


def test_splits_fill_the_device(monkeypatch):
    choose_splits.cache_clear()
    monkeypatch.setattr(triton_decode, "count_processors", lambda device: 132)
    found = [choose_splits(torch.device("cpu"), heads) for heads in (1, 3, 8, 16, 64, 200)]
    choose_splits.cache_clear()
    assert found == [64, 32, 16, 8, 2, 1]
