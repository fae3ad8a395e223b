"""The CUDA kernel with bulk copies for few rows on an emulated GPU, against float64."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, replace

import pytest
import torch
from tests.helpers.cuda_emulation import check_product, find_compiler, multiply_stream_emulated
from tests.helpers.packed import make_linear

from halfbyte.kernels import cuda_driver, cuda_stream
from halfbyte.kernels.cuda_driver import Boxes
from halfbyte.kernels.cuda_rows import SHARED_LIMIT
from halfbyte.kernels.cuda_stream import (
    StreamConfig,
    choose_config,
    count_group_rows,
    find_mismatch,
    fit_memory,
)
from halfbyte.kernels.fragments import prepare_fragments
from halfbyte.kernels.gpu_table import GpuTable

emulated = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

SMALL = StreamConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=4, stages=3)


def check(config, rows, *, resident=5, order=0, **layer):
    def multiply(x, operands, bias, spec):
        return multiply_stream_emulated(
            x, operands, bias, spec, config, resident=resident, order=order
        )

    return check_product(multiply, rows, **layer)


@emulated
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_rows_of_one_tile(rows):
    check(SMALL, rows, group_size=64, scale_dtype=torch.bfloat16)


@emulated
@pytest.mark.parametrize(
    "config",
    [
        StreamConfig(row_tiles=2, tiles=2, warps_out=2, warps_in=2, stages=3),
        StreamConfig(row_tiles=2, tiles=4, warps_out=1, warps_in=8, stages=2),
        StreamConfig(row_tiles=2, tiles=1, warps_out=8, warps_in=1, stages=4),
    ],
    ids=str,
)
def test_warps_side_by_side_and_two_tiles_of_rows(config):
    check(config, 11, group_size=64)
    check(config, 16, group_size=64, with_bias=False, out_features=272)


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_with_zeros_and_act_order(bits, dtype):
    layer = {"bits": bits, "dtype": dtype, "scale_dtype": torch.float32}
    check(SMALL, 3, group_size=32, symmetric=False, act_order=True, **layer)


@emulated
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_of_both_short_types(scale_dtype):
    check(SMALL, 3, group_size=64, symmetric=False, scale_dtype=scale_dtype)


@emulated
@pytest.mark.parametrize(
    ("group_size", "warps_in"), [(128, 4), (256, 4), (256, 2), (512, 4), (640, 4)]
)
def test_groups_larger_and_smaller_than_a_unit(group_size, warps_in):
    inputs = 640 if group_size == 640 else 1024
    check(replace(SMALL, warps_in=warps_in), 3, group_size=group_size, in_features=inputs)


@emulated
def test_a_sum_far_from_zero_keeps_its_precision():
    # The offset of the codes is taken off the sum of x, which is largest where x has a mean.
    linear = make_linear(in_features=576, out_features=144, group_size=64, dtype=torch.bfloat16)
    operands = replace(linear.stored, weight=prepare_fragments(linear.stored, linear.spec))
    x = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).bfloat16() + 8
    found = multiply_stream_emulated(x, operands, None, linear.spec, SMALL)
    exact, size = x.double() @ linear.weight.t(), x.double().abs() @ linear.weight.abs().t()
    assert ((found.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-18 * size).all()


@emulated
@pytest.mark.parametrize("resident", [3, 7])
def test_result_depends_on_no_order(resident):
    # By three, slots are filled again; by seven, blocks of channels end within runs.
    config = replace(SMALL, stages=2)
    one = check(config, 4, resident=resident, group_size=64)
    # Thread blocks backwards; copies at once, so that a slot given back too early is overwritten;
    # and threads scattered, so that none is where its neighbours are.
    for order in (1, 2, 3):
        again = check(config, 4, resident=resident, order=order, group_size=64)
        assert torch.equal(again, one), order


@emulated
@pytest.mark.parametrize("resident", [1, 2, 4, 100])
def test_any_number_of_runs(resident):
    check(SMALL, 4, resident=resident, group_size=64)


def make_spec(**changed):
    spec = make_linear(dtype=torch.bfloat16).spec
    return replace(spec, in_features=4096, out_features=4096, group_size=128, **changed)


def test_it_runs_where_it_was_measured_and_nowhere_else(monkeypatch):
    table = GpuTable(stream={((4096, 4096), 8): asdict(SMALL)})
    monkeypatch.setattr(cuda_stream, "load_table", lambda architecture: table)
    spec = make_spec()
    assert choose_config("sm_90", 8, spec, torch.float16) == SMALL
    assert choose_config("sm_90", 1, spec, torch.float16) is None
    assert choose_config("sm_90", 9, spec, torch.float16) is None
    assert choose_config("sm_90", 17, spec, torch.float16) is None
    assert choose_config("sm_90", 8, replace(spec, out_features=8192), torch.float16) is None
    # Three steps of 64 inputs are a group, four a unit.
    assert choose_config("sm_90", 8, replace(spec, group_size=192), torch.float16) is None


@pytest.mark.parametrize(
    ("group_size", "rows"), [(32, 8), (64, 4), (128, 2), (256, 1), (512, 1), (4096, 1)]
)
def test_rows_of_scales_of_a_unit(group_size, rows):
    spec = replace(make_spec(), group_size=group_size)
    assert find_mismatch(SMALL, spec) is None
    assert count_group_rows(SMALL, spec) == rows


def test_what_does_not_fit_is_told():
    assert "groups of 192" in (find_mismatch(SMALL, replace(make_spec(), group_size=192)) or "")
    wide = replace(SMALL, tiles=4, warps_out=8)
    assert "at most 256 channels" in (find_mismatch(wide, make_spec()) or "")
    huge = replace(make_spec(), out_features=2**20)
    assert "more than 16384 blocks" in (find_mismatch(SMALL, huge) or "")


@pytest.mark.parametrize("blocks", [1, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_thread_blocks_fit_a_multiprocessor(bits, blocks):
    large = StreamConfig(
        row_tiles=2, tiles=4, warps_out=1, warps_in=16, stages=8, blocks=blocks, spare=blocks - 1
    )
    spec = replace(make_spec(symmetric=False), bits=bits, group_size=32)
    config = fit_memory(large, spec, torch.float32)
    assert config.stages >= 2
    assert blocks * (config.count_shared_bytes(spec, torch.float32) + 1024) <= SHARED_LIMIT + 1024


def test_boxes_are_described_to_the_driver(monkeypatch):
    told = {}

    class Driver:
        def cuTensorMapEncodeTiled(self, room, kind, rank, address, sizes, strides, box, *rest):
            told.update(kind=kind.value, rank=rank.value, address=address.value)
            told.update(sizes=[*sizes], strides=[*strides], box=[*box], steps=[*rest[0]])
            told["swizzle"] = rest[2].value
            (ctypes.c_ulonglong * 16).from_address(room.value)[:] = range(16)
            assert room.value % 64 == 0
            return 0

    monkeypatch.setattr(cuda_driver, "load_driver", Driver)
    boxes = Boxes(
        address=4096, element_bytes=8, sizes=(64, 3, 9), strides=(512, 1536), box=(64, 2, 4)
    )
    assert cuda_driver.encode_boxes(boxes) == tuple(range(16))
    assert told == {
        "kind": 4,  # CU_TENSOR_MAP_DATA_TYPE_UINT64
        "rank": 3,
        "address": 4096,
        "sizes": [64, 3, 9],
        "strides": [512, 1536],
        "box": [64, 2, 4],
        "steps": [1, 1, 1],
        "swizzle": 0,
    }
    cuda_driver.encode_boxes(
        Boxes(
            address=8192,
            element_bytes=2,
            sizes=(576, 5),
            strides=(1152,),
            box=(64, 8),
            swizzled=True,
        )
    )
    # CU_TENSOR_MAP_DATA_TYPE_UINT16 and CU_TENSOR_MAP_SWIZZLE_128B.
    assert (told["kind"], told["rank"], told["swizzle"]) == (1, 2, 3)
