"""The CUDA kernel for few rows on an emulated GPU, against float64; its compilation and cache."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tests.helpers.cuda_emulation import check_product, find_compiler, multiply_emulated
from tests.helpers.packed import make_linear

from halfbyte.errors import KernelUnavailable
from halfbyte.kernels import cuda_compiler
from halfbyte.kernels.cuda_few_rows import plan_work
from halfbyte.kernels.cuda_linear import (
    ROWS_LIMIT,
    SHARED_LIMIT,
    CudaConfig,
    choose_config,
)

emulated = pytest.mark.skipif(find_compiler() is None, reason="needs a C++ compiler")

ONE_ROW = CudaConfig(row_tiles=1, tiles=4, warps_out=1, warps_in=2, stages=3)
TWO_WARPS_OUT = CudaConfig(row_tiles=2, tiles=2, warps_out=2, warps_in=2, stages=3)


def check(config, rows, *, runs=5, backwards=False, **layer):
    def multiply(x, operands, bias, spec):
        return multiply_emulated(x, operands, bias, spec, config, runs=runs, backwards=backwards)

    return check_product(multiply, rows, **layer)


@emulated
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_rows_of_one_tile(rows):
    check(ONE_ROW, rows, group_size=128)


@emulated
@pytest.mark.parametrize("layer", [{"group_size": 576}, {"group_size": 64, "with_bias": False}])
def test_several_tiles_of_rows_and_warps_that_share_inputs(layer):
    check(TWO_WARPS_OUT, 11, **layer)


@emulated
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_with_zeros_and_act_order(bits, dtype):
    layer = {"bits": bits, "dtype": dtype, "scale_dtype": torch.float32}
    check(ONE_ROW, 3, group_size=32, symmetric=False, act_order=True, **layer)


@emulated
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_of_both_short_types(scale_dtype):
    check(ONE_ROW, 3, group_size=64, symmetric=False, scale_dtype=scale_dtype)


@emulated
def test_result_does_not_depend_on_who_arrives_last():
    # Seven runs cut the three blocks of channels in places that do not fit them.
    one = check(ONE_ROW, 4, runs=7, group_size=128)
    assert torch.equal(check(ONE_ROW, 4, runs=7, backwards=True, group_size=128), one)


@emulated
@pytest.mark.parametrize("runs", [1, 2, 100])
def test_any_number_of_runs(runs):
    check(ONE_ROW, 4, runs=runs, group_size=128)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 32, 33, ROWS_LIMIT])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_chosen_blocks_fit_the_rows_and_the_memory_of_every_gpu(rows, bits):
    for architecture, limit in SHARED_LIMIT.items():
        spec = make_linear(bits=bits, symmetric=False, dtype=torch.float16).spec
        config = choose_config(architecture, rows, spec, torch.float32)
        assert config.row_tiles * 8 >= rows
        assert config.count_shared_bytes(spec, torch.float32) <= limit, architecture


def test_work_is_cut_into_equal_runs():
    spec = replace(make_linear().spec, in_features=4096, out_features=4096, group_size=128)
    config = CudaConfig(row_tiles=1, tiles=4, warps_out=1, warps_in=8, stages=4)
    # 64 blocks of 8 chunks are 512 units: 128 runs of 4, not 132 of 3 or 4.
    work = plan_work(config, spec, 132)
    assert (work.channel_blocks, work.runs) == (64, 128)
    assert plan_work(config, replace(spec, out_features=16), 132).runs == 8


def test_runs_that_end_with_blocks_of_channels_may_be_a_little_longer():
    spec = replace(make_linear().spec, in_features=28672, out_features=8192, group_size=128)
    config = CudaConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=4)
    # 256 blocks of 28 chunks are 7168 units: 131 runs of 55, or 128 of 56.
    assert plan_work(config, spec, 132).runs == 131
    assert plan_work(config, spec, 132, slack=0.04).runs == 128
    assert plan_work(config, spec, 132, slack=0.01).runs == 131
    # Without a common length the blocks do not end where runs do.
    odd = replace(spec, out_features=8192 + 32)
    assert plan_work(config, odd, 132, slack=0.04).runs == 131


def test_a_source_that_does_not_compile_is_a_reason(nvrtc):
    with pytest.raises(KernelUnavailable, match=r"NVRTC \d+\.\d+ cannot compile .*-DBITS=4.*error"):
        cuda_compiler.compile_source("nonsense;", {"BITS": 4}, "sm_90")


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Record the calls of a fake compiler, with an empty disk cache."""
    asked = []

    def compile_once(nvrtc, source, options):
        asked.append(options)
        return b"cubin"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(cuda_compiler, "load_nvrtc", lambda: None)
    monkeypatch.setattr(cuda_compiler, "find_nvrtc_version", lambda nvrtc: (13, 0))
    monkeypatch.setattr(cuda_compiler, "_compile", compile_once)
    return asked


def compile_four_bits(**options):
    assert cuda_compiler.compile_source("source", {"BITS": 4}, "sm_90", **options) == b"cubin"


def list_kept(folder):
    return list((folder / "halfbyte" / "kernels").iterdir())


def test_machine_code_is_kept_on_disk(compiled, tmp_path):
    for _ in range(2):
        compile_four_bits()
    assert len(compiled) == 1
    cuda_compiler.compile_source("source", {"BITS": 8}, "sm_90")
    cuda_compiler.compile_source("source", {"BITS": 4}, "sm_80")
    assert len(compiled) == 3
    assert [path.suffix for path in list_kept(tmp_path)] == [".cubin"] * 3
    compile_four_bits(force=True)
    assert len(compiled) == 4


def test_what_is_kept_may_be_read_by_whom_the_user_lets(compiled, tmp_path):
    before = os.umask(0o027)
    try:
        compile_four_bits()
    finally:
        os.umask(before)
    assert [oct(path.stat().st_mode & 0o777) for path in list_kept(tmp_path)] == ["0o640"]


def test_an_empty_file_is_compiled_again(compiled, tmp_path):
    compile_four_bits()
    (kept,) = list_kept(tmp_path)
    kept.write_bytes(b"")
    compile_four_bits()
    assert len(compiled) == 2
    assert kept.read_bytes() == b"cubin"


def test_a_file_that_cannot_be_read_is_compiled_again(compiled, tmp_path, monkeypatch):
    compile_four_bits()

    def refuse(self):
        raise PermissionError(f"another user's: {self}")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    compile_four_bits()
    assert len(compiled) == 2


def test_a_full_disk_keeps_nothing_and_leaves_nothing(compiled, tmp_path, monkeypatch, caplog):
    write = Path.write_bytes

    def run_full(self, data):
        write(self, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", run_full)
    compile_four_bits()
    assert list_kept(tmp_path) == []
    assert caplog.text.count("compiled GPU kernels cannot be cached") == 1


def test_without_a_home_nothing_is_kept(compiled, monkeypatch):
    def refuse():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", refuse)
    for _ in range(2):
        compile_four_bits()
    assert len(compiled) == 2
