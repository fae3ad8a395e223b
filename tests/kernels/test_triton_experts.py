"""Routing and products of a mixture of experts in Triton's interpreter, against naive versions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.interpreted import interpret
from tests.helpers.packed import make_linear

from halfbyte.kernels import triton_experts
from halfbyte.kernels.fragments import prepare_fragments
from halfbyte.kernels.triton_configs import RULES, choose_experts_config
from halfbyte.kernels.triton_experts import (
    ExpertWeights,
    choose_block_rows,
    combine,
    count_row_blocks,
    multiply_experts,
    route,
    route_in_torch,
)
from halfbyte.kernels.triton_linear import TritonLinear

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    names = ("halfbyte.kernels.triton_kernels", "halfbyte.kernels.triton_expert_kernels")
    interpret(monkeypatch, *names)
    monkeypatch.setattr(triton_experts, "DEVICES", ("cpu",))


def choose(tokens, per_token, num_experts, seed=0):
    """Each token's experts, all different, some chosen by many tokens."""
    generator = torch.Generator().manual_seed(seed)
    odds = torch.rand(tokens, num_experts, generator=generator) ** 4
    return torch.multinomial(odds + 1e-6, per_token, generator=generator)


def check_routing(routing, experts, num_experts):
    """Each pair of token and expert has a row of its own, in a block of that expert."""
    size = routing.block_rows
    assert len(routing.block_experts) == count_row_blocks(experts.numel(), num_experts, size)
    assert len(routing.sources) == size * len(routing.block_experts)
    seen = set()
    for token, ids in enumerate(experts.tolist()):
        for k, expert in enumerate(ids):
            row = int(routing.places[token, k])
            if not 0 <= expert < num_experts:
                assert row == -1
                continue
            assert int(routing.sources[row]) == token
            assert int(routing.block_experts[row // size]) == expert
            assert row % size < int(routing.block_counts[row // size])
            seen.add(row)
    # All different, and no row is computed for nobody.
    assert len(seen) == int(((experts >= 0) & (experts < num_experts)).sum())
    assert len(seen) == int(routing.block_counts.sum())


@pytest.mark.parametrize("block_rows", [16, 32, 64])
@pytest.mark.parametrize(
    ("tokens", "per_token", "num_experts"),
    [(1, 2, 8), (1, 8, 128), (3, 3, 5), (16, 4, 20), (37, 2, 2), (100, 1, 7)],
)
def test_every_row_is_in_a_block_of_its_expert(tokens, per_token, num_experts, block_rows):
    experts = choose(tokens, per_token, num_experts)
    found = route(experts, num_experts, block_rows)
    check_routing(found, experts, num_experts)
    plain = route_in_torch(experts, num_experts, block_rows)
    check_routing(plain, experts, num_experts)
    assert torch.equal(found.places, plain.places)
    assert torch.equal(found.block_counts, plain.block_counts)


@pytest.mark.parametrize("way", [route, route_in_torch])
def test_ids_of_no_expert_get_no_row(way):
    experts = torch.tensor([[0, 4], [4, 4], [3, 1], [-1, 3]])
    check_routing(way(experts, 4, 16), experts, 4)
    nobody = torch.full((3, 2), 4)
    found = way(nobody, 4, 16)
    check_routing(found, nobody, 4)


def test_many_tokens_are_routed_in_torch(monkeypatch):
    monkeypatch.setattr(triton_experts, "MAX_TILE", 8 * 9)
    kinds = []
    plain = triton_experts.route_in_torch
    monkeypatch.setattr(
        triton_experts, "route_in_torch", lambda *given: kinds.append(1) or plain(*given)
    )
    route(choose(9, 2, 8), 8, 16)
    assert not kinds
    route(choose(10, 2, 8), 8, 16)
    assert kinds


def test_enough_blocks_for_the_worst_choice():
    # Every expert gets one row more than fills its blocks.
    experts = torch.arange(4).repeat_interleave(17)[:, None]
    check_routing(route_in_torch(experts, 4, 16), experts, 4)
    assert count_row_blocks(68, 4, 16) == 8
    assert count_row_blocks(8, 128, 16) == 8


def make_experts(count, *, with_bias=False, **layer):
    """Linears, their operands as fragments, and biases."""
    sizes = {"in_features": 128, "out_features": 96, "dtype": torch.float16}
    linears = [make_linear(**(sizes | layer), seed=seed) for seed in range(count)]
    operands = [
        replace(one.stored, weight=prepare_fragments(one.stored, one.spec)) for one in linears
    ]
    width = linears[0].spec.out_features
    biases = [torch.randn(width).half() if with_bias else None for _ in linears]
    return linears, ExpertWeights(linears[0].spec, operands, biases), operands, biases


def check_product(found, x, routing, linears, biases, by_token):
    bound = TritonLinear().error_bound(linears[0].spec)
    size = routing.block_rows
    rows = [
        block * size + place
        for block, count in enumerate(routing.block_counts.tolist())
        for place in range(count)
    ]
    assert rows
    for row in rows:
        expert = int(routing.block_experts[row // size])
        source = x[int(routing.sources[row]) if by_token else row].double()
        exact = linears[expert].weight @ source
        magnitude = linears[expert].weight.abs() @ source.abs()
        if biases[expert] is not None:
            exact, magnitude = exact + biases[expert], magnitude + biases[expert].abs()
        assert ((found[row].double() - exact).abs() <= bound * magnitude).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize(("symmetric", "act_order"), [(True, False), (False, False), (False, True)])
def test_each_row_is_multiplied_by_its_expert(bits, group_size, symmetric, act_order):
    kept = make_experts(
        4,
        bits=bits,
        group_size=group_size,
        symmetric=symmetric,
        act_order=act_order,
        with_bias=symmetric,
    )
    linears, weights, _operands, biases = kept
    routing = route(choose(5, 2, 4), 4, 16)
    x = torch.randn(5, 128).half()
    found = multiply_experts(x, weights, routing, by_token=True, fast=False)
    check_product(found, x, routing, linears, biases, by_token=True)


@pytest.mark.parametrize("block_rows", [16, 32])
@pytest.mark.parametrize("processors", [1, 64])
def test_rows_in_the_order_of_the_experts(monkeypatch, processors, block_rows):
    """As of the second product; and with inputs split over programs."""
    monkeypatch.setattr(triton_experts, "count_processors", lambda device: processors)
    kept = make_experts(3, in_features=512, out_features=64)
    linears, weights, _operands, biases = kept
    routing = route(choose(20, 2, 3), 3, block_rows)
    config = choose_experts_config(
        "sm_90", processors, 512, 64, len(routing.block_counts), block_rows
    )
    assert config.splits == (1 if processors == 1 else 2)
    x = torch.randn(len(routing.sources), 512).half()
    found = multiply_experts(x, weights, routing, by_token=False, fast=False)
    check_product(found, x, routing, linears, biases, by_token=False)


def test_results_are_weighed_and_summed_in_fp32():
    experts = torch.tensor([[2, 0], [1, 4], [0, 1]])
    routing = route(experts, 4, 16)
    parts = torch.randn(len(routing.sources), 600).half()
    weights = torch.rand(3, 2).half()
    found = combine(parts, routing, weights)
    assert found.dtype == torch.float16
    exact = torch.zeros(3, 600, dtype=torch.float64)
    for token in range(3):
        for k in range(2):
            if experts[token, k] < 4:
                row = parts[routing.places[token, k]].double()
                exact[token] += weights[token, k].double() * row
    torch.testing.assert_close(found.double(), exact, rtol=2**-10, atol=1e-6)


def test_blocks_grow_with_the_rows_of_an_expert():
    assert choose_block_rows(8, 128) == 16
    assert choose_block_rows(16 * 4, 4) == 16
    assert choose_block_rows(20 * 4, 4) == 32
    assert choose_block_rows(8 * 4096, 128) == 64
    assert {choose_block_rows(n, 1) for n in (1, 32, 64, 9999)} <= set(RULES)
