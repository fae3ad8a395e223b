"""What a decode step does between its linears, in Triton's interpreter, against float64.

The interpreter multiplies no bfloat16 and has no early start: the kernels run here in float16, and
test_gpu_machine_code.py looks at both as they are compiled.
"""

from __future__ import annotations

import pytest
import torch
from tests.helpers.interpreted import interpret

from halfbyte.kernels import triton_decode
from halfbyte.kernels.triton_decode import AttentionShape, add_norm, attend, choose_splits, gate

pytest.importorskip("triton")

NAME = "halfbyte.kernels.triton_decode_kernels"
HALF = 2**-11
"""Half a unit in the last place of a float16, of a number between 1 and 2."""


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    interpret(monkeypatch, NAME)


def norm(x, weight, epsilon):
    return x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt() * weight


@pytest.mark.parametrize("width", [64, 96, 576])
def test_add_and_norm(width):
    x, delta = torch.randn(2, 3, width).half()
    weight = torch.randn(width).half()
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
    gate_up = torch.randn(2, 2 * width).half() * 3
    found = gate(gate_up)
    first, up = gate_up.double().chunk(2, dim=1)
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


PLAIN, TURNED_IN_PART, ONE_KEY_HEAD = (
    (8, 2, 32, 32, False),
    (3, 3, 24, 16, True),
    (6, 1, 64, 64, True),
)


@pytest.mark.parametrize(
    ("shape", "positions", "page_tokens", "splits"),
    [
        (PLAIN, [0], 16, 4),
        (PLAIN, [1, 150], 16, 4),
        (PLAIN, [150], 160, 1),
        (PLAIN, [64, 0, 31], 160, 4),
        (TURNED_IN_PART, [32, 33], 16, 1),
        (TURNED_IN_PART, [150], 160, 4),
        (ONE_KEY_HEAD, [31, 1], 16, 4),
        (ONE_KEY_HEAD, [96], 160, 4),
    ],
)
def test_attention(monkeypatch, shape, positions, page_tokens, splits):
    heads, key_heads, width, rotary, with_norms = shape
    monkeypatch.setattr(triton_decode, "choose_splits", lambda device, programs: splits)
    rows, most = len(positions), 160 // page_tokens
    shape = AttentionShape(
        heads=heads, key_heads=key_heads, width=width, scale=width**-0.5, epsilon=1e-6
    )
    qkv = torch.randn(rows, (heads + 2 * key_heads) * width).half()
    norms = tuple(torch.rand(2, width).half() + 0.5) if with_norms else None
    angles = torch.rand(160, rotary // 2).repeat(1, 2) * 6
    rotations = angles.cos().half(), angles.sin().half()
    # What is not yet written must not be read: it may be anything.
    keys = torch.full((rows * most, key_heads, page_tokens, width), float("nan")).half()
    values = keys.clone()
    tables = torch.randperm(rows * most).view(rows, most).int()
    places = [
        (tables[i, n // page_tokens], n % page_tokens)
        for i, p in enumerate(positions)
        for n in range(p)
    ]
    for page, place in places:
        keys[page, :, place] = torch.randn(key_heads, width).half()
        values[page, :, place] = torch.randn(key_heads, width).half()
    before = keys.clone(), values.clone()
    found = attend(qkv, norms, rotations, torch.tensor(positions), tables, (keys, values), shape)
    for i, position in enumerate(positions):
        pages = tables[i].long()
        old_keys, old_values = (
            cache[pages].transpose(0, 1).reshape(1, key_heads, -1, width) for cache in before
        )
        expected, key, value = attend_exactly(
            qkv[i], norms, rotations, position, old_keys, old_values, shape
        )
        # Queries, key and shares are rounded to float16 once each (with norms three times).
        torch.testing.assert_close(found[i].double(), expected, rtol=0, atol=8e-3)
        page, place = tables[i, position // page_tokens], position % page_tokens
        torch.testing.assert_close(keys[page, :, place].double(), key, rtol=4 * HALF, atol=2e-3)
        assert torch.equal(values[page, :, place].double(), value)
        for cache, old in zip((keys, values), before, strict=True):
            cache[page, :, place] = old[page, :, place]
    for cache, old in zip((keys, values), before, strict=True):
        assert torch.equal(cache.nan_to_num(9), old.nan_to_num(9))


def test_splits_fill_the_device(monkeypatch):
    choose_splits.cache_clear()
    monkeypatch.setattr(triton_decode, "count_processors", lambda device: 132)
    found = [choose_splits(torch.device("cpu"), heads) for heads in (1, 3, 8, 16, 64, 200)]
    choose_splits.cache_clear()
    assert found == [64, 32, 16, 8, 2, 1]
