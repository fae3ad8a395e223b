"""Kernel selection and tile sizes on various GPUs, all of them fake."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests.helpers.packed import make_linear

from halfbyte.cli import doctor
from halfbyte.errors import KernelUnavailable
from halfbyte.kernels import (
    cuda_linear,
    cuda_rows,
    cuda_stream,
    gpu_device,
    registry,
    triton_configs,
    triton_linear,
)
from halfbyte.kernels.contract import Operands
from halfbyte.kernels.cuda_linear import CudaConfig, CudaLinear
from halfbyte.kernels.gpu_table import load_table
from halfbyte.kernels.triton_configs import TritonConfig, choose_splits
from halfbyte.kernels.triton_linear import TritonLinear

SPEC = replace(
    make_linear(dtype=torch.bfloat16).spec,
    in_features=4096,
    out_features=6144,
    group_size=128,
    device_type="cuda",
)
H100 = ("sm_90", 132)


@pytest.fixture
def gpu(monkeypatch):
    """Make torch, Triton and the compiler report a fake GPU."""

    def make(capability=(9, 0), *, hip=None, triton=None, compiles=None):
        def load_function(*_):
            if compiles:
                raise KernelUnavailable(compiles)

        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(cuda_linear, "count_processors", lambda device: H100[1])
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(cuda_linear, "load_function", load_function)
        monkeypatch.setattr(cuda_rows, "load_function", load_function)
        monkeypatch.setattr(cuda_stream, "load_function", load_function)
        for module in (cuda_linear, triton_linear):
            monkeypatch.setattr(module, "find_triton_obstacle", lambda: triton)
        forget()

    def forget():
        cuda_linear._find_obstacle.cache_clear()
        cuda_linear.choose_tier.cache_clear()
        cuda_rows.find_obstacle.cache_clear()
        cuda_stream.find_obstacle.cache_clear()
        gpu_device.is_nvidia.cache_clear()
        gpu_device.starts_early.cache_clear()
        gpu_device.name_architecture.cache_clear()

    monkeypatch.delenv("HALFBYTE_KERNEL", raising=False)
    yield make
    forget()


def choose(spec=SPEC):
    return registry.select(spec)


def test_an_h100_runs_the_cuda_kernel(gpu):
    gpu()
    assert choose().kernel.name == "cuda"
    assert choose().rejected == {}


def test_an_old_gpu_falls_back_to_triton_and_that_to_torch(gpu):
    gpu((7, 5))
    choice = choose()
    assert choice.kernel.name == "triton"
    assert choice.rejected == {"cuda": "needs compute capability 8.0; this GPU has 7.5"}
    gpu((7, 5), triton="needs Triton")
    choice = choose()
    assert choice.kernel.name == "torch_reference"
    assert choice.rejected["triton"] == "needs Triton"


def test_another_makers_gpu_runs_triton(gpu):
    gpu(hip="6.4")
    choice = choose()
    assert choice.kernel.name == "triton"
    assert choice.rejected == {"cuda": "needs an NVIDIA GPU"}


def test_what_the_compiler_says_is_the_reason(gpu):
    gpu(compiles="Cannot compile CUDA kernels: libnvrtc.so.13 is neither here nor there.")
    assert choose().kernel.name == "triton"
    assert "libnvrtc.so.13" in choose().rejected["cuda"]


def test_a_layer_that_fits_no_tile_says_so_twice(gpu):
    gpu()
    rejected = choose(replace(SPEC, in_features=4100)).rejected
    for kernel in ("cuda", "triton"):
        assert rejected[kernel] == "needs in_features a multiple of 64, not 4100"


def test_doctor_tells_each_reason_and_who_takes_which_rows(gpu, capsys):
    gpu((7, 5))
    examined = doctor.examine()
    assert examined["kernels"]["cuda"] == "needs compute capability 8.0; this GPU has 7.5"
    assert examined["kernels"]["triton"] is None
    case = next(case for case in examined["cases"] if case.device == "cuda")
    assert case.kernel == "triton"
    assert case.rejected == {"cuda": "needs compute capability 8.0; this GPU has 7.5"}
    gpu()
    case = next(case for case in doctor.examine()["cases"] if case.device == "cuda")
    assert case.kernel == "cuda"
    assert case.division == (
        "up to 16 rows CUDA, up to 64 rows Triton, up to 1024 rows CUDA for many, "
        "then dequantized first"
    )
    gpu(triton="needs Triton")
    case = next(case for case in doctor.examine()["cases"] if case.device == "cuda")
    assert case.division == (
        "up to 64 rows CUDA, up to 1024 rows CUDA for many, then dequantized first (needs Triton)"
    )


# ------------------------------------------------------------------- which rows run where


@pytest.fixture
def runs(gpu, monkeypatch):
    """The kernels that multiplied, in order; nothing is computed."""
    gpu()
    called = []

    def note(name):
        def run(rows, operands, bias, spec, config):
            called.append(name)
            return rows.new_zeros(rows.shape[0], spec.out_features)

        return run

    def dequantize(self, operands, spec, dtype):
        called.append("dequantize")
        return torch.zeros(spec.out_features, spec.in_features, dtype=dtype)

    monkeypatch.setattr(cuda_linear, "multiply", note("cuda"))
    monkeypatch.setattr(triton_linear, "multiply", note("triton"))
    monkeypatch.setattr(cuda_rows, "multiply", note("many"))
    monkeypatch.setattr(cuda_stream, "multiply", note("stream"))
    monkeypatch.setattr(CudaLinear, "dequantize", dequantize)
    for module in (cuda_linear, triton_linear):
        monkeypatch.setattr(module, "name_architecture", lambda device: "sm_90")
    return called


def apply(rows, spec=SPEC):
    x = torch.zeros(rows, spec.in_features, dtype=spec.dtype)
    operands = Operands(
        weight=(torch.empty(0),),
        qzeros=torch.empty(0),
        scales=torch.empty(0, dtype=torch.float16),
        g_idx=None,
    )
    assert CudaLinear().apply(x, operands, None, spec).shape == (rows, spec.out_features)


@pytest.mark.parametrize(
    ("sizes", "crossing"),
    [((4096, 6144), 8), ((4096, 4096), 16), ((28672, 8192), 16), ((2048, 2048), 16)],
)
def test_rows_go_where_they_were_measured_to_be_faster(runs, sizes, crossing):
    spec = replace(SPEC, in_features=sizes[0], out_features=sizes[1])
    for rows in (1, crossing, crossing + 1, 128, 1024, 1025):
        apply(rows, spec)
    bucket = 2 * crossing
    middle = "many" if load_table("sm_90").many_rows.get((sizes, bucket)) else "triton"
    assert runs == ["cuda", "cuda", middle, "many", "many", "dequantize"]


@pytest.fixture
def measured(monkeypatch):
    """A table with the kernel for many rows: faster at 128 and at 1024 rows, slower at 256."""
    config = {"rows": 128, "tiles": 2, "warpgroups": 2, "stages": 8}
    shape = (SPEC.in_features, SPEC.out_features)
    many = {(shape, 128): config, (shape, 256): None, (shape, 1024): config}
    table = replace(load_table("sm_90"), many_rows=many)
    for module in (cuda_linear, cuda_rows):
        monkeypatch.setattr(module, "load_table", lambda architecture: table)


def test_many_rows_go_to_the_warpgroups_where_those_are_faster(runs, measured):
    for rows in (8, 100, 200, 1000, 1025):
        apply(rows)
    assert runs == ["cuda", "many", "dequantize", "many", "dequantize"]


def test_many_rows_that_cannot_be_compiled_go_elsewhere(runs, measured, gpu, monkeypatch):
    gpu(compiles="too old a compiler")
    apply(100)
    apply(1000)
    assert runs == ["triton", "dequantize"]
    gpu()
    monkeypatch.setattr(cuda_linear, "name_architecture", lambda device: "sm_89")
    apply(100)
    assert runs[2:] == ["triton"]


@pytest.fixture
def streamed(monkeypatch):
    """A table with the kernel with bulk copies as the fastest up to 8 rows."""
    config = {"row_tiles": 1, "tiles": 2, "warps_out": 1, "warps_in": 16, "stages": 6}
    shape = (SPEC.in_features, SPEC.out_features)
    stream = {(shape, 1): config, (shape, 8): config | {"tiles": 4, "warps_in": 8}}
    table = replace(load_table("sm_90"), stream=stream)
    for module in (cuda_linear, cuda_rows, cuda_stream):
        monkeypatch.setattr(
            module, "load_table", lambda name: table if name == "sm_90" else load_table(name)
        )


def test_few_rows_go_to_bulk_copies_where_those_are_faster(runs, streamed, gpu, monkeypatch):
    for rows in (1, 8, 9):
        apply(rows)
    apply(1, replace(SPEC, group_size=192))  # its groups do not begin where units do
    assert runs == ["stream", "stream", "triton", "cuda"]
    gpu(compiles="too old a compiler")
    apply(1)
    gpu()
    monkeypatch.setattr(cuda_linear, "name_architecture", lambda device: "sm_89")
    apply(1)
    assert runs[4:] == ["cuda", "cuda"]


def test_a_kernel_that_cannot_be_compiled_is_told_with_its_reason(runs, streamed, gpu):
    assert "without" not in CudaLinear().describe_row_tiers(SPEC)
    gpu(compiles="too old a compiler")
    told = CudaLinear().describe_row_tiers(SPEC)
    assert "without CUDA for many (too old a compiler)" in told
    assert "without CUDA with bulk copies (too old a compiler)" in told


def test_a_layer_with_larger_steps_gets_fewer_stages(measured):
    plain = cuda_rows.choose_config(*H100, 100, SPEC, torch.bfloat16)
    large = replace(SPEC, bits=8, symmetric=False, group_size=32)
    config = cuda_rows.choose_config(*H100, 100, large, torch.float32)
    assert plain.stages == 8
    assert 2 <= config.stages < 8
    assert config.count_shared_bytes(large, torch.float32) <= cuda_rows.SHARED_LIMIT


def test_without_triton_the_cuda_kernel_takes_all_rows_that_it_can(runs, monkeypatch):
    for module in (cuda_linear, triton_linear):
        monkeypatch.setattr(module, "find_triton_obstacle", lambda: "needs Triton")
    for rows in (16, 32, 1025):
        apply(rows)
    assert runs == ["cuda", "cuda", "dequantize"]


STORED = Operands(
    weight=(), qzeros=torch.empty(0), scales=torch.empty(0, dtype=torch.float16), g_idx=None
)


def watch_compiling(monkeypatch):
    """Record the configurations that kernels are compiled with, for an H100."""
    compiled = []
    monkeypatch.setattr(cuda_linear, "load_function", lambda config, *_: compiled.append(config))
    monkeypatch.setattr(cuda_linear, "name_architecture", lambda device: "sm_90")
    monkeypatch.setattr(TritonLinear, "prepare", lambda self, stored, spec: ())
    return compiled


def test_everything_that_a_captured_graph_may_launch_is_compiled_before(gpu, monkeypatch):
    gpu()
    compiled = watch_compiling(monkeypatch)
    for sizes, rows in (((4096, 6144), 8), ((4096, 4096), 16)):
        compiled.clear()
        spec = replace(SPEC, in_features=sizes[0], out_features=sizes[1])
        CudaLinear().prepare(STORED, spec)
        needed = {
            cuda_linear.choose_config("sm_90", m + 1, spec, torch.float16) for m in range(rows)
        }
        assert {config for config in compiled if isinstance(config, CudaConfig)} == needed


def test_what_copies_in_bulk_is_compiled_before_for_one_row_too(gpu, streamed, monkeypatch):
    gpu()
    compiled = watch_compiling(monkeypatch)
    CudaLinear().prepare(STORED, SPEC)
    needed = {cuda_stream.choose_config("sm_90", rows, SPEC, torch.float16) for rows in (1, 8)}
    assert len(needed) == 2
    assert needed <= set(compiled)


# ----------------------------------------------------------------------- tile sizes


def test_shipped_table_has_every_measured_shape_and_fits_the_gpu():
    table = load_table("sm_90")
    shapes = {shape for shape, _ in table.triton}
    assert len(shapes) == 8
    for shape in shapes:
        assert table.cuda_rows[shape] in (8, 16)
        for rows in (16, 32, 64, 128):
            config = TritonConfig(**table.triton[shape, rows])
            assert config.block_rows <= rows
            # Every program has a step at least.
            assert shape[0] // 64 >= config.splits
        for rows in (8, 16, 32, 64):
            config = CudaConfig(**table.cuda[shape, rows])
            assert 8 * config.row_tiles == rows
            size = config.count_shared_bytes(SPEC, torch.bfloat16)
            assert size <= cuda_linear.SHARED_LIMIT["sm_90"]


def test_unknown_architecture_has_no_table_but_a_rule():
    assert load_table("gfx942").triton == {}
    config = triton_configs.choose_config("xpu", 304, 4096, 4096, 1)
    assert config == TritonConfig(64, 16, 8, 4, 4)
    config = triton_configs.choose_config("gfx942", 304, 4096, 4096, 1)
    assert config == TritonConfig(64, 16, 8, 4, 2)
    assert cuda_linear.choose_config("sm_120", 1, SPEC, torch.float16).channels == 32


def test_rule_agrees_with_what_was_measured():
    # The rule keeps one tile per bucket; its splits must be those that were fastest for that tile.
    table = load_table("sm_90").triton
    compared = agreed = 0
    for (shape, rows), measured in table.items():
        rule = triton_configs.RULES[rows]
        if (measured["block_out"], measured["block_rows"]) != (rule.block_out, rule.block_rows):
            continue
        programs = -(-shape[1] // rule.block_out) * -(-rows // rule.block_rows)
        splits = choose_splits(programs, shape[0] // 64, rule.programs * H100[1])
        compared += 1
        agreed += splits == measured["splits"]
    assert compared >= 20
    assert agreed >= compared - 1


def test_short_layers_are_not_cut_into_nothing():
    assert choose_splits(4, 9, 500) == 2
    assert choose_splits(4, 3, 500) == 1
    assert choose_splits(1000, 448, 500) == 1
