"""Which device to compute on."""

from __future__ import annotations

import torch

from halfbyte.errors import ConfigError, first_line


def resolve_device(name: str | torch.device) -> torch.device:
    """Give a device that is there; tried, not looked up.

    Args:
        name: Such as "cpu", "cuda" or "cuda:1"; "auto": the first GPU, or the CPU.

    Returns:
        The device.

    Raises:
        ConfigError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is '{name}', which this machine or this torch does not have: "
            f"{first_line(error)}. Use auto or cpu."
        ) from error
    return device
