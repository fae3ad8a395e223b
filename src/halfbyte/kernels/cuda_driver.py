"""Load machine code of :mod:`halfbyte.kernels.cuda_compiler`, and launch it.

The driver is called by ctypes: the few functions used have kept their form since CUDA 12.
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
from halfbyte.kernels.gpu_device import AS_IT_IS

PROGRAMMATIC_LAUNCH = 6
"""CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION."""

MAX_DYNAMIC_SHARED = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES."""

TENSOR_TYPES = {1: 0, 2: 1, 4: 2, 8: 4}
"""By bytes of an element: CU_TENSOR_MAP_DATA_TYPE_UINT8, 16, 32 and 64."""
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
    """A device's context, which torch uses too; in a ``with`` it is the calling thread's."""

    def __init__(self, device: torch.device) -> None:
        """Find it; it stays as long as the process does."""
        self._driver = load_driver()
        handle, self._context = ctypes.c_int(), ctypes.c_void_p()
        _check(self._driver.cuInit(0), "begin")
        _check(self._driver.cuDeviceGet(ctypes.byref(handle), device.index), f"find {device}")
        status = self._driver.cuDevicePrimaryCtxRetain(ctypes.byref(self._context), handle)
        _check(status, f"use {device}")

    def is_current(self) -> bool:
        """Whether it is the thread's already."""
        found = ctypes.c_void_p()
        self._driver.cuCtxGetCurrent(ctypes.byref(found))
        return found.value == self._context.value

    def __enter__(self) -> None:
        """Put it before what the thread had."""
        _check(self._driver.cuCtxPushCurrent_v2(self._context), "change the device")

    def __exit__(self, *_: object) -> None:
        """Give the thread back what it had."""
        self._driver.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))


_find_context = functools.cache(Context)


def in_context(device: torch.device) -> AbstractContextManager[None]:
    """Make a device's context the thread's own.

    The driver looks at no tensors: it launches into the thread's context, which is another device's
    where that is torch's current one, and none where the thread has called nothing of CUDA yet.

    Args:
        device: Of what is launched.

    Returns:
        For a ``with``, in which it is; nothing is done where it is already.
    """
    context = _find_context(device)
    return AS_IT_IS if context.is_current() else context


class Function:
    """A kernel in a device's memory, ready to be launched."""

    def __init__(
        self, cubin: bytes, name: str, *, threads: int, shared_bytes: int, early_start: bool
    ) -> None:
        """Load machine code into the thread's context.

        Args:
            cubin: Of :func:`compile_source`.
            name: The kernel's, declared ``extern "C"``.
            threads: Of a thread block.
            shared_bytes: Of dynamic shared memory.
            early_start: Launch it before the launches ahead of it are over; it must wait for them
                itself (``griddepcontrol.wait``).
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
        """Launch on a stream; ``arguments`` is the kernel's one parameter, copied by the call."""
        # Of this call: other threads launch the same kernel meanwhile.
        config = _LaunchConfig.from_buffer_copy(self._config)
        config.blocks, config.stream = blocks, stream
        parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        status = self._driver.cuLaunchKernelEx(
            ctypes.byref(config), self._function, parameters, None
        )
        _check(status, f"launch {self._name}")

    def count_resident(self) -> int:
        """Thread blocks that fit on a multiprocessor together."""
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
        name: The kernel's, and its source's without ``.cu``.
        definitions: Macros.
        architecture: ``sm_90`` and the like.
        device: Into whose memory.
        threads: Of a thread block.
        shared_bytes: Of dynamic shared memory.
        early_start: See :class:`Function`.

    Returns:
        The kernel, and how many of its thread blocks fit on a multiprocessor, 1 at least.

    Raises:
        KernelUnavailable: It cannot be compiled or loaded; says why.
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
            # What was kept on disk may be damaged.
            again = compile_source(source, definitions, architecture, anew=True)
            if again == cubin:
                raise
            function = load(again)
        return function, max(function.count_resident(), 1)


def find_obstacle_to(load: Callable[[], object]) -> str | None:
    """Say why a kernel cannot be loaded, or None."""
    try:
        load()
    except KernelUnavailable as reason:
        return str(reason)
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Boxes:
    """Boxes of a tensor on the device, which the copy engine of compute capability 9.0 copies."""

    address: int
    """Of the tensor; a multiple of 16."""
    element_bytes: int
    """1, 2, 4 or 8."""
    sizes: tuple[int, ...]
    """Elements of each dimension, the innermost first."""
    strides: tuple[int, ...]
    """Bytes from one to the next, of all dimensions but the innermost; multiples of 16."""
    box: tuple[int, ...]
    """Elements of a box, at most 256 of each dimension; beyond the tensor they are 0."""
    swizzled: bool = False
    """Whether its rows, of 128 bytes, have their 16-byte pieces swapped about."""


@functools.lru_cache(maxsize=8192)
def encode_boxes(boxes: Boxes) -> tuple[int, ...]:
    """Describe boxes to the copy engine.

    Args:
        boxes: Which.

    Returns:
        The 16 words of a CUtensorMap.
    """
    room = (ctypes.c_ulonglong * 24)()
    start = ctypes.addressof(room) + -ctypes.addressof(room) % 64  # it asks for this alignment
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
        KernelUnavailable: There is no driver.
    """
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as exc:
        raise KernelUnavailable(
            "Cannot launch CUDA kernels: libcuda.so.1, NVIDIA's driver, is not there."
        ) from exc


def _check(status: int, doing: str) -> None:
    if status == 0:
        return
    name = ctypes.c_char_p()
    load_driver().cuGetErrorName(status, ctypes.byref(name))
    found = (name.value or b"unknown error").decode()
    raise KernelUnavailable(f"The CUDA driver cannot {doing}: {found} ({status}).")
