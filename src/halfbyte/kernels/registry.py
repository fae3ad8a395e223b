"""The kernels in order of preference, and the selection of one for a layer.

To add a kernel, implement :class:`~halfbyte.kernels.contract.Kernel` in a module and add an entry
to KERNELS. The module is imported when the kernel is first considered.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from halfbyte.environment import KERNEL, read_variable
from halfbyte.errors import KernelUnavailable
from halfbyte.kernels.contract import Kernel, LinearSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelEntry:
    """A registered kernel, which is imported lazily."""

    name: str
    module: str
    class_name: str
    summary: str
    """Shown by ``halfbyte doctor``."""


KERNELS = (
    KernelEntry(
        name="cuda",
        module="halfbyte.kernels.cuda_linear",
        class_name="CudaLinear",
        summary="CUDA C++ compiled at first use by torch's NVRTC (NVIDIA GPUs)",
    ),
    KernelEntry(
        name="triton",
        module="halfbyte.kernels.triton_linear",
        class_name="TritonLinear",
        summary="Triton kernels (every GPU that Triton supports)",
    ),
    KernelEntry(
        name="cpu_native",
        module="halfbyte.kernels.cpu_native",
        class_name="CpuNative",
        summary="halfbyte's compiled kernel on a CPU",
    ),
    KernelEntry(
        name="torch_int4",
        module="halfbyte.kernels.torch_int4",
        class_name="TorchInt4",
        summary="torch's int4 matrix multiplication on a CPU (bfloat16)",
    ),
    KernelEntry(
        name="torch_reference",
        module="halfbyte.kernels.torch_reference",
        class_name="TorchReference",
        summary="dequantize and multiply in plain torch; runs every layer",
    ),
)
"""Fastest first: the first kernel that can run a layer is used."""

ON_REQUEST = (
    KernelEntry(
        name="cpu_int8",
        module="halfbyte.kernels.cpu_int8",
        class_name="CpuInt8",
        summary="cpu_native with activations rounded to 8 bits; only on request",
    ),
)
"""Kernels that are only used when requested by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """The kernel selected for a layer, with the reasons."""

    kernel: Kernel
    reason: str
    rejected: Mapping[str, str]
    """Reason by name, of the kernels preferred to this one."""


@functools.cache
def load_kernel(entry: KernelEntry) -> Kernel:
    """Import a kernel's module and instantiate the kernel, once per process."""
    return cast(Kernel, getattr(importlib.import_module(entry.module), entry.class_name)())


def find_kernel(name: str, kernels: Sequence[KernelEntry] = (*KERNELS, *ON_REQUEST)) -> Kernel:
    """Return a kernel by name.

    Args:
        name: Name in KERNELS or ON_REQUEST.
        kernels: Entries to search.

    Returns:
        The kernel, which may be unable to run on this machine.

    Raises:
        KernelUnavailable: There is no kernel of that name; lists the available ones.
    """
    for entry in kernels:
        if entry.name == name:
            return load_kernel(entry)
    close = difflib.get_close_matches(name, [entry.name for entry in kernels], n=1)
    hint = f" Did you mean '{close[0]}'?" if close else ""
    known = ", ".join(entry.name for entry in kernels)
    raise KernelUnavailable(f"There is no kernel '{name}'.{hint} Available: {known}.")


def find_rejection(kernel: Kernel, spec: LinearSpec, *, stored_layout: bool = False) -> str | None:
    """Return why a kernel cannot run a layer on this machine; None if it can."""
    reason = kernel.find_obstacle() or kernel.find_mismatch(spec)
    if reason is None and stored_layout and kernel.repacks:
        return "repacks the weights, but those of this layer are offloaded"
    return reason


def select(
    spec: LinearSpec,
    *,
    stored_layout: bool = False,
    forced: str | None = None,
    kernels: Sequence[KernelEntry] = KERNELS,
) -> Selection:
    """Select the kernel for a layer.

    Args:
        spec: The layer.
        stored_layout: Allow only kernels that read the weights as stored (for offloaded layers).
        forced: Name of a kernel; None: the value of ``HALFBYTE_KERNEL``, if set.
        kernels: Candidates in order of preference.

    Returns:
        The selected kernel, with the reasons.

    Raises:
        KernelUnavailable: No kernel can run the layer, or the forced one is unknown or cannot run
            it; gives the reason for each kernel.
    """
    source = "forced by the caller"
    if forced is None:
        forced, source = read_variable(KERNEL), f"forced by {KERNEL.name}"
    if forced is not None:
        kernel = find_kernel(forced, (*kernels, *ON_REQUEST))
        reason = find_rejection(kernel, spec, stored_layout=stored_layout)
        if reason is not None:
            others = {
                k.name: find_rejection(k, spec, stored_layout=stored_layout) for k in _load(kernels)
            }
            raise KernelUnavailable(_explain(f"{source}: {forced}", spec, others))
        return Selection(kernel=kernel, reason=source, rejected={})
    rejected: dict[str, str] = {}
    for kernel in _load(kernels):
        reason = find_rejection(kernel, spec, stored_layout=stored_layout)
        if reason is None:
            return Selection(kernel=kernel, reason="the fastest one that fits", rejected=rejected)
        rejected[kernel.name] = reason
    raise KernelUnavailable(_explain("no kernel fits", spec, rejected))


def describe_spec(spec: LinearSpec) -> str:
    """Describe a layer in one line: ``bits=4, group_size=128, …, bfloat16 on cpu``."""
    extras = [
        *(["asymmetric"] if not spec.symmetric else []),
        *(["act-order"] if spec.act_order else []),
    ]
    where = f"{str(spec.dtype).removeprefix('torch.')} on {spec.device_type}"
    sizes = f"{spec.in_features} -> {spec.out_features}"
    return ", ".join([f"bits={spec.bits}", f"group_size={spec.group_size}", *extras, sizes, where])


def _load(kernels: Sequence[KernelEntry]) -> list[Kernel]:
    return [load_kernel(entry) for entry in kernels]


def _explain(cause: str, spec: LinearSpec, reasons: Mapping[str, str | None]) -> str:
    lines = [f"  {name}: {reason or 'can run it'}" for name, reason in reasons.items()]
    return "\n".join([f"Cannot run {describe_spec(spec)} ({cause}).", *lines])
