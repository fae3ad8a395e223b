"""Products of few rows of x on compute capability 9.0, by CUDA C++ that copies in bulk.

Layout: :mod:`halfbyte.kernels.fragments`. Kernel: ``cuda/multiply_stream.cu``, which does what
``cuda/multiply.cu`` does with fewer instructions.
Arithmetic: sums of code * x and of x are fp32, a scale is applied in fp32 to each 64 inputs (32
with groups of 32); one rounding of the result. Deterministic.
It runs where the architecture's table has it as the fastest, and nowhere else.
"""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import (
    SMALLEST_SPEC,
    Arguments,
    define_layer_macros,
    fill_arguments,
    forget_shape,
)
from halfbyte.kernels.cuda_driver import (
    Boxes,
    Function,
    encode_boxes,
    find_obstacle_to,
    in_context,
    load_kernel,
)
from halfbyte.kernels.cuda_few_rows import FewConfig, plan_work
from halfbyte.kernels.cuda_rows import find_room
from halfbyte.kernels.fragments import find_zeros
from halfbyte.kernels.gpu_device import (
    ARRIVALS,
    count_processors,
    find_arrivals,
    name_architecture,
)
from halfbyte.kernels.gpu_table import load_table

Encode = Callable[[Boxes], tuple[int, ...]]
BOX_LIMIT = 256
"""Elements of a box in each dimension.

Source:
    NVIDIA, "CUDA Driver API", cuTensorMapEncodeTiled.
"""
WHOLE_WORTH = 0.04
"""How much longer, as a share, a run may be that shares no sums with others."""
BUCKETS = (1, 8, 16)
"""Rows of x, up to so many, that are cut alike."""


class StreamArguments(ctypes.Structure):
    """The kernel's parameter; as ``StreamArguments`` in multiply_stream.cu."""

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
    """How a thread block of multiply_stream.cu is made."""

    spare: int = 0
    """Of the thread blocks that a multiprocessor has room for: those left to the next launch."""

    @property
    def threads(self) -> int:
        """Threads of a thread block; of two more warps than multiply."""
        return 32 * (self.warps_out * self.warps_in + 2)


def choose_config(
    architecture: str, rows: int, spec: LinearSpec, scale_dtype: torch.dtype
) -> StreamConfig | None:
    """Choose a thread block for a number of rows of x.

    Args:
        architecture: ``sm_90`` and the like.
        rows: Of x.
        spec: The layer.
        scale_dtype: Of its scales.

    Returns:
        As measured for the layer's shape, with fewer stages where the layer asks for more memory;
        None: run it on another kernel, which is faster, or can do it at all.
    """
    bucket = next((size for size in BUCKETS if rows <= size), None)
    shape = (spec.in_features, spec.out_features)
    found = load_table(architecture).stream.get((shape, bucket)) if bucket is not None else None
    if found is None:
        return None
    config = fit_memory(StreamConfig(**found), spec, scale_dtype)
    return None if find_mismatch(config, spec) else config


def find_mismatch(config: StreamConfig, spec: LinearSpec) -> str | None:
    """Say why the kernel cannot run a layer with such a thread block, or None."""
    steps = spec.group_size // 64
    unit = config.warps_in
    if steps and spec.num_groups > 1 and unit % steps and steps % unit:
        return f"groups of {spec.group_size} inputs do not begin where {unit * 64} inputs do"
    if config.channels > BOX_LIMIT:
        return f"a box has at most {BOX_LIMIT} channels, not {config.channels}"
    if -(-spec.out_features // config.channels) > ARRIVALS:
        return f"{spec.out_features} channels are more than {ARRIVALS} blocks"
    return None


def fit_memory(config: StreamConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> StreamConfig:
    """Take stages away, and then warps, until a multiprocessor has room for the thread blocks."""
    room = find_room(config.blocks)
    smaller = config
    while count_shared_bytes(smaller, spec, scale_dtype) > room:
        if smaller.stages > 2:
            smaller = replace(smaller, stages=smaller.stages - 1)
        else:
            config = replace(config, warps_in=config.warps_in // 2)
            smaller = config
    return smaller


def define_macros(
    config: StreamConfig, spec: LinearSpec, scale_dtype: torch.dtype
) -> dict[str, int]:
    """Give the macros of multiply_stream.cu for a layer."""
    made = {name.upper(): value for name, value in asdict(config).items() if name != "spare"}
    return made | define_layer_macros(spec, scale_dtype)


def count_shared_bytes(config: StreamConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
    """Give the bytes of shared memory of a thread block for a layer; as in multiply_stream.cu."""
    groups = config.warps_in * (2 if spec.group_size < 64 else 1)
    x = config.warps_in * config.row_tiles * 1024
    codes = config.warps_in * config.channels * 8 * spec.bits
    scales = _round_up(groups * config.channels * scale_dtype.itemsize, 128)
    zeros = 0 if spec.symmetric else groups * config.channels
    stage = _round_up(x + codes + scales + zeros, 1024)
    exchange = config.warps_in * config.partial_floats * 4
    return config.stages * stage + exchange + 16 * config.stages + 32 + 1024


def _round_up(size: int, to: int) -> int:
    return -(-size // to) * to


def count_group_rows(config: StreamConfig, spec: LinearSpec) -> int:
    """Count the rows of scales of a unit; :func:`find_mismatch` has nothing against the layer."""
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
        rows: [rows, in], contiguous, the inputs in the packed order.
        operands: As ``prepare`` left them.
        bias: [out] or None.
        spec: The layer.
        config: The thread block; :func:`find_mismatch` has nothing against it.
        early_start: Launch before what is ahead in the stream is over.

    Returns:
        [rows, out].
    """
    device = rows.device
    function, resident = load_function(
        config, forget_shape(spec), operands.scales.dtype, device, early_start
    )
    processors = count_processors(device) * max(resident - config.spare, 1)
    work = plan_work(config, spec, processors, WHOLE_WORTH)
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
    """Describe the tensors that a launch copies boxes of.

    Args:
        common: What all kernels are told.
        rows: [rows, in].
        operands: As ``prepare`` left them.
        spec: The layer.
        config: The thread block.
        encode: Turns boxes into what the copy engine reads.

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
    """The first fields of StreamArguments: a layer's tensors stay where they are."""
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
    """Say why the kernel cannot be compiled for a device of its architecture, or None."""
    config = StreamConfig(row_tiles=1, tiles=1, warps_out=1, warps_in=2, stages=2)
    return find_obstacle_to(
        lambda: load_function(config, SMALLEST_SPEC, torch.float16, device, True)
    )


@functools.cache
def load_function(
    config: StreamConfig,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    device: torch.device,
    early_start: bool,
) -> tuple[Function, int]:
    """Compile and load a kernel; also how many of its thread blocks fit on a multiprocessor."""
    return load_kernel(
        "multiply_stream",
        define_macros(config, spec, scale_dtype),
        name_architecture(device),
        device,
        threads=config.threads,
        shared_bytes=count_shared_bytes(config, spec, scale_dtype),
        early_start=early_start,
    )
