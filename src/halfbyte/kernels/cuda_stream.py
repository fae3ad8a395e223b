"""The CUDA kernel with bulk copies (TMA) for few rows of x on compute capability 9.0.

Layout: :mod:`halfbyte.kernels.fragments`. Kernel: ``cuda/multiply_stream.cu``, which computes the
same as ``cuda/multiply.cu`` with fewer instructions.
Arithmetic: sums of code * x and of x are fp32, a scale is applied in fp32 per 64 inputs (32 with
groups of 32); one rounding of the result. Deterministic.
It is used only where the architecture's table lists it as the fastest.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import Arguments, fill_arguments
from halfbyte.kernels.cuda_config import SMALLEST_SPEC, load_function
from halfbyte.kernels.cuda_driver import Boxes, encode_boxes, find_obstacle_to, in_context
from halfbyte.kernels.cuda_few_rows import FewConfig, plan_work
from halfbyte.kernels.cuda_rows import limit_shared_bytes
from halfbyte.kernels.fragments import find_zeros
from halfbyte.kernels.gpu_device import (
    ARRIVALS,
    count_processors,
    find_arrivals,
)
from halfbyte.kernels.gpu_table import load_table

Encode = Callable[[Boxes], tuple[int, ...]]
BOX_LIMIT = 256
"""Maximum elements of a box per dimension.

Source:
    NVIDIA, "CUDA Driver API", cuTensorMapEncodeTiled.
"""
WHOLE_BLOCK_SLACK = 0.04
"""How much longer, as a fraction, a run may be if it then shares no partial sums."""
BUCKETS = (1, 8, 16)
"""Upper bounds of the ranges of rows that use the same configuration."""


class StreamArguments(ctypes.Structure):
    """The ctypes mirror of ``StreamArguments`` in multiply_stream.cu."""

    _fields_ = (
        ("codes_map", ctypes.c_ulonglong * 16),
        ("scales_map", ctypes.c_ulonglong * 16),
        ("zeros_map", ctypes.c_ulonglong * 16),
        ("x_map", ctypes.c_ulonglong * 16),
        ("a", Arguments),
        ("group_rows", ctypes.c_uint),
        ("padding", ctypes.c_ubyte * (124 - ctypes.sizeof(Arguments))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamConfig(FewConfig):
    """Tile sizes of a thread block of multiply_stream.cu."""

    source: ClassVar[str] = "multiply_stream"
    host_fields: ClassVar[tuple[str, ...]] = ("spare",)

    spare: int = 0
    """Thread blocks per multiprocessor that are left free for the next launch."""

    @property
    def threads(self) -> int:
        """Threads per block, including one warp that copies and one that adds partial sums."""
        return 32 * (self.warps_out * self.warps_in + 2)

    def count_shared_bytes(self, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
        """Count the shared memory of a thread block in bytes, as multiply_stream.cu does."""
        groups = self.warps_in * (2 if spec.group_size < 64 else 1)
        x = self.warps_in * self.row_tiles * 1024
        codes = self.warps_in * self.channels * 8 * spec.bits
        scales = _round_up(groups * self.channels * scale_dtype.itemsize, 128)
        zeros = 0 if spec.symmetric else groups * self.channels
        stage = _round_up(x + codes + scales + zeros, 1024)
        exchange = self.warps_in * self.partial_floats * 4
        return self.stages * stage + exchange + 16 * self.stages + 32 + 1024


def choose_config(
    architecture: str, rows: int, spec: LinearSpec, scale_dtype: torch.dtype
) -> StreamConfig | None:
    """Choose the tile sizes for a number of rows of x.

    Args:
        architecture: Such as ``sm_90``.
        rows: Rows of x.
        spec: The layer.
        scale_dtype: Dtype of the scales.

    Returns:
        The measured configuration for the layer's shape, with fewer stages if shared memory
        requires it; None: another kernel is faster, or this one cannot run the layer.
    """
    bucket = next((size for size in BUCKETS if rows <= size), None)
    shape = (spec.in_features, spec.out_features)
    found = load_table(architecture).stream.get((shape, bucket)) if bucket is not None else None
    if found is None:
        return None
    config = fit_memory(StreamConfig(**found), spec, scale_dtype)
    return None if find_mismatch(config, spec) else config


def find_mismatch(config: StreamConfig, spec: LinearSpec) -> str | None:
    """Return why the kernel cannot run a layer with these tile sizes; None if it can."""
    steps = spec.group_size // 64
    unit = config.warps_in
    if steps and spec.num_groups > 1 and unit % steps and steps % unit:
        return f"groups of {spec.group_size} inputs do not align with units of {unit * 64} inputs"
    if config.channels > BOX_LIMIT:
        return f"a box has at most {BOX_LIMIT} channels, not {config.channels}"
    if -(-spec.out_features // config.channels) > ARRIVALS:
        return f"{spec.out_features} channels need more than {ARRIVALS} blocks"
    return None


def fit_memory(config: StreamConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> StreamConfig:
    """Reduce stages, then warps, until the thread blocks fit on a multiprocessor."""
    return config.fit_memory(limit_shared_bytes(config.blocks), spec, scale_dtype)


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def count_group_rows(config: StreamConfig, spec: LinearSpec) -> int:
    """Count the rows of scales per unit of a layer that :func:`find_mismatch` accepts."""
    if spec.group_size < 64:
        return 2 * config.warps_in
    return max(config.warps_in // (spec.group_size // 64), 1)


def multiply(
    rows: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: StreamConfig,
    *,
    early_start: bool = True,
) -> Tensor:
    """Multiply by packed codes.

    Args:
        rows: [rows, in], contiguous, inputs in packed order.
        operands: As returned by ``prepare``.
        bias: [out] or None.
        spec: The layer.
        config: Tile sizes for which :func:`find_mismatch` returns None.
        early_start: Use programmatic dependent launch.

    Returns:
        [rows, out].
    """
    device = rows.device
    function, resident = load_function(
        config, spec, operands.scales.dtype, device, early_start=early_start
    )
    processors = count_processors(device) * max(resident - config.spare, 1)
    work = plan_work(config, spec, processors, WHOLE_BLOCK_SLACK)
    result = rows.new_empty(rows.shape[0], spec.out_features)
    partials = torch.empty(
        2 * work.runs * config.partial_floats, dtype=torch.float32, device=device
    )
    common = fill_arguments(rows, operands, bias, spec, result, partials, find_arrivals(device))
    with in_context(device):
        arguments = describe_tensors(common, rows, operands, spec, config, encode_boxes)
        function.launch(work.runs, arguments, torch.cuda.current_stream(device).cuda_stream)
    return result


def describe_tensors(
    common: Arguments,
    rows: Tensor,
    operands: Operands,
    spec: LinearSpec,
    config: StreamConfig,
    encode: Encode,
) -> StreamArguments:
    """Add TMA descriptors of the tensors to the common arguments.

    Args:
        common: The arguments that all kernels have.
        rows: [rows, in].
        operands: As returned by ``prepare``.
        spec: The layer.
        config: Tile sizes.
        encode: Encodes boxes as a descriptor.

    Returns:
        The kernel's parameter.
    """
    zeros = find_zeros(operands, spec)
    arguments = StreamArguments(a=common, group_rows=count_group_rows(config, spec))
    maps = _describe_weight(
        operands.weight[0].data_ptr(),
        operands.scales.data_ptr(),
        operands.scales.element_size(),
        None if zeros is None else zeros.data_ptr(),
        spec,
        config,
        encode,
    )
    ctypes.memmove(ctypes.addressof(arguments), maps, len(maps))
    count = rows.shape[0]
    arguments.x_map[:] = encode(
        Boxes(
            address=rows.data_ptr(),
            element_bytes=2,
            sizes=(64, count, spec.in_features // 64),
            strides=(2 * spec.in_features, 128),
            box=(64, count, config.warps_in),
            swizzled=True,
        )
    )
    return arguments


@functools.lru_cache(maxsize=4096)
def _describe_weight(
    codes: int,
    scales: int,
    scale_bytes: int,
    zeros: int | None,
    spec: LinearSpec,
    config: StreamConfig,
    encode: Encode,
) -> bytes:
    """Return the first fields of StreamArguments; cached, as a layer's tensors do not move."""
    tile_bytes, tiles = 128 * spec.bits, spec.out_features // 16
    maps = encode(
        Boxes(
            address=codes,
            element_bytes=8,
            sizes=(tile_bytes // 8, tiles, spec.in_features // 64),
            strides=(tile_bytes, tiles * tile_bytes),
            box=(tile_bytes // 8, config.channels // 16, config.warps_in),
        )
    )
    for address, size in ((scales, scale_bytes), (zeros, 1)):
        if address is not None:
            row = spec.out_features * size
            maps += encode(
                Boxes(
                    address=address,
                    element_bytes=size,
                    sizes=(spec.out_features, spec.num_groups, 1),
                    strides=(row, row * spec.num_groups),
                    box=(config.channels, count_group_rows(config, spec), 1),
                )
            )
    return struct.pack(f"{len(maps)}Q", *maps)


@functools.cache
def find_obstacle(device: torch.device) -> str | None:
    """Return why the kernel cannot be compiled for a device of its architecture; None if it can."""
    config = StreamConfig(row_tiles=1, tiles=1, warps_out=1, warps_in=2, stages=2)
    return find_obstacle_to(lambda: load_function(config, SMALLEST_SPEC, torch.float16, device))
