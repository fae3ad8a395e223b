"""Find the slower fallbacks that a run uses on a device, so that the report can list them."""

from __future__ import annotations

import torch

from halfbyte.machine.arithmetic import find_fp32_sum_obstacle
from halfbyte.quantize import columns, grid


def find_device_fallbacks(
    device: torch.device, dtype: torch.dtype, *, symmetric: bool
) -> list[str]:
    """List the parts of a run that use a slower fallback on a device, and why.

    Args:
        device: The device of the run; a CPU has no fallbacks.
        dtype: The model's compute dtype.
        symmetric: Whether grids are symmetric.

    Returns:
        One note per fallback; empty if there are none.
    """
    if device.type == "cpu":
        return []
    obstacles = {
        "Hessians are summed without tensor cores": (
            None if dtype == torch.float32 else find_fp32_sum_obstacle(device, dtype)
        ),
        "columns are rounded without a Triton kernel": columns.find_kernel_obstacle(device),
        "grids are searched without a Triton kernel": grid.find_kernel_obstacle(device, symmetric),
    }
    return [
        f"{fallback} on {device.type}, which is slower: {obstacle}"
        for fallback, obstacle in obstacles.items()
        if obstacle is not None
    ]
