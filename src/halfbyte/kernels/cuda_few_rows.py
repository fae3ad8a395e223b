"""What the two CUDA kernels for few rows of x have in common; as ``cuda/few_rows.cu``."""

from __future__ import annotations

from dataclasses import dataclass

from halfbyte.kernels.contract import LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class FewConfig:
    """How a thread block is made; the names in the kernels' sources, in lower case."""

    row_tiles: int
    tiles: int
    warps_out: int
    warps_in: int
    stages: int
    blocks: int = 1

    @property
    def channels(self) -> int:
        """Output channels of a thread block."""
        return 16 * self.tiles * self.warps_out

    @property
    def partial_floats(self) -> int:
        """Floats of the sums of a block of channels."""
        return self.channels * self.row_tiles * 8


@dataclass(frozen=True, slots=True)
class Work:
    """How many thread blocks share what."""

    channel_blocks: int
    runs: int


def plan_work(config: FewConfig, spec: LinearSpec, resident: int, slack: float = 0.0) -> Work:
    """Cut a layer into as many runs as thread blocks fit on the device, or fewer.

    Args:
        config: The thread block.
        spec: The layer.
        resident: Thread blocks that run at a time.
        slack: How much longer, as a share, runs may be that end where blocks of channels do.

    Returns:
        Blocks of channels, and runs.
    """
    channel_blocks = -(-spec.out_features // config.channels)
    chunks = -(-spec.in_features // (64 * config.warps_in))
    units = channel_blocks * chunks
    each = -(-units // resident)
    whole = -(-channel_blocks // resident)
    if chunks * whole <= (1 + slack) * each and channel_blocks % whole == 0:
        return Work(channel_blocks, channel_blocks // whole)
    # No more runs than give each a whole number of units where they can be equal.
    return Work(channel_blocks, min(-(-units // each), units))
