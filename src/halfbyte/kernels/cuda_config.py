"""Compile and load the CUDA kernels for a configuration and a kind of layer.

A configuration is a dataclass of tile sizes, which are macros of the kernel's source. Layers that
differ only in size share machine code.
"""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from typing import Any, ClassVar, Protocol

import torch

from halfbyte.kernels.contract import LinearSpec
from halfbyte.kernels.cuda_driver import Function, load_kernel
from halfbyte.kernels.gpu_device import name_architecture, starts_early

SCALE_KINDS = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2}
"""``SCALE_KIND`` in ``cuda/base.cu``."""

SMALLEST_SPEC = LinearSpec(
    bits=4,
    group_size=64,
    in_features=64,
    out_features=64,
    symmetric=True,
    act_order=False,
    zero_offset=0,
    dtype=torch.bfloat16,
    device_type="cuda",
)
"""The layer that is compiled to test whether the compiler works."""


class KernelConfig(Protocol):
    """A configuration: a frozen dataclass with the names of the macros in lower case."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    source: ClassVar[str]
    """Name of the kernel and, without ``.cu``, of its source."""
    architecture_suffix: ClassVar[str]
    """"a" for instructions that only one architecture has, otherwise empty."""
    host_fields: ClassVar[tuple[str, ...]]
    """Fields that the machine code does not depend on."""

    @property
    def threads(self) -> int:
        """Threads per block."""

    def count_shared_bytes(self, spec: LinearSpec, scale_dtype: torch.dtype) -> int:
        """Count the shared memory of a thread block in bytes, as the source does."""

    def __hash__(self) -> int:
        """Hash the fields, as a frozen dataclass does."""


def define_macros(
    config: KernelConfig, spec: LinearSpec, scale_dtype: torch.dtype
) -> dict[str, int]:
    """Return the macros that a kernel is compiled with for a configuration and a layer."""
    fields = {k.upper(): v for k, v in asdict(config).items() if k not in config.host_fields}
    return fields | {
        "BF16": int(spec.dtype == torch.bfloat16),
        "BITS": spec.bits,
        "SCALE_KIND": SCALE_KINDS[scale_dtype],
        "HAS_ZEROS": int(not spec.symmetric),
        "HALF_GROUPS": int(spec.group_size < 64),
    }


def load_function(
    config: KernelConfig,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    device: torch.device,
    *,
    early_start: bool = True,
) -> tuple[Function, int]:
    """Compile and load a kernel, unless it is loaded already.

    Args:
        config: The configuration.
        spec: The layer.
        scale_dtype: Dtype of the scales.
        device: Device to load it on.
        early_start: Use programmatic dependent launch, if the device supports it.

    Returns:
        The kernel, and how many of its thread blocks fit on a multiprocessor.
    """
    return _load(_strip_config(config), _strip_spec(spec), scale_dtype, device, early_start)


@functools.lru_cache(maxsize=1024)
def _strip_spec(spec: LinearSpec) -> LinearSpec:
    """Return the spec that stands for all layers with the same machine code."""
    group_size = 32 if spec.group_size < 64 else 64
    return replace(
        spec, in_features=64, out_features=64, group_size=group_size, act_order=False, zero_offset=0
    )


@functools.lru_cache(maxsize=256)
def _strip_config(config: KernelConfig) -> KernelConfig:
    """Return the configuration that stands for all with the same machine code."""
    return replace(config, **dict.fromkeys(config.host_fields, 0))


@functools.cache
def _load(
    config: KernelConfig,
    spec: LinearSpec,
    scale_dtype: torch.dtype,
    device: torch.device,
    early_start: bool,
) -> tuple[Function, int]:
    return load_kernel(
        config.source,
        define_macros(config, spec, scale_dtype),
        name_architecture(device) + config.architecture_suffix,
        device,
        threads=config.threads,
        shared_bytes=config.count_shared_bytes(spec, scale_dtype),
        early_start=early_start and starts_early(device),
    )
