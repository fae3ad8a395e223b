"""The CUDA kernel's own source, compiled for a CPU by tests/kernels/cuda_emulator.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_linear import (
    Arguments,
    CudaConfig,
    count_shared_bytes,
    define_macros,
    fill_arguments,
)
from halfbyte.kernels.fragments import find_order

EMULATOR = Path(__file__).parent.parent / "kernels"
SOURCES = Path(__file__).parents[2] / "src" / "halfbyte" / "kernels" / "cuda"


def find_compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def build(macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Compile the kernel for a CPU; once for each set of macros."""
    folder = tempfile.mkdtemp(prefix="halfbyte-emulator-")
    library = Path(folder) / "multiply.so"
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run(
        [
            compiler,
            *("-std=c++20", "-O1", "-shared", "-fPIC", "-DEMULATED", "-Wno-unknown-pragmas"),
            *(f"-D{name}={value}" for name, value in macros),
            f"-I{SOURCES}",
            f"-I{EMULATOR}",
            str(EMULATOR / "cuda_emulator.cpp"),
            *("-o", str(library)),
        ],
        check=True,
    )
    return ctypes.CDLL(str(library))


def multiply_emulated(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: CudaConfig,
    *,
    runs: int,
    backwards: bool = False,
) -> Tensor:
    """As ``cuda_linear.multiply``, by ``runs`` thread blocks one after another.

    What the kernel does not write is not a number.
    """
    macros = define_macros(config, spec, operands.scales.dtype)
    library = build(tuple(sorted(macros.items())))
    assert library.shared_bytes() == count_shared_bytes(config, spec, operands.scales.dtype)
    order = find_order(operands, spec)
    rows = x.contiguous() if order is None else x.index_select(1, order)
    blocks = -(-spec.out_features // config.channels)
    units = blocks * -(-spec.in_features // (64 * config.warps_in))
    runs = min(runs, units)
    result = torch.full((x.shape[0], spec.out_features), float("nan"), dtype=x.dtype)
    partials = torch.full((2 * runs * config.partial_floats,), float("nan"))
    arrivals = torch.zeros(blocks, dtype=torch.int32)
    arguments: Arguments = fill_arguments(rows, operands, bias, spec, result, partials, arrivals)
    library.emulate(ctypes.byref(arguments), runs, int(backwards))
    assert not arrivals.any()
    return result
