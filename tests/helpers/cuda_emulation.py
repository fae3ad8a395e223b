"""The CUDA kernel's own source, compiled for a CPU by tests/kernels/cuda_emulator.h."""

from __future__ import annotations

import ctypes
import functools
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from tests.helpers.packed import make_linear
from torch import Tensor

from halfbyte.kernels import cuda_rows, cuda_stream
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.cuda_arguments import Arguments, fill_arguments
from halfbyte.kernels.cuda_config import define_macros
from halfbyte.kernels.cuda_driver import Boxes
from halfbyte.kernels.cuda_few_rows import plan_work
from halfbyte.kernels.cuda_linear import CudaConfig, CudaLinear
from halfbyte.kernels.cuda_rows import RowsArguments, RowsConfig
from halfbyte.kernels.cuda_stream import StreamArguments, StreamConfig
from halfbyte.kernels.fragments import find_order, prepare_fragments

EMULATOR = Path(__file__).parent.parent / "kernels"
SOURCES = Path(__file__).parents[2] / "src" / "halfbyte" / "kernels" / "cuda"


def find_compiler() -> str | None:
    """A C++ compiler, if there is one."""
    return shutil.which("g++") or shutil.which("clang++")


@functools.cache
def build(source: str, macros: tuple[tuple[str, int], ...]) -> ctypes.CDLL:
    """Compile a kernel for a CPU; once for each set of macros."""
    folder = tempfile.mkdtemp(prefix="halfbyte-emulator-")
    library = Path(folder) / "multiply.so"
    compiler = find_compiler()
    assert compiler is not None
    subprocess.run(
        [
            compiler,
            *(
                "-std=c++20",
                "-O2",
                "-shared",
                "-fPIC",
                "-DEMULATED",
                "-Wno-unknown-pragmas",
                "-Wno-psabi",
            ),
            *(f"-D{name}={value}" for name, value in macros),
            f"-I{SOURCES}",
            f"-I{EMULATOR}",
            str(EMULATOR / source),
            *("-o", str(library)),
        ],
        check=True,
    )
    kernel = ctypes.CDLL(str(library))
    kernel.emulate.restype = ctypes.c_char_p
    return kernel


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a launch reads and writes; what the kernel does not write is not a number."""

    rows: Tensor
    result: Tensor
    partials: Tensor
    arrivals: Tensor

    @classmethod
    def of(
        cls, x: Tensor, operands: Operands, spec: LinearSpec, floats: int, counters: int
    ) -> Self:
        """Make it for a product, with room for sums of runs and with so many counters."""
        order = find_order(operands, spec)
        return cls(
            rows=x.contiguous() if order is None else x.index_select(1, order),
            result=torch.full((x.shape[0], spec.out_features), float("nan"), dtype=x.dtype),
            partials=torch.full((floats,), float("nan")),
            arrivals=torch.zeros(counters, dtype=torch.int32),
        )

    def fill(self, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Arguments:
        """Give the parameter that all kernels have."""
        return fill_arguments(
            self.rows, operands, bias, spec, self.result, self.partials, self.arrivals
        )

    def finish(self, fault: bytes | None) -> Tensor:
        """Give the result; nothing was refused, and all counters must be 0 again."""
        assert fault is None, fault.decode()
        assert not self.arrivals.any()
        return self.result


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
    library = build("cuda_emulator.cpp", tuple(sorted(macros.items())))
    assert library.shared_bytes() == config.count_shared_bytes(spec, operands.scales.dtype)
    blocks = -(-spec.out_features // config.channels)
    units = blocks * -(-spec.in_features // (64 * config.warps_in))
    runs = min(runs, units)
    memory = Memory.of(x, operands, spec, 2 * runs * config.partial_floats, blocks)
    return memory.finish(
        library.emulate(ctypes.byref(memory.fill(operands, bias, spec)), runs, int(backwards))
    )


def multiply_rows_emulated(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: RowsConfig,
    *,
    resident: int = 3,
    order: int = 0,
) -> Tensor:
    """As ``cuda_rows.multiply`` on a GPU with room for ``resident`` thread blocks.

    ``order`` 1: backwards; 2: copies happen as soon as they are asked for, not as late as possible;
    3: and threads go on at different times after they met.
    What the kernel does not write is not a number.
    """
    macros = define_macros(config, spec, operands.scales.dtype)
    library = build("rows_emulator.cpp", tuple(sorted(macros.items())))
    assert library.shared_bytes() == config.count_shared_bytes(spec, operands.scales.dtype)
    assert library.arguments_bytes() == ctypes.sizeof(RowsArguments)
    runs = cuda_rows.count_runs(config, spec, x.shape[0], resident)
    counters = config.count_tiles(spec, x.shape[0]) * config.cluster * config.warpgroups
    memory = Memory.of(x, operands, spec, 2 * runs * config.partial_floats, counters)
    common = memory.fill(operands, bias, spec)
    return memory.finish(
        library.emulate(ctypes.byref(RowsArguments(a=common)), runs * config.cluster, order)
    )


def multiply_stream_emulated(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: StreamConfig,
    *,
    resident: int = 5,
    order: int = 0,
) -> Tensor:
    """As ``cuda_stream.multiply`` on a GPU with room for ``resident`` thread blocks.

    ``order`` as of :func:`multiply_rows_emulated`. What the kernel does not write is not a number.
    """
    scale_dtype = operands.scales.dtype
    assert cuda_stream.find_mismatch(config, spec) is None
    macros = define_macros(config, spec, scale_dtype)
    library = build("stream_emulator.cpp", tuple(sorted(macros.items())))
    assert library.shared_bytes() == config.count_shared_bytes(spec, scale_dtype)
    assert library.arguments_bytes() == ctypes.sizeof(StreamArguments)
    work = plan_work(config, spec, resident, cuda_stream.WHOLE_BLOCK_SLACK)
    floats = 2 * work.runs * config.partial_floats
    memory = Memory.of(x, operands, spec, floats, work.channel_blocks)
    arguments = cuda_stream.describe_tensors(
        memory.fill(operands, bias, spec), memory.rows, operands, spec, config, _encode
    )
    return memory.finish(library.emulate(ctypes.byref(arguments), work.runs, order))


def _encode(boxes: Boxes) -> tuple[int, ...]:
    """As ``Map`` in barrier_emulator.h, after what the driver asks for."""
    assert boxes.address % 16 == 0
    assert all(stride % 16 == 0 for stride in boxes.strides)
    assert all(0 < size <= cuda_stream.BOX_LIMIT for size in boxes.box)
    assert boxes.box[0] * boxes.element_bytes % 16 == 0
    numbers = (boxes.address, boxes.element_bytes, *boxes.sizes, *boxes.strides, *boxes.box)
    return (*numbers, int(boxes.swizzled), *[0] * 5)


def check_product(
    multiply: Callable[..., Tensor], rows: int, *, with_bias: bool = True, **layer: Any
) -> Tensor:
    """Multiply a random layer, and hold the result to float64.

    Args:
        multiply: Called with x, operands, bias and spec.
        rows: Of x.
        with_bias: Whether the layer has one.
        **layer: What is other than usual about it.

    Returns:
        The product.
    """
    sizes = {"in_features": 576, "out_features": 144, "dtype": torch.bfloat16}
    if layer.get("bits", 4) == 3 or not layer.get("symmetric", True):
        sizes["out_features"] = 160  # the zeros of 3 bits fill whole words then
    linear = make_linear(**sizes | layer)
    spec = linear.spec
    operands = replace(linear.stored, weight=prepare_fragments(linear.stored, spec))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, spec.in_features, generator=generator).to(spec.dtype)
    bias = torch.randn(spec.out_features, generator=generator).to(spec.dtype)
    bias = bias if with_bias else None
    found = multiply(x, operands, bias, spec)
    exact, size = x.double() @ linear.weight.t(), x.double().abs() @ linear.weight.abs().t()
    if with_bias:
        exact, size = exact + bias.double(), size + bias.double().abs()
    assert ((found.double() - exact).abs() <= CudaLinear().error_bound(spec) * size).all()
    return found
