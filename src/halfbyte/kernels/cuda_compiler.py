"""Compile CUDA C++ at run time with torch's own NVRTC, and keep it on disk.

::

    source + definitions ──(disk)── machine code for one architecture
                         └──NVRTC─┘

Torch's wheels for NVIDIA bring NVRTC and need the driver; there is no toolkit to install and no
version to match. It is called by ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import re
import threading
from collections.abc import Mapping
from importlib import resources
from pathlib import Path

import torch

from halfbyte.errors import ConfigError, KernelUnavailable
from halfbyte.machine.cache import cache_folder

log = logging.getLogger(__name__)

OPTIONS = ("--std=c++17", "--use_fast_math")

_INCLUDE = re.compile(r'^#include "(\w+\.cu)"\n', re.MULTILINE)


def read_source(name: str) -> str:
    """Read a kernel's source that is shipped with the package, and in it what it includes."""
    text = (resources.files("halfbyte.kernels") / "cuda" / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: read_source(found[1]), text)


def compile_source(
    source: str, definitions: Mapping[str, int], architecture: str, *, anew: bool = False
) -> bytes:
    """Compile to machine code, or take it from the disk cache.

    Args:
        source: CUDA C++ that includes nothing.
        definitions: Macros.
        architecture: ``sm_90`` and the like.
        anew: Whatever the cache has.

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
    path = _find_place(key)
    kept = b"" if anew or path is None else _read(path)
    if kept:
        return kept
    cubin = _compile(nvrtc, source, options)
    if path is not None:
        _keep(path, cubin)
    return cubin


def _find_place(key: str) -> Path | None:
    """Where machine code is kept; None: there is no folder for it."""
    try:
        folder = cache_folder()
    except ConfigError as error:
        _tell_not_kept(str(error))
        return None
    return folder / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _read(path: Path) -> bytes:
    """What was kept; nothing where it is not there, or another user's own."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _keep(path: Path, cubin: bytes) -> None:
    """Write a file as a whole or not at all; a cache that cannot be written is no error."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(cubin)
        partial.replace(path)
    except OSError as error:
        _tell_not_kept(f"{path.parent}: {error.strerror or error}")
        with contextlib.suppress(OSError):
            partial.unlink()


@functools.cache
def _tell_not_kept(why: str) -> None:
    """Say once why every process compiles anew."""
    log.warning("compiled GPU kernels are not kept, which makes each start slower: %s", why)


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
