"""The CUDA kernels for NVIDIA GPUs, compiled from C++ at first use.

Layout: :mod:`halfbyte.kernels.fragments`. Kernels: ``cuda/multiply.cu`` for few rows of x, launched
here; on compute capability 9.0 also :mod:`halfbyte.kernels.cuda_stream` for few rows and
:mod:`halfbyte.kernels.cuda_rows` for many. Where none of them was measured to be the fastest,
:mod:`halfbyte.kernels.triton_linear` is used instead.
Arithmetic: code - zero is exact, its products with x are summed in fp32 and scaled in fp32 per 32
inputs; one rounding of the result. Deterministic.
Needs compute capability 8.0 (bf16, ``cp.async``). From 9.0 on a launch loads its first weights
while the previous one still runs (programmatic dependent launch).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import cuda_rows, cuda_stream
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import fill_arguments
from halfbyte.kernels.cuda_config import SMALLEST_SPEC, load_function
from halfbyte.kernels.cuda_driver import find_obstacle_to, in_context
from halfbyte.kernels.cuda_few_rows import FewConfig, plan_work
from halfbyte.kernels.cuda_rows import RowsConfig
from halfbyte.kernels.cuda_stream import StreamConfig
from halfbyte.kernels.fragments import (
    dequantize_in_torch,
    find_layout_mismatch,
    find_order,
)
from halfbyte.kernels.gpu_device import (
    count_processors,
    find_arrivals,
    find_gpu_obstacle,
    is_nvidia,
    name_architecture,
)
from halfbyte.kernels.gpu_table import load_table
from halfbyte.kernels.triton_linear import ROWS_LIMIT as TRITON_ROWS
from halfbyte.kernels.triton_linear import TritonLinear, find_triton_obstacle

ROWS_LIMIT = 64
"""Maximum rows of x per thread block."""
MIN_CAPABILITY = (8, 0)
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Maximum bytes of shared memory per thread block, by architecture.

Source:
    NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability.
"""
MIN_SHARED_LIMIT = 99 * 1024
"""Available on every architecture from 8.0 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaConfig(FewConfig):
    """Tile sizes of a thread block of multiply.cu."""

    source: ClassVar[str] = "multiply"
    host_fields: ClassVar[tuple[str, ...]] = ()

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 32 * self.warps_out * self.warps_in

    def count_shared_bytes(self, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
        """Count the shared memory of a thread block in bytes, as multiply.cu does."""
        halves = 2 if spec.group_size < 64 else 1
        grid_bytes = halves * self.tiles * 16 * (scale_dtype.itemsize + (not spec.symmetric))
        warp_bytes = self.tiles * 128 * spec.bits + grid_bytes
        warps = self.warps_out * self.warps_in
        stage = warps * warp_bytes + self.warps_in * self.row_tiles * 1024
        return self.stages * stage + self.warps_in * self.partial_floats * 4 + 16


PREFERRED = (
    CudaConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=4),
    CudaConfig(row_tiles=2, tiles=4, warps_out=1, warps_in=4, stages=4),
    CudaConfig(row_tiles=4, tiles=2, warps_out=4, warps_in=4, stages=3),
    CudaConfig(row_tiles=8, tiles=1, warps_out=4, warps_in=4, stages=3),
)
"""By rows of x: the best geometric means over the shapes measured on an H100."""

BUCKETS = sorted(
    {
        *(8 * config.row_tiles for config in PREFERRED),
        *cuda_stream.BUCKETS,
        *cuda_rows.BUCKETS,
    }
)
"""Upper bounds of the ranges of rows that use the same configuration, for all kernels."""

DEFAULT_ROWS = 16
"""Rows up to which this kernel beats the Triton kernel in geometric mean over those shapes."""


def choose_rows(architecture: str, spec: LinearSpec) -> int:
    """Choose up to how many rows of x a layer runs on this kernel rather than on Triton.

    Args:
        architecture: Such as ``sm_90``.
        spec: The layer.

    Returns:
        The measured number for the layer's shape, otherwise DEFAULT_ROWS.
    """
    shape = (spec.in_features, spec.out_features)
    return load_table(architecture).cuda_rows.get(shape, DEFAULT_ROWS)


def choose_config(
    architecture: str, rows: int, spec: LinearSpec, scale_dtype: torch.dtype
) -> CudaConfig:
    """Choose the tile sizes for a number of rows of x.

    Args:
        architecture: Such as ``sm_90``.
        rows: 1..ROWS_LIMIT.
        spec: The layer.
        scale_dtype: Dtype of the scales.

    Returns:
        The fastest measured configuration for the layer's shape, otherwise the preferred one; with
        fewer stages, then fewer warps, if shared memory requires it.
    """
    best = next(config for config in PREFERRED if rows <= 8 * config.row_tiles)
    shape = (spec.in_features, spec.out_features)
    measured = load_table(architecture).cuda.get((shape, 8 * best.row_tiles))
    if measured is not None:
        best = CudaConfig(**measured)
    limit = SHARED_LIMIT.get(architecture, MIN_SHARED_LIMIT)
    return best.fit_memory(limit, spec, scale_dtype)


class CudaLinear(TritonLinear):
    """The CUDA kernels, with TritonLinear as the fallback."""

    name = "cuda"

    def find_obstacle(self) -> str | None:
        """Return why no CUDA kernel can be compiled here; None if one can."""
        return find_gpu_obstacle() or _find_obstacle()

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the kernel cannot run a layer; None if it can."""
        if spec.device_type != "cuda":
            return f"runs on cuda, not on {spec.device_type}"
        return find_layout_mismatch(spec)

    def describe_row_tiers(self, spec: LinearSpec) -> str:
        """Describe which code runs up to how many rows."""
        device = torch.device("cuda", torch.cuda.current_device())
        obstacle = find_triton_obstacle()
        last: dict[str, int] = {}
        max_rows = max(cuda_rows.ROWS_LIMIT, TRITON_ROWS)
        for rows in range(1, max_rows + 1):
            config = choose_tier(device, rows, spec, torch.float16)
            if isinstance(config, CudaConfig | StreamConfig):
                last["CUDA"] = rows
            elif config is not None:
                last["CUDA for many"] = rows
            elif obstacle is None and rows <= TRITON_ROWS:
                last["Triton"] = rows
        parts = [f"up to {rows} rows {name}" for name, rows in last.items()]
        parts.append("then dequantized first" + (f" ({obstacle})" if obstacle else ""))
        # The rows of a kernel that cannot be compiled fall back to the others: report it here.
        parts += [f"without {name} ({why})" for name, why in find_missing_kernels(device).items()]
        return ", ".join(parts)

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Repack the weight, and compile all kernels now: CUDA graph capture cannot."""
        device, dtype = stored.scales.device, stored.scales.dtype
        for rows in BUCKETS:
            config = choose_tier(device, rows, spec, dtype)
            if config is not None:
                load_function(config, spec, dtype, device)
        return super().prepare(stored, spec)

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight [out, in], computed by Triton if available."""
        if find_triton_obstacle() is None:
            return super().dequantize(operands, spec, dtype)
        return dequantize_in_torch(operands, spec, dtype)

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply by the packed codes, or by the dequantized weight if x has many rows."""
        rows = x.reshape(-1, spec.in_features)
        count = rows.shape[0]
        config = None
        if count and rows.data_ptr() % 16 == 0:
            config = choose_tier(x.device, count, spec, operands.scales.dtype)
        if config is None:
            if find_triton_obstacle() is None:
                return super().apply(x, operands, bias, spec)
            return functional.linear(x, self.dequantize(operands, spec, x.dtype), bias)
        order = find_order(operands, spec)
        rows = rows.contiguous() if order is None else rows.index_select(1, order)
        if isinstance(config, RowsConfig):
            result = cuda_rows.multiply(rows, operands, bias, spec, config)
        elif isinstance(config, StreamConfig):
            result = cuda_stream.multiply(rows, operands, bias, spec, config)
        else:
            result = multiply(rows, operands, bias, spec, config)
        return result.view(*x.shape[:-1], spec.out_features)


@functools.lru_cache(maxsize=4096)
def choose_tier(
    device: torch.device, rows: int, spec: LinearSpec, scale_dtype: torch.dtype
) -> CudaConfig | RowsConfig | StreamConfig | None:
    """Choose the CUDA kernel and its tile sizes for a number of rows.

    Args:
        device: Device of the layer.
        rows: Rows of x, at least 1.
        spec: The layer.
        scale_dtype: Dtype of the scales.

    Returns:
        The configuration, whose type tells the kernel; None: use Triton or dequantize first.
    """
    architecture = name_architecture(device)
    stream = cuda_stream.choose_config(architecture, rows, spec, scale_dtype)
    if stream is not None and cuda_stream.find_obstacle(device) is None:
        return stream
    many = cuda_rows.choose_config(architecture, count_processors(device), rows, spec, scale_dtype)
    if many is not None and cuda_rows.find_obstacle(device) is None:
        return many
    few = ROWS_LIMIT if find_triton_obstacle() is not None else choose_rows(architecture, spec)
    return choose_config(architecture, rows, spec, scale_dtype) if rows <= few else None


def find_missing_kernels(device: torch.device) -> dict[str, str]:
    """Return the kernels for compute capability 9.0 that such a device cannot run, with reasons."""
    if name_architecture(device) != cuda_rows.ARCHITECTURE:
        return {}
    reasons = {"CUDA for many": cuda_rows.find_obstacle(device)}
    if load_table(cuda_rows.ARCHITECTURE).stream:
        reasons["CUDA with bulk copies"] = cuda_stream.find_obstacle(device)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def multiply(
    rows: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: CudaConfig,
    *,
    early_start: bool = True,
) -> Tensor:
    """Multiply by packed codes.

    Args:
        rows: [rows, in], contiguous, inputs in packed order.
        operands: As returned by ``prepare``.
        bias: [out] or None.
        spec: The layer.
        config: Tile sizes.
        early_start: Use programmatic dependent launch.

    Returns:
        [rows, out].
    """
    device = rows.device
    function, resident = load_function(
        config, spec, operands.scales.dtype, device, early_start=early_start
    )
    work = plan_work(config, spec, resident * count_processors(device))
    result = rows.new_empty(rows.shape[0], spec.out_features)
    partials = torch.empty(
        2 * work.runs * config.partial_floats, dtype=torch.float32, device=device
    )
    arrivals = find_arrivals(device)
    arguments = fill_arguments(rows, operands, bias, spec, result, partials, arrivals)
    with in_context(device):
        function.launch(work.runs, arguments, torch.cuda.current_stream(device).cuda_stream)
    return result


@functools.cache
def _find_obstacle() -> str | None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not is_nvidia(device):
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MIN_CAPABILITY))
        return f"needs compute capability {needed}; this GPU has {found}"
    # Load it too: a driver older than torch's NVRTC refuses the machine code.
    return find_obstacle_to(
        lambda: load_function(PREFERRED[0], SMALLEST_SPEC, torch.float16, device)
    )
