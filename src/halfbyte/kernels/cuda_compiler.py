"""Compile CUDA C++ at run time with torch's NVRTC, and cache the machine code on disk.

::

    source + definitions ─┬─disk cache─┬─> machine code for one architecture
                          └───NVRTC────┘

Torch's wheels for NVIDIA GPUs include NVRTC, so there is no CUDA toolkit to install and no version
to match. NVRTC is called through ctypes.
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
    """Read the source of a kernel from the package, with its includes expanded."""
    text = (resources.files("halfbyte.kernels") / "cuda" / name).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda found: read_source(found[1]), text)


def compile_source(
    source: str, definitions: Mapping[str, int], architecture: str, *, force: bool = False
) -> bytes:
    """Compile CUDA C++ to machine code, or read it from the disk cache.

    Args:
        source: CUDA C++ without includes.
        definitions: Macros.
        architecture: ``sm_90`` and the like.
        force: Compile even if the cache has the machine code.

    Returns:
        A cubin.

    Raises:
        KernelUnavailable: NVRTC is not found, or cannot compile the source.
    """
    nvrtc = load_nvrtc()
    options = [
        f"--gpu-architecture={architecture}",
        *OPTIONS,
        *(f"-D{name}={value}" for name, value in sorted(definitions.items())),
    ]
    key = "\n".join([source, *options, str(find_nvrtc_version(nvrtc))])
    path = _cache_path(key)
    cached = b"" if force or path is None else _read(path)
    if cached:
        return cached
    cubin = _compile(nvrtc, source, options)
    if path is not None:
        _write(path, cubin)
    return cubin


def _cache_path(key: str) -> Path | None:
    """Return the path of cached machine code; None if there is no cache folder."""
    try:
        folder = cache_folder()
    except ConfigError as error:
        _warn_not_cached(str(error))
        return None
    return folder / "kernels" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"


def _read(path: Path) -> bytes:
    """Return a file's bytes; empty if it is missing or not readable."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _write(path: Path, cubin: bytes) -> None:
    """Write a file atomically; only warn if the cache is not writable."""
    partial = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(cubin)
        partial.replace(path)
    except OSError as error:
        _warn_not_cached(f"{path.parent}: {error.strerror or error}")
        with contextlib.suppress(OSError):
            partial.unlink()


@functools.cache
def _warn_not_cached(why: str) -> None:
    """Warn once that compiled kernels cannot be cached."""
    log.warning("compiled GPU kernels cannot be cached, which makes each start slower: %s", why)


@functools.cache
def load_nvrtc() -> ctypes.CDLL:
    """Load the NVRTC that torch was built for.

    Returns:
        The library.

    Raises:
        KernelUnavailable: It is neither among torch's packages nor on the library path.
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
            # NVRTC looks up its builtins by name only, so they must be loaded first.
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
    """Return NVRTC's (major, minor) version."""
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
