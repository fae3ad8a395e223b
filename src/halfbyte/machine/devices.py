"""Selects the device to compute on."""

from __future__ import annotations

import torch

from halfbyte.errors import ConfigError, first_line


def resolve_device(name: str | torch.device) -> torch.device:
    """Resolve a device name and check by a trial that the device works.

    Args:
        name: "cpu", "cuda", "cuda:1", ...; "auto": the first GPU, or the CPU.

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
            f"device is '{name}', which this machine or this build of torch does not have: "
            f"{first_line(error)}. Use auto or cpu."
        ) from error
    return device
