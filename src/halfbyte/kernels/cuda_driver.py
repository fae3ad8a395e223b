"""Compile CUDA C++ at run time with torch's own NVRTC, keep it on disk, and launch it.

::

    source + definitions ──(disk)── machine code for one architecture ──> Function ──launch──> GPU
                         └──NVRTC─┘

Torch's wheels for NVIDIA bring NVRTC and need the driver; there is no toolkit to install and no
version to match. Both are called by ctypes: the few functions used have kept their form since CUDA
12.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch

from halfbyte.errors import KernelUnavailable
from halfbyte.machine.cache import cache_folder

OPTIONS = ("--std=c++17", "--use_fast_math")

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


_INCLUDE = re.compile(r'^#include "(\w+\.cu)"\n', re.MULTILINE)


def read_source(name: str) -> str:
    """Read a kernel's source that is shipped with the package, and in it what it includes."""
    text = (resources.files("halfbyte.kernels") / "cuda" / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: read_source(found[1]), text)


def compile_source(source: str, definitions: Mapping[str, int], architecture: str) -> bytes:
    """Compile to machine code, or take it from the disk cache.

    Args:
        source: CUDA C++ that includes nothing.
        definitions: Macros.
        architecture: ``sm_90`` and the like.

    Returns:
        A cubin.

    Raises:
        KernelUnavailable: There is no NVRTC, or it refuses the source; says which.
    """
    nvrtc = load_nvrtc()
    options = [
        f"--gpu-architecture={architecture}",
        *OPTIONS,
        *(f"-D{name}={value}" for name, value in sorted(definitions.items())),
    ]
    key = "\n".join([source, *options, str(find_nvrtc_version(nvrtc))])
    path = cache_folder() / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    if path.is_file():
        return path.read_bytes()
    cubin = _compile(nvrtc, source, options)
    _keep(path, cubin)
    return cubin


def _keep(path: Path, cubin: bytes) -> None:
    """Write a file as a whole or not at all; a cache that cannot be written is no error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(cubin)
        Path(file.name).replace(path)
    except OSError:
        return


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """Load the NVRTC that torch was built for.

    Returns:
        The library.

    Raises:
        KernelUnavailable: There is none among torch's packages or on the library path.
    """
    major = (torch.version.cuda or "13").split(".")[0]
    name = f"libnvrtc.so.{major}"
    folders = []
    nvidia = importlib.util.find_spec("nvidia")
    if nvidia is not None:
        folders = [Path(folder) for folder in nvidia.submodule_search_locations or ()]
    candidates = [str(path) for folder in folders for path in sorted(folder.glob(f"*/lib/{name}"))]
    for candidate in [*candidates, name]:
        try:
            # It looks for its built-in headers by name only: they must be loaded before.
            for builtins in sorted(Path(candidate).parent.glob("libnvrtc-builtins.so.*")):
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(candidate)
        except OSError:
            continue
    raise KernelUnavailable(
        f"Cannot compile CUDA kernels: {name} is neither in the packages that come with torch nor "
        f"on the library path. Install it: pip install nvidia-cuda-nvrtc"
    )


def find_nvrtc_version(nvrtc: ctypes.CDLL) -> tuple[int, int]:
    """Give NVRTC's (major, minor) version."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return major.value, minor.value


def _compile(nvrtc: ctypes.CDLL, source: str, options: list[str]) -> bytes:
    program = ctypes.c_void_p()
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"halfbyte.cu", 0, None, None)
    try:
        words = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = nvrtc.nvrtcCompileProgram(program, len(options), words)
        size = ctypes.c_size_t()
        if status != 0:
            nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
            log = ctypes.create_string_buffer(size.value)
            nvrtc.nvrtcGetProgramLog(program, log)
            first = log.value.decode(errors="replace").strip().split("\n")[0]
            raise KernelUnavailable(
                f"NVRTC {'.'.join(map(str, find_nvrtc_version(nvrtc)))} cannot compile a kernel "
                f"with {' '.join(options)}: {first or f'error {status}'}"
            )
        nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetCUBIN(program, cubin)
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


class _Attribute(ctypes.Structure):
    _fields_ = (
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int * 16),
    )


class _LaunchConfig(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    )


class Function:
    """A kernel in a device's memory, ready to be launched."""

    def __init__(
        self, cubin: bytes, name: str, *, threads: int, shared_bytes: int, early_start: bool
    ) -> None:
        """Load machine code into the current device's context.

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
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            attributes=ctypes.pointer(self._attribute),
            num_attributes=int(early_start),
        )

    def launch(self, blocks: int, arguments: ctypes.Structure, stream: int) -> None:
        """Launch on a stream; ``arguments`` is the kernel's one parameter, copied by the call."""
        config = self._config
        config.grid[:] = (blocks, 1, 1)
        config.stream = stream
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
    cubin = compile_source(read_source(f"{name}.cu"), definitions, architecture)
    with torch.cuda.device(device):
        function = Function(
            cubin, name, threads=threads, shared_bytes=shared_bytes, early_start=early_start
        )
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
