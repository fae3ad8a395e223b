"""Products on NVIDIA GPUs by CUDA C++ that is compiled when it is first needed.

Layout: :mod:`halfbyte.kernels.fragments`. Kernels: for few rows ``cuda/multiply.cu``, here; on
compute capability 9.0 :mod:`halfbyte.kernels.cuda_stream` for few and
:mod:`halfbyte.kernels.cuda_rows` for many. Where none was measured to be the fastest,
:mod:`halfbyte.kernels.triton_linear` takes over.
Arithmetic: code - zero is exact, its products with x are summed in fp32 and scaled in fp32 for each
32 inputs; one rounding of the result. Deterministic.
Needs compute capability 8.0 (bf16, ``cp.async``); from 9.0 on a launch loads its first weights
while the one before it still runs.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels import cuda_rows, cuda_stream
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import (
    SMALLEST_SPEC,
    define_layer_macros,
    fill_arguments,
    forget_shape,
)
from halfbyte.kernels.cuda_driver import (
    Function,
    find_obstacle_to,
    in_context,
    load_kernel,
)
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
    starts_early,
)
from halfbyte.kernels.gpu_table import load_table
from halfbyte.kernels.triton_linear import ROWS_LIMIT as TRITON_ROWS
from halfbyte.kernels.triton_linear import TritonLinear, find_triton_obstacle

ROWS_LIMIT = 64
"""Rows that a thread block can take."""
OLDEST = (8, 0)
SHARED_LIMIT = {"sm_80": 163 * 1024, "sm_89": 99 * 1024, "sm_90": 227 * 1024}
"""Bytes of shared memory that a thread block may have, by architecture.

Source:
    NVIDIA, "CUDA C++ Programming Guide", technical specifications per compute capability.
"""
SMALLEST_LIMIT = 99 * 1024
"""Of any architecture from 8.0 on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaConfig(FewConfig):
    """How a thread block of multiply.cu is made."""

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return 32 * self.warps_out * self.warps_in

    def count_shared_bytes(self, bits: int, scale_size: int, has_zeros: bool, halves: int) -> int:
        """Bytes of shared memory of a thread block; as in multiply.cu."""
        grid_bytes = halves * self.tiles * 16 * (scale_size + has_zeros)
        warp_bytes = self.tiles * 128 * bits + grid_bytes
        warps = self.warps_out * self.warps_in
        stage = warps * warp_bytes + self.warps_in * self.row_tiles * 1024
        return self.stages * stage + self.warps_in * self.partial_floats * 4 + 16


PREFERRED = (
    CudaConfig(row_tiles=1, tiles=2, warps_out=1, warps_in=16, stages=4),
    CudaConfig(row_tiles=2, tiles=4, warps_out=1, warps_in=4, stages=4),
    CudaConfig(row_tiles=4, tiles=2, warps_out=4, warps_in=4, stages=3),
    CudaConfig(row_tiles=8, tiles=1, warps_out=4, warps_in=4, stages=3),
)
"""By rows of x: those with the best geometric means over the measured shapes of an H100."""

BUCKETS = sorted(
    {
        *(8 * config.row_tiles for config in PREFERRED),
        *cuda_stream.BUCKETS,
        *cuda_rows.BUCKETS,
    }
)
"""Rows of x, up to so many, that are run alike, whichever kernel it is."""

USUAL_ROWS = 16
"""Up to so many rows it is faster than the Triton program in geometric mean over those shapes."""


def choose_rows(architecture: str, spec: LinearSpec) -> int:
    """Choose up to how many rows of x a layer runs on this kernel, where Triton may run the rest.

    Args:
        architecture: ``sm_90`` and the like.
        spec: The layer.

    Returns:
        As measured for the layer's shape, else USUAL_ROWS.
    """
    shape = (spec.in_features, spec.out_features)
    return load_table(architecture).cuda_rows.get(shape, USUAL_ROWS)


def choose_config(
    architecture: str, rows: int, spec: LinearSpec, scale_dtype: torch.dtype
) -> CudaConfig:
    """Choose a thread block for a number of rows of x.

    Args:
        architecture: ``sm_90`` and the like.
        rows: 1..ROWS_LIMIT.
        spec: The layer.
        scale_dtype: Of its scales.

    Returns:
        The fastest one measured for the layer's shape, else the preferred one; with fewer stages
        and then fewer warps where the memory of a thread block asks for that.
    """
    best = next(config for config in PREFERRED if rows <= 8 * config.row_tiles)
    shape = (spec.in_features, spec.out_features)
    measured = load_table(architecture).cuda.get((shape, 8 * best.row_tiles))
    if measured is not None:
        best = CudaConfig(**measured)
    limit = SHARED_LIMIT.get(architecture, SMALLEST_LIMIT)
    config = best
    while count_shared_bytes(config, spec, scale_dtype) > limit:
        if config.stages > 2:
            config = replace(config, stages=config.stages - 1)
        else:
            best = replace(best, warps_in=best.warps_in // 2)
            config = best
    return config


def define_macros(config: CudaConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> dict[str, int]:
    """Give the macros of multiply.cu for a layer."""
    made = {name.upper(): value for name, value in asdict(config).items()}
    return made | define_layer_macros(spec, scale_dtype)


def count_shared_bytes(config: CudaConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
    """Give the bytes of shared memory of a thread block for a layer."""
    halves = 2 if spec.group_size < 64 else 1
    return config.count_shared_bytes(spec.bits, scale_dtype.itemsize, not spec.symmetric, halves)


class CudaLinear(TritonLinear):
    """The CUDA kernels, and what TritonLinear does where they cannot or need not."""

    name = "cuda"

    def find_obstacle(self) -> str | None:
        """Say why nothing can be compiled here, or None."""
        return find_gpu_obstacle() or _find_obstacle()

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Say why the kernel cannot run such a layer, or None."""
        if spec.device_type != "cuda":
            return f"runs on cuda, not on {spec.device_type}"
        return find_layout_mismatch(spec)

    def describe_division(self, spec: LinearSpec) -> str:
        """Say up to how many rows what runs."""
        device = torch.device("cuda", torch.cuda.current_device())
        obstacle = find_triton_obstacle()
        last: dict[str, int] = {}
        most = max(cuda_rows.ROWS_LIMIT, TRITON_ROWS)
        for rows in range(1, most + 1):
            config = choose_tier(device, rows, spec, torch.float16)
            if isinstance(config, CudaConfig | StreamConfig):
                last["CUDA"] = rows
            elif config is not None:
                last["CUDA for many"] = rows
            elif obstacle is None and rows <= TRITON_ROWS:
                last["Triton"] = rows
        parts = [f"up to {rows} rows {name}" for name, rows in last.items()]
        parts.append("then dequantized first" + (f" ({obstacle})" if obstacle else ""))
        # Where one of them cannot be compiled, its rows went to the others without a word.
        parts += [f"without {name} ({why})" for name, why in find_lacking(device).items()]
        return ", ".join(parts)

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Repack the weight, and compile for every number of rows: a CUDA graph could not."""
        device, dtype = stored.scales.device, stored.scales.dtype
        for rows in BUCKETS:
            config = choose_tier(device, rows, spec, dtype)
            if isinstance(config, RowsConfig):
                cuda_rows.load_for(config, spec, dtype, device)
            elif isinstance(config, StreamConfig):
                cuda_stream.load_function(config, forget_shape(spec), dtype, device, True)
            elif config is not None:
                load_function(config, forget_shape(spec), dtype, device, True)
        return super().prepare(stored, spec)

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Give the weight [out, in] as numbers, by Triton where it can run."""
        if find_triton_obstacle() is None:
            return super().dequantize(operands, spec, dtype)
        return dequantize_in_torch(operands, spec, dtype)

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply by the packed codes, or by the dequantized weight where x has many rows."""
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
    """Choose the CUDA kernel for a number of rows, and how it is cut.

    Args:
        device: Of the layer.
        rows: Of x, 1 or more.
        spec: The layer.
        scale_dtype: Of its scales.

    Returns:
        Of a kernel for few rows or of that for many; None: Triton, or dequantized first.
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


def find_lacking(device: torch.device) -> dict[str, str]:
    """Give the kernels of compute capability 9.0 that a device should run and cannot, with why."""
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
        rows: [rows, in], contiguous, the inputs in the packed order.
        operands: As ``prepare`` left them.
        bias: [out] or None.
        spec: The layer.
        config: The thread block.
        early_start: Launch before what is ahead in the stream is over.

    Returns:
        [rows, out].
    """
    device = rows.device
    function, resident = load_function(
        config, forget_shape(spec), operands.scales.dtype, device, early_start
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
def load_function(
    config: CudaConfig,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    device: torch.device,
    early_start: bool,
) -> tuple[Function, int]:
    """Compile and load a kernel; also how many of its thread blocks fit on a multiprocessor."""
    return load_kernel(
        "multiply",
        define_macros(config, spec, scale_dtype),
        name_architecture(device),
        device,
        threads=config.threads,
        shared_bytes=count_shared_bytes(config, spec, scale_dtype),
        early_start=early_start and starts_early(device),
    )


@functools.cache
def _find_obstacle() -> str | None:
    device = torch.device("cuda", torch.cuda.current_device())
    if not is_nvidia(device):
        return "needs an NVIDIA GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        found, needed = (".".join(map(str, version)) for version in (capability, OLDEST))
        return f"needs compute capability {needed}; this GPU has {found}"
    # All the way: a driver older than torch's NVRTC refuses what that compiles.
    return find_obstacle_to(
        lambda: load_function(PREFERRED[0], SMALLEST_SPEC, torch.float16, device, True)
    )
