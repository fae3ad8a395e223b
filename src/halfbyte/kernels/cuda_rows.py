"""Products of many rows of x on compute capability 9.0, by CUDA C++.

Layout: :mod:`halfbyte.kernels.fragments`. Kernel: ``cuda/multiply_rows.cu``, whose products are the
warpgroup's own (``wgmma``, sm_90a).
Arithmetic: code - zero is exact, its product with the scale is rounded once to the type of x, sums
are fp32; one rounding of the result. Deterministic.
"""

from __future__ import annotations

import ctypes
import functools
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
from halfbyte.kernels.gpu_device import (
    ARRIVALS,
    count_processors,
    find_arrivals,
    name_architecture,
)
from halfbyte.kernels.gpu_table import load_table

ARCHITECTURE = "sm_90"
"""The only one that has these instructions."""
SHARED_LIMIT = 227 * 1024
"""Bytes of shared memory that a thread block may have."""
ROWS_LIMIT = 1024
"""From more rows on the weight is dequantized first."""
FEWEST_STEPS = 4
"""Steps of 64 inputs of a run that shares its tile."""
FULL_ENOUGH = 0.9
"""Of the processors' time: what whole tiles must use, or runs end within tiles."""
BUCKETS = (8, 16, 32, 64, 128, 256, 512, ROWS_LIMIT)
"""Rows of x, up to so many, that are cut alike."""


class RowsArguments(ctypes.Structure):
    """The kernel's parameter; as ``RowsArguments`` in multiply_rows.cu."""

    _fields_ = (
        ("x_map", ctypes.c_ulonglong * 16),
        ("a", Arguments),
        ("padding", ctypes.c_ubyte * (128 - ctypes.sizeof(Arguments))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """How a product is cut; the names in multiply_rows.cu, in lower case."""

    rows: int
    tiles: int
    warpgroups: int
    stages: int
    splits: int = 0
    """Runs of a tile; 0: as many of all tiles as thread blocks fit on the device."""
    blocks: int = 1
    cluster: int = 1
    """Thread blocks side by side that share their rows of x."""
    turns: int = 0
    """1: two warpgroups begin their products in turns."""
    joined: int = 1
    """Thread blocks that share a tile in a cluster; if more than 1, ``splits`` is the same."""

    @property
    def channels(self) -> int:
        """Output channels of a tile."""
        return 64 * self.tiles * self.warpgroups

    @property
    def threads(self) -> int:
        """Threads of a thread block."""
        return 128 * (self.warpgroups + 1)

    @property
    def partial_floats(self) -> int:
        """Floats of the sums of a tile, of all thread blocks of a cluster."""
        return self.channels * self.rows * self.cluster

    def count_tiles(self, spec: LinearSpec, rows: int) -> int:
        """Tiles of a product, all of a cluster's as one."""
        return -(-spec.out_features // (self.channels * self.cluster)) * -(-rows // self.rows)


_WIDE = RowsConfig(rows=256, tiles=1, warpgroups=2, stages=5)
USUAL = {
    64: RowsConfig(rows=64, tiles=2, warpgroups=2, stages=13),
    128: RowsConfig(rows=128, tiles=2, warpgroups=2, stages=8),
    256: _WIDE,
    512: _WIDE,
    ROWS_LIMIT: _WIDE,
}
"""By bucket: those with the best geometric means over the measured shapes of an H100."""


def choose_config(
    architecture: str,
    num_processors: int,
    rows: int,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
) -> RowsConfig | None:
    """Choose how to cut a product.

    Args:
        architecture: ``sm_90`` and the like.
        num_processors: Multiprocessors of the device.
        rows: Of x.
        spec: The layer.
        scale_dtype: Of its scales.

    Returns:
        As measured for the layer's shape, else as usual, with fewer stages where the layer asks
        for more memory; None: run it on another tier, which can do it faster, or at all.
    """
    bucket = next((size for size in BUCKETS if rows <= size), None)
    if architecture != ARCHITECTURE or bucket is None:
        return None
    measured = load_table(architecture).many_rows
    key = (spec.in_features, spec.out_features), bucket
    if key in measured:
        found = measured[key]
        config = None if found is None else RowsConfig(**found)
    else:
        config = USUAL.get(bucket)
        if config is not None:
            tiles = config.count_tiles(spec, bucket)
            splits = choose_splits(tiles, spec.in_features // 64, num_processors)
            config = replace(config, splits=splits)
    if config is None or find_mismatch(config, spec, rows) is not None:
        return None
    return fit_memory(config, spec, scale_dtype)


def choose_splits(tiles: int, steps: int, num_processors: int) -> int:
    """Choose how many runs share a tile.

    Args:
        tiles: Of the product.
        steps: Of 64 inputs of a tile.
        num_processors: Of which each takes one run at a time.

    Returns:
        As many as there are processors for; with more tiles than processors 1, or 0 where the last
        round would leave too many of them idle.
    """
    if tiles <= num_processors:
        return max(min(num_processors // tiles, steps // FEWEST_STEPS), 1)
    rounds = -(-tiles // num_processors)
    return 1 if tiles >= FULL_ENOUGH * rounds * num_processors else 0


def fit_memory(config: RowsConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> RowsConfig:
    """Take stages away until a multiprocessor has room for the thread blocks."""
    room = find_room(config.blocks)
    while count_shared_bytes(config, spec, scale_dtype) > room:
        config = replace(config, stages=config.stages - 1)
    return config


def find_room(blocks: int) -> int:
    """Give the bytes of shared memory that each of so many thread blocks may ask for."""
    # A thread block costs 1 KiB more than it asks for; the limit leaves room for one.
    return (SHARED_LIMIT + 1024) // blocks - 1024


def define_macros(config: RowsConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> dict[str, int]:
    """Give the macros of multiply_rows.cu for a layer."""
    made = {name.upper(): value for name, value in asdict(config).items() if name != "splits"}
    return made | define_layer_macros(spec, scale_dtype)


def count_shared_bytes(config: RowsConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
    """Give the bytes of shared memory of a thread block for a layer; as in multiply_rows.cu."""
    halves = 2 if spec.group_size < 64 else 1
    grid = halves * config.channels * (scale_dtype.itemsize + (not spec.symmetric))
    stage = config.rows * 128 + config.channels * 8 * spec.bits + grid
    tail = config.warpgroups * 4 * 512 + 16 * config.stages + 16
    return config.stages * -(-stage // 1024) * 1024 + tail + 1024


def count_runs(config: RowsConfig, spec: LinearSpec, rows: int, resident: int) -> int:
    """Count the runs of a product, each a thread block or a cluster.

    Args:
        config: How it is cut.
        spec: The layer.
        rows: Of x.
        resident: Thread blocks that run at a time.

    Returns:
        At most one for each step of 64 inputs of each tile.
    """
    tiles = config.count_tiles(spec, rows)
    runs = tiles * config.splits if config.splits else resident // config.cluster
    return min(runs, tiles * (spec.in_features // 64))


def find_mismatch(config: RowsConfig, spec: LinearSpec, rows: int) -> str | None:
    """Say why a product is too large for the kernel's counters, or None."""
    tiles = config.count_tiles(spec, rows)
    if tiles * config.warpgroups * config.cluster > ARRIVALS:
        return (
            f"{tiles} tiles of {config.warpgroups * config.cluster} parts are more than {ARRIVALS}"
        )
    runs = max(tiles * max(config.splits, 1), 1024)
    if (tiles * (spec.in_features // 64) + 1) * runs >= 2**32:
        return f"{tiles} tiles of {spec.in_features} inputs are more than 32 bits count"
    return None


def multiply(
    rows: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: RowsConfig,
    *,
    early_start: bool = True,
) -> Tensor:
    """Multiply by packed codes.

    Args:
        rows: [rows, in], contiguous, the inputs in the packed order.
        operands: As ``prepare`` left them.
        bias: [out] or None.
        spec: The layer.
        config: How to cut it; :func:`find_mismatch` has nothing against it.
        early_start: Launch before what is ahead in the stream is over.

    Returns:
        [rows, out].
    """
    device, count = rows.device, rows.shape[0]
    function, resident = load_function(
        _made_alike(config), forget_shape(spec), operands.scales.dtype, device, early_start
    )
    runs = count_runs(config, spec, count, resident * count_processors(device))
    result = rows.new_empty(count, spec.out_features)
    partials = None
    if config.splits != 1 and config.joined == 1:
        size = 2 * runs * config.partial_floats
        partials = torch.empty(size, dtype=torch.float32, device=device)
    common = fill_arguments(rows, operands, bias, spec, result, partials, find_arrivals(device))
    arguments = RowsArguments(a=common)
    with in_context(device):
        arguments.x_map[:] = encode_boxes(
            Boxes(
                address=rows.data_ptr(),
                element_bytes=2,
                sizes=(spec.in_features, count),
                strides=(2 * spec.in_features,),
                box=(64, config.rows // config.cluster),
                swizzled=True,
            )
        )
        stream = torch.cuda.current_stream(device).cuda_stream
        function.launch(runs * config.cluster, arguments, stream)
    return result


def load_for(
    config: RowsConfig, spec: LinearSpec, scale_dtype: torch.dtype, device: torch.device
) -> None:
    """Compile and load what a layer's products need, before a CUDA graph is captured."""
    load_function(_made_alike(config), forget_shape(spec), scale_dtype, device, True)


@functools.cache
def find_obstacle(device: torch.device) -> str | None:
    """Say why the kernel cannot be compiled for a device of its architecture, or None."""
    config = RowsConfig(rows=64, tiles=1, warpgroups=2, stages=4)
    return find_obstacle_to(lambda: load_for(config, SMALLEST_SPEC, torch.float16, device))


@functools.lru_cache(maxsize=256)
def _made_alike(config: RowsConfig) -> RowsConfig:
    """The config that stands for all with the same machine code."""
    return RowsConfig(**asdict(config) | {"splits": 0})


@functools.cache
def load_function(
    config: RowsConfig,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    device: torch.device,
    early_start: bool,
) -> tuple[Function, int]:
    """Compile and load a kernel; also how many of its thread blocks fit on a multiprocessor."""
    return load_kernel(
        "multiply_rows",
        define_macros(config, spec, scale_dtype),
        # "a": instructions of this architecture and of no other.
        f"{name_architecture(device)}a",
        device,
        threads=config.threads,
        shared_bytes=count_shared_bytes(config, spec, scale_dtype),
        early_start=early_start,
    )
