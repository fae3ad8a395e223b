"""The CUDA kernel for many rows on an emulated GPU, against float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.cuda_emulation import check_product, find_compiler, multiply_rows_emulated
from tests.helpers.packed import make_linear

from halfbyte.kernels.cuda_rows import RowsConfig, choose_splits, count_runs, find_mismatch

emulated = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

SMALL = RowsConfig(rows=32, tiles=1, warpgroups=2, stages=3)


def check(config, rows, *, resident=3, order=0, **layer):
    def multiply(x, operands, bias, spec):
        return multiply_rows_emulated(
            x, operands, bias, spec, config, resident=resident, order=order
        )

    return check_product(multiply, rows, **layer)


def slow(*values):
    """A case that takes the emulator long, and that another one covers nearly."""
    return pytest.param(*values, marks=pytest.mark.slow)


@emulated
@pytest.mark.parametrize(
    ("config", "rows", "out_features"),
    [
        (RowsConfig(rows=8, tiles=2, warpgroups=2, stages=4), 7, 144),
        slow(RowsConfig(rows=16, tiles=1, warpgroups=2, stages=2), 19, 144),
        slow(RowsConfig(rows=16, tiles=4, warpgroups=2, stages=3), 16, 656),
        (RowsConfig(rows=64, tiles=2, warpgroups=2, stages=4), 70, 400),
        (RowsConfig(rows=128, tiles=1, warpgroups=3, stages=3), 130, 208),
        slow(RowsConfig(rows=256, tiles=1, warpgroups=2, stages=3), 200, 144),
        (RowsConfig(rows=32, tiles=1, warpgroups=2, stages=3, cluster=2), 40, 400),
    ],
    ids=str,
)
def test_every_size_of_tile(config, rows, out_features):
    check(config, rows, group_size=64, out_features=out_features, scale_dtype=torch.bfloat16)


@emulated
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [
        (2, torch.float16),
        slow(2, torch.bfloat16),
        slow(3, torch.float16),
        (3, torch.bfloat16),
        (4, torch.float16),
        slow(4, torch.bfloat16),
        slow(8, torch.float16),
        (8, torch.bfloat16),
    ],
)
def test_every_width_with_zeros_and_act_order(bits, dtype):
    layer = {"bits": bits, "dtype": dtype, "scale_dtype": torch.float32}
    check(SMALL, 35, group_size=32, symmetric=False, act_order=True, **layer)


@emulated
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_of_both_short_types(scale_dtype):
    check(SMALL, 9, group_size=64, symmetric=False, scale_dtype=scale_dtype, with_bias=False)


@emulated
@pytest.mark.parametrize("splits", [0, 1, 2, 5])
def test_a_tile_in_any_number_of_runs(splits):
    check(replace(SMALL, splits=splits), 40, resident=7, group_size=576)


@emulated
def test_result_depends_on_no_order():
    one = check(SMALL, 40, resident=7, group_size=192)
    # Thread blocks backwards; copies at once, so that a slot given back too early is overwritten.
    assert torch.equal(check(SMALL, 40, resident=7, order=1, group_size=192), one)
    assert torch.equal(check(SMALL, 40, resident=7, order=2, group_size=192), one)
    assert torch.equal(check(SMALL, 40, resident=7, order=3, group_size=192), one)


@emulated
def test_a_cluster_shares_its_rows():
    # The second thread block of the last cluster has no channels, but copies its part of x.
    config = RowsConfig(rows=32, tiles=1, warpgroups=2, stages=2, cluster=2)
    one = check(config, 40, resident=8, group_size=192, out_features=272)
    assert torch.equal(
        check(config, 40, resident=8, order=1, group_size=192, out_features=272), one
    )
    assert torch.equal(
        check(config, 40, resident=8, order=2, group_size=192, out_features=272), one
    )


@emulated
@pytest.mark.parametrize("joined", [2, 3])
def test_a_cluster_adds_its_sums(joined):
    config = RowsConfig(rows=32, tiles=2, warpgroups=2, stages=3, splits=joined, joined=joined)
    one = check(config, 40, group_size=192, out_features=272)
    assert torch.equal(check(config, 40, order=1, group_size=192, out_features=272), one)
    assert torch.equal(check(config, 40, order=2, group_size=192, out_features=272), one)
    config = RowsConfig(rows=8, tiles=1, warpgroups=2, stages=3, splits=joined, joined=joined)
    check(config, 5, group_size=64)


@emulated
def test_two_warpgroups_in_turns():
    config = RowsConfig(rows=32, tiles=2, warpgroups=2, stages=3, turns=1)
    one = check(config, 40, resident=5, group_size=32, out_features=272)
    assert torch.equal(
        check(replace(config, turns=0), 40, resident=5, group_size=32, out_features=272), one
    )
    assert torch.equal(check(config, 40, resident=5, order=2, group_size=32, out_features=272), one)


def test_runs_are_no_more_than_steps():
    spec = replace(make_linear().spec, in_features=128, out_features=256, group_size=128)
    assert count_runs(SMALL, spec, 33, 132) == 2 * 2 * 2
    assert count_runs(replace(SMALL, splits=1), spec, 33, 132) == 4
    assert count_runs(SMALL, replace(spec, in_features=8192), 32, 132) == 132


def test_what_the_counters_do_not_hold_is_told():
    spec = replace(make_linear().spec, in_features=128, out_features=2**20, group_size=128)
    assert find_mismatch(SMALL, spec, 32) is None
    assert "exceed 16384" in (find_mismatch(SMALL, spec, 64) or "")


@pytest.mark.parametrize(
    ("tiles", "steps", "splits"),
    [(16, 224, 8), (40, 128, 3), (112, 64, 1), (896, 64, 1), (224, 128, 0), (1, 16, 4)],
)
def test_splits_keep_the_processors_busy(tiles, steps, splits):
    # All but the last as they were fastest on an H100; a short layer keeps four steps a run.
    assert choose_splits(tiles, steps, 132) == splits
