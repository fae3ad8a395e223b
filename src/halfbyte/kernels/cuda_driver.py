"""Load and launch machine code compiled by :mod:`halfbyte.kernels.cuda_compiler`.

The CUDA driver is called through ctypes; the few functions used have been stable since CUDA 12.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from halfbyte.errors import KernelUnavailable
from halfbyte.kernels.cuda_compiler import compile_source, read_source
from halfbyte.kernels.gpu_device import NULL_CONTEXT

PROGRAMMATIC_LAUNCH = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""

MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

TENSOR_TYPES = {1: 0, 2: 1, 4: 2, 8: 4}
"""By element size in bytes: CU_TENSOR_MAP_DATA_TYPE_UINT8, 16, 32 and 64."""
TENSOR_SWIZZLE_128B = 3
"""CU_TENSOR_MAP_SWIZZLE_128B."""
TENSOR_PROMOTE_L2_256B = 3
"""CU_TENSOR_MAP_L2_PROMOTION_L2_256B."""


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int * 16),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("blocks", ctypes.c_uint),
        ("blocks_beside", ctypes.c_uint * 2),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Context:
    """A device's primary context, which torch uses too; a ``with`` block makes it current."""

    def __init__(self, device: torch.device) -> None:
        """Retain the context until the process ends."""
        self._driver = load_driver()
        handle, self._context = ctypes.c_int(), ctypes.c_void_p()
        _check(self._driver.cuInit(0), "begin")
        _check(self._driver.cuDeviceGet(ctypes.byref(handle), device.index), f"find {device}")
        status = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle)
        _check(status, f"use {device}")

    def is_current(self) -> bool:
        """Whether this context is already the calling thread's current one."""
        found = ctypes.c_void_p()
        self._driver.cuCtxGetCurrent(ctypes.byref(found))
        return found.value == self._context.value

    def __enter__(self) -> None:
        """Push the context onto the thread's context stack."""
        _check(self._driver.cuCtxPushCurrent_v2(self._context), "change the device")

    def __exit__(self, *_: object) -> None:
        """Pop the context, so that the previous one is current again."""
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


_find_context = functools.cache(Context)


def in_context(device: torch.device) -> AbstractContextManager[None]:
    """Return a context manager that makes a device's CUDA context current for the thread.

    The driver launches into the calling thread's current context, whatever device the tensors are
    on. That is another device's context if torch's current device differs, and none at all if the
    thread has not called CUDA before.

    Args:
        device: Device of the launch.

    Returns:
        The context manager; a no-op if the context is current already.
    """
    context = _find_context(device)
    return NULL_CONTEXT if context.is_current() else context


class Function:
    """A kernel loaded on a device, ready to launch."""

    def __init__(
        self, cubin: bytes, name: str, *, threads: int, shared_bytes: int, early_start: bool
    ) -> None:
        """Load machine code into the current context.

        Args:
            cubin: Machine code from :func:`compile_source`.
            name: Name of the kernel, declared ``extern "C"``.
            threads: Threads per block.
            shared_bytes: Dynamic shared memory per block.
            early_start: Use programmatic dependent launch: the kernel may start before the launches
                ahead of it have finished, and waits for them itself (``griddepcontrol.wait``).
        """
        self._driver = load_driver()
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        _check(self._driver.cuModuleLoadData(ctypes.byref(module), cubin), f"load {name}")
        _check(
            self._driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()),
            f"find {name}",
        )
        _check(
            self._driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared_bytes),
            f"give {name} {shared_bytes} bytes of shared memory",
        )
        self._module, self._function, self._name = module, function, name
        self._attribute = _Attribute(id=PROGRAMMATIC_LAUNCH)
        self._attribute.value[0] = 1
        self._config = _LaunchConfig(
            blocks_beside=(1, 1),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=ctypes.pointer(self._attribute),
            num_attributes=int(early_start),
        )

    def launch(self, blocks: int, arguments: ctypes.Structure, stream: int) -> None:
        """Launch on a stream; ``arguments`` is the kernel's only parameter, copied by the call."""
        # A copy per call: other threads may launch the same kernel concurrently.
        config = _LaunchConfig.from_buffer_copy(self._config)
        config.blocks, config.stream = blocks, stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), self._function, parameters, None
        )
        _check(status, f"launch {self._name}")

    def count_resident(self) -> int:
        """Count the thread blocks that fit on a multiprocessor at a time."""
        count = ctypes.c_int()
        threads = int(self._config.block[0])
        size = ctypes.c_size_t(int(self._config.shared_bytes))
        status = self._driver.cuOccupancyMaxActiveBlocksPerMultiprocessor(
            ctypes.byref(count), self._function, threads, size
        )
        _check(status, f"count thread blocks of {self._name}")
        return count.value


def load_kernel(
    name: str,
    definitions: Mapping[str, int],
    architecture: str,
    device: torch.device,
    *,
    threads: int,
    shared_bytes: int,
    early_start: bool,
) -> tuple[Function, int]:
    """Compile and load a kernel.

    Args:
        name: Name of the kernel and, without ``.cu``, of its source file.
        definitions: Macros.
        architecture: ``sm_90`` and the like.
        device: Device to load it on.
        threads: Threads per block.
        shared_bytes: Dynamic shared memory per block.
        early_start: See :class:`Function`.

    Returns:
        The kernel, and how many of its thread blocks fit on a multiprocessor, at least 1.

    Raises:
        KernelUnavailable: The kernel cannot be compiled or loaded.
    """
    source = read_source(f"{name}.cu")
    load = functools.partial(
        Function, name=name, threads=threads, shared_bytes=shared_bytes, early_start=early_start
    )
    cubin = compile_source(source, definitions, architecture)
    with in_context(device):
        try:
            function = load(cubin)
        except KernelUnavailable:
            # The cached machine code may be damaged.
            again = compile_source(source, definitions, architecture, force=True)
            if again == cubin:
                raise
            function = load(again)
        return function, max(function.count_resident(), 1)


def find_obstacle_to(load: Callable[[], object]) -> str | None:
    """Return why a kernel cannot be loaded; None if it can."""
    try:
        load()
    except KernelUnavailable as reason:
        return str(reason)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """A tiling of a device tensor for TMA, the copy engine of compute capability 9.0."""

    address: int
    """Address of the tensor; a multiple of 16."""
    element_bytes: int
    """1, 2, 4 or 8."""
    sizes: tuple[int, ...]
    """Elements per dimension, innermost first."""
    strides: tuple[int, ...]
    """Stride in bytes of every dimension except the innermost; multiples of 16."""
    box: tuple[int, ...]
    """Elements of a box per dimension, at most 256; those outside the tensor are read as 0."""
    swizzled: bool = False
    """Whether rows of 128 bytes use the 128-byte swizzle."""


@functools.lru_cache(maxsize=8192)
def encode_boxes(boxes: Boxes) -> tuple[int, ...]:
    """Encode boxes as a TMA descriptor.

    Args:
        boxes: The tiling.

    Returns:
        The 16 words of a CUtensorMap.
    """
    buffer = (ctypes.c_ulonglong * 24)()
    start = (
        ctypes.addressof(buffer) + -ctypes.addressof(buffer) % 64
    )  # the driver requires this alignment
    rank = len(boxes.sizes)
    status = load_driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(start),
        ctypes.c_int(TENSOR_TYPES[boxes.element_bytes]),
        ctypes.c_uint(rank),
        ctypes.c_void_p(boxes.address),
        (ctypes.c_ulonglong * rank)(*boxes.sizes),
        (ctypes.c_ulonglong * (rank - 1))(*boxes.strides),
        (ctypes.c_uint * rank)(*boxes.box),
        (ctypes.c_uint * rank)(*[1] * rank),
        ctypes.c_int(0),  # not interleaved
        ctypes.c_int(TENSOR_SWIZZLE_128B if boxes.swizzled else 0),
        ctypes.c_int(TENSOR_PROMOTE_L2_256B),
        ctypes.c_int(0),  # zeros outside
    )
    _check(status, f"describe {boxes}")
    return tuple((ctypes.c_ulonglong * 16).from_address(start))


@functools.cache
def load_driver() -> ctypes.CDLL:
    """Load NVIDIA's driver library.

    Returns:
        The library.

    Raises:
        KernelUnavailable: The driver is not installed.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise KernelUnavailable(
            "Cannot launch CUDA kernels: libcuda.so.1 was not found. Install NVIDIA's driver."
        ) from exc


def _check(status: int, doing: str) -> None:
    if status == 0:
        return
    name = ctypes.c_char_p()
    load_driver().cuGetErrorName(status, ctypes.byref(name))
    found = (name.value or b"unknown error").decode()
    raise KernelUnavailable(f"The CUDA driver cannot {doing}: {found} ({status}).")
