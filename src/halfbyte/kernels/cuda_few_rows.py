"""Configuration and work partition shared by the two CUDA kernels for few rows of x.

The device code is ``cuda/few_rows.cu``.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch

from halfbyte.kernels.contract import LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FewConfig:
    """Tile sizes of a thread block; named as the macros of the kernels, in lower case."""

    architecture_suffix: ClassVar[str] = ""

    row_tiles: int
    tiles: int
    warps_out: int
    warps_in: int
    stages: int
    blocks: int = 1

    @property
    def channels(self) -> int:
        """Output channels per thread block."""
        return 16 * self.tiles * self.warps_out

    @property
    def partial_floats(self) -> int:
        """Partial sums per block of channels."""
        return self.channels * self.row_tiles * 8

    @abstractmethod
    def count_shared_bytes(self, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
        """Count the shared memory of a thread block in bytes."""

    def fit_memory(self, limit: int, spec: LinearSpec, scale_dtype: torch.dtype) -> Self:
        """Reduce stages, then warps, until a thread block needs at most this much shared memory."""
        smaller = start = self
        while smaller.count_shared_bytes(spec, scale_dtype) > limit:
            if smaller.stages > 2:
                smaller = replace(smaller, stages=smaller.stages - 1)
            else:
                smaller = start = replace(start, warps_in=start.warps_in // 2)
        return smaller


@dataclass(frozen=True, slots=True)
class Work:
    """The partition of a layer among thread blocks."""

    channel_blocks: int
    runs: int
    """Contiguous ranges of work units, one per thread block (Stream-K)."""


def plan_work(config: FewConfig, spec: LinearSpec, resident: int, slack: float = 0.0) -> Work:
    """Split a layer into at most as many runs as thread blocks fit on the device.

    Args:
        config: Tile sizes of a thread block.
        spec: The layer.
        resident: Thread blocks that run concurrently.
        slack: How much longer runs may be, as a fraction, if they then end at block boundaries
            and need no partial sums.

    Returns:
        The number of channel blocks and of runs.
    """
    channel_blocks = -(-spec.out_features // config.channels)
    chunks = -(-spec.in_features // (64 * config.warps_in))
    units = channel_blocks * chunks
    each = -(-units // resident)
    whole = -(-channel_blocks // resident)
    if chunks * whole <= (1 + slack) * each and channel_blocks % whole == 0:
        return Work(channel_blocks, channel_blocks // whole)
    # Use fewer runs where they can then all have the same number of units.
    return Work(channel_blocks, min(-(-units // each), units))
