"""Package versions and machine facts, for reports."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

from halfbyte.machine.limits import usable_processors
from halfbyte.units import format_bytes
from halfbyte.version import __version__

PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "numpy", "huggingface_hub")
"""Packages that can change results."""


def installed_versions() -> dict[str, str]:
    """Return the versions of halfbyte, Python and the packages that can change results."""
    versions = {"halfbyte": __version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def machine_facts() -> dict[str, str]:
    """Return system, processor, usable cores, torch threads, memory and GPU."""
    # Imported here, so that installed_versions does not need torch.
    import torch

    facts = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor_name(),
        "cores": str(usable_processors()),
        "threads": str(torch.get_num_threads()),
        "memory": format_bytes(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
