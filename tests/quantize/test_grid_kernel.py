"""The grid kernel in Triton's interpreter, compared with the plain search."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.helpers.interpreted import interpret
from tests.kernels.test_gpu_machine_code import count, disassemble

from halfbyte.quantize import grid as grids
from halfbyte.quantize.grid import Grid, search_grid, sum_groups

pytest.importorskip("triton")

NAME = "halfbyte.quantize.grid_kernel"


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel, re-imported while Triton interprets."""
    interpret(monkeypatch, NAME)
    module = sys.modules[NAME]
    from triton.runtime.interpreter import ReduceOps

    def reduce(self, inputs):
        """The interpreter calls functions that it does not know number by number."""
        if self.combine_fn is module._add:
            return self.sum(inputs[0])
        assert self.combine_fn is module._larger
        return self.min_max(inputs[0], val_reduce_op=np.nanmax, idx_reduce_op=None)

    monkeypatch.setattr(ReduceOps, "generic_reduce", reduce)


def losses(weight: torch.Tensor, curvature: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Weighted squared error of every group, in float64."""
    codes = (weight.double() / grid.column_scales()).round() + grid.column_zeros()
    codes = codes.clamp(0, 2**grid.bits - 1)
    error = weight.double() - (codes - grid.column_zeros()) * grid.column_scales().double()
    return sum_groups(error.square() * curvature, grid.g_idx, grid.scales.shape[1])


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_kernel_finds_the_same_grids_as_the_plain_search(
    bits: int, symmetric: bool, interpreted: None
) -> None:
    torch.manual_seed(bits)
    weight = torch.randn(18, 200) * torch.rand(18, 1)
    weight[3, :64] = 0
    weight[4] = weight[4].abs()
    weight[5] *= 1e6  # beyond the scales that fp16 holds
    curvature = torch.rand(200) + 0.01
    g_idx = torch.arange(200) // 64  # the last group is shorter
    g_idx = g_idx[torch.randperm(200)]
    expected = search_grid(weight, curvature, g_idx, bits=bits, symmetric=symmetric)
    grouped, weights = grids._group_columns(weight, curvature, g_idx)
    scales, zeros = grids._run_kernel(grouped, weights, bits, symmetric)
    found = Grid(bits=bits, scales=scales, zeros=zeros, g_idx=g_idx)
    assert torch.equal(scales, scales.half().float()), "scales are those that are stored"
    # Sums have another order, so of two equally good grids either may be chosen.
    assert float((scales == expected.scales).double().mean()) > 0.97
    worse = losses(weight, curvature, found) / losses(weight, curvature, expected).clamp(min=1e-30)
    assert float(worse.max()) < 1 + 1e-5


@pytest.mark.parametrize("symmetric", [True, False])
def test_kernel_is_checked_before_use(
    symmetric: bool, interpreted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    grids.find_kernel_obstacle.cache_clear()
    assert grids.find_kernel_obstacle(torch.device("cpu"), symmetric) is None
    real = grids._run_kernel

    def broken(*arguments):
        scales, zeros = real(*arguments)
        return scales * 1.1, zeros

    grids.find_kernel_obstacle.cache_clear()
    monkeypatch.setattr(grids, "_run_kernel", broken)
    assert "times that of the plain" in grids.find_kernel_obstacle(torch.device("cpu"), symmetric)
    grids.find_kernel_obstacle.cache_clear()


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("size", [128, grids.MAX_GROUP_SIZE])
def test_groups_stay_in_registers_when_compiled_for_gpus(
    architecture: str, symmetric: bool, size: int, tmp_path: Path
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from halfbyte.quantize.grid_kernel import grid_kernel

    constants = {
        "COARSE": 36 if symmetric else 17,
        "FINE": 8,
        "TOP": 15,
        "SYMMETRIC": symmetric,
        "SMALLEST": grids.SMALLEST_SCALE,
        "LARGEST": 65504.0,
        "ROWS": grids.PROGRAM_ROWS,
        "SIZE": size,
    }
    names = [parameter.name for parameter in grid_kernel.params]
    kinds = dict.fromkeys(names[:6], "*fp32") | dict.fromkeys(names[6:9], "i32")
    kinds |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=grid_kernel, signature=kinds, constexprs=constants)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    found = disassemble(compiled.asm["cubin"], tmp_path)
    assert count(found, "LDL", "STL") == 0, "registers are spilled"
    assert count(found, "FFMA", "FADD", "FMUL") > 0
