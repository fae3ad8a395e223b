"""The CUDA kernel for many rows of x on compute capability 9.0.

Layout: :mod:`halfbyte.kernels.fragments`. Kernel: ``cuda/multiply_rows.cu``, which uses
warpgroup matrix instructions (``wgmma``, sm_90a).
Arithmetic: code - zero is exact, its product with the scale is rounded once to the type of x, sums
are fp32; one rounding of the result. Deterministic.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import Arguments, fill_arguments
from halfbyte.kernels.cuda_config import SMALLEST_SPEC, load_function
from halfbyte.kernels.cuda_driver import Boxes, encode_boxes, find_obstacle_to, in_context
from halfbyte.kernels.gpu_device import (
    ARRIVALS,
    count_processors,
    find_arrivals,
)
from halfbyte.kernels.gpu_table import load_table

ARCHITECTURE = "sm_90"
"""The only architecture with these instructions."""
SHARED_LIMIT = 227 * 1024
"""Maximum bytes of shared memory per thread block."""
ROWS_LIMIT = 1024
"""Above this number of rows the weight is dequantized first."""
MIN_STEPS = 4
"""Minimum steps of 64 inputs per run if runs share a tile."""
MIN_UTILIZATION = 0.9
"""Minimum fraction of processor time that whole tiles must use; otherwise runs end within tiles."""
BUCKETS = (8, 16, 32, 64, 128, 256, 512, ROWS_LIMIT)
"""Upper bounds of the ranges of rows that use the same configuration."""


class RowsArguments(ctypes.Structure):
    """The ctypes mirror of ``RowsArguments`` in multiply_rows.cu."""

    _fields_ = (
        ("x_map", ctypes.c_ulonglong * 16),
        ("a", Arguments),
        ("padding", ctypes.c_ubyte * (128 - ctypes.sizeof(Arguments))),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RowsConfig:
    """Tile sizes of a product; named as the macros of multiply_rows.cu, in lower case."""

    source: ClassVar[str] = "multiply_rows"
    architecture_suffix: ClassVar[str] = "a"
    host_fields: ClassVar[tuple[str, ...]] = ("splits",)

    rows: int
    tiles: int
    warpgroups: int
    stages: int
    splits: int = 0
    """Runs per tile (split-K); 0: one run per resident thread block over all tiles (Stream-K)."""
    blocks: int = 1
    cluster: int = 1
    """Thread blocks of a cluster, which share their rows of x."""
    turns: int = 0
    """1: two warpgroups start their products in turns."""
    joined: int = 1
    """Thread blocks of a cluster that share a tile; if more than 1, equal to ``splits``."""

    @property
    def channels(self) -> int:
        """Output channels per tile."""
        return 64 * self.tiles * self.warpgroups

    @property
    def threads(self) -> int:
        """Threads per block."""
        return 128 * (self.warpgroups + 1)

    @property
    def partial_floats(self) -> int:
        """Partial sums of a tile, for all thread blocks of a cluster."""
        return self.channels * self.rows * self.cluster

    def count_shared_bytes(self, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
        """Count the shared memory of a thread block in bytes, as multiply_rows.cu does."""
        halves = 2 if spec.group_size < 64 else 1
        grid = halves * self.channels * (scale_dtype.itemsize + (not spec.symmetric))
        stage = self.rows * 128 + self.channels * 8 * spec.bits + grid
        tail = self.warpgroups * 4 * 512 + 16 * self.stages + 16
        return self.stages * -(-stage // 1024) * 1024 + tail + 1024

    def count_tiles(self, spec: LinearSpec, rows: int) -> int:
        """Count the tiles of a product; those of a cluster count as one."""
        return -(-spec.out_features // (self.channels * self.cluster)) * -(-rows // self.rows)


_WIDE = RowsConfig(rows=256, tiles=1, warpgroups=2, stages=5)
DEFAULT_CONFIGS = {
    64: RowsConfig(rows=64, tiles=2, warpgroups=2, stages=13),
    128: RowsConfig(rows=128, tiles=2, warpgroups=2, stages=8),
    256: _WIDE,
    512: _WIDE,
    ROWS_LIMIT: _WIDE,
}
"""By bucket: the best geometric means over the shapes measured on an H100."""


def choose_config(
    architecture: str,
    num_processors: int,
    rows: int,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
) -> RowsConfig | None:
    """Choose the tile sizes of a product.

    Args:
        architecture: Such as ``sm_90``.
        num_processors: Multiprocessors of the device.
        rows: Rows of x.
        spec: The layer.
        scale_dtype: Dtype of the scales.

    Returns:
        The measured configuration for the layer's shape, otherwise the default, with fewer stages
        if shared memory requires it; None: another kernel is faster, or this one cannot run it.
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
        config = DEFAULT_CONFIGS.get(bucket)
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
        tiles: Tiles of the product.
        steps: Steps of 64 inputs per tile.
        num_processors: Multiprocessors, each of which executes one run at a time.

    Returns:
        As many as keep all processors busy; with more tiles than processors 1, or 0 if the last
        wave would leave too many of them idle.
    """
    if tiles <= num_processors:
        return max(min(num_processors // tiles, steps // MIN_STEPS), 1)
    waves = -(-tiles // num_processors)
    return 1 if tiles >= MIN_UTILIZATION * waves * num_processors else 0


def fit_memory(config: RowsConfig, spec: LinearSpec, scale_dtype: torch.dtype) -> RowsConfig:
    """Reduce the stages until the thread blocks fit on a multiprocessor."""
    limit = limit_shared_bytes(config.blocks)
    while config.count_shared_bytes(spec, scale_dtype) > limit:
        config = replace(config, stages=config.stages - 1)
    return config


def limit_shared_bytes(blocks: int) -> int:
    """Return the maximum shared memory per block for a number of blocks per multiprocessor."""
    # Each thread block occupies 1 KiB more than it requests; the limit accounts for one block.
    return (SHARED_LIMIT + 1024) // blocks - 1024


def count_runs(config: RowsConfig, spec: LinearSpec, rows: int, resident: int) -> int:
    """Count the runs of a product, each executed by one thread block or cluster.

    Args:
        config: Tile sizes.
        spec: The layer.
        rows: Rows of x.
        resident: Thread blocks that run concurrently.

    Returns:
        The count; at most one run per step of 64 inputs of each tile.
    """
    tiles = config.count_tiles(spec, rows)
    runs = tiles * config.splits if config.splits else resident // config.cluster
    return min(runs, tiles * (spec.in_features // 64))


def find_mismatch(config: RowsConfig, spec: LinearSpec, rows: int) -> str | None:
    """Return why a product is too large for the kernel's counters; None if it is not."""
    tiles = config.count_tiles(spec, rows)
    if tiles * config.warpgroups * config.cluster > ARRIVALS:
        return (
            f"{tiles} tiles x {config.warpgroups * config.cluster} parts exceed {ARRIVALS} counters"
        )
    runs = max(tiles * max(config.splits, 1), 1024)
    if (tiles * (spec.in_features // 64) + 1) * runs >= 2**32:
        return f"{tiles} tiles of {spec.in_features} inputs overflow a 32-bit counter"
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
        rows: [rows, in], contiguous, inputs in packed order.
        operands: As returned by ``prepare``.
        bias: [out] or None.
        spec: The layer.
        config: Tile sizes for which :func:`find_mismatch` returns None.
        early_start: Use programmatic dependent launch.

    Returns:
        [rows, out].
    """
    device, count = rows.device, rows.shape[0]
    function, resident = load_function(
        config, spec, operands.scales.dtype, device, early_start=early_start
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


@functools.cache
def find_obstacle(device: torch.device) -> str | None:
    """Return why the kernel cannot be compiled for a device of its architecture; None if it can."""
    config = RowsConfig(rows=64, tiles=1, warpgroups=2, stages=4)
    return find_obstacle_to(lambda: load_function(config, SMALLEST_SPEC, torch.float16, device))
