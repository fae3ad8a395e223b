"""What a device does not do the fast way, for the report: a slower way is taken, never silently."""

from __future__ import annotations

import torch

from halfbyte.machine.arithmetic import find_fp32_sum_obstacle
from halfbyte.quantize import columns, grid


def find_slow_ways(device: torch.device, dtype: torch.dtype, *, symmetric: bool) -> list[str]:
    """Say which parts of a run take a slower way on a device, and why.

    Args:
        device: Where a run computes; a CPU has no other ways than its own.
        dtype: In which the model computes.
        symmetric: The kind of grids.

    Returns:
        A note for each part; none where all is as fast as it can be.
    """
    if device.type == "cpu":
        return []
    obstacles = {
        "Hessians are summed without tensor cores": (
            None if dtype == torch.float32 else find_fp32_sum_obstacle(device, dtype)
        ),
        "columns are rounded by single operations": columns.find_program_obstacle(device),
        "grids are searched by single operations": grid.find_program_obstacle(device, symmetric),
    }
    return [
        f"{part} on {device.type}, which is slower: {obstacle}"
        for part, obstacle in obstacles.items()
        if obstacle is not None
    ]
