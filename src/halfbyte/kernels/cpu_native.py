"""The compiled CPU kernel: one pass over the packed weights per eight rows of x.

Layout: ``csrc/layout.h``; one self-describing byte tensor with codes, scales, zeros and
column order. Arithmetic: exact codes, fp32 sums within a group, scaled once per group, one
rounding of the result. Error: fp32 sums and that rounding; an asymmetric zero is applied through
the sum of x. bf16 input of two or more rows runs on the CPU's matrix units (AMX) where available:
up to 16 rows with the same error, more rows with each weight rounded once. Otherwise, from
ROWS_LIMIT rows on, tiles of the weight are dequantized into the cache (rounded once, as in
torch_reference) and multiplied by torch.
Measured: bench/measure_cpu_layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.native_library import (
    DTYPES,
    LinearShape,
    check_status,
    has_tiles,
    open_library,
)
from halfbyte.kernels.torch_reference import TorchReference
from halfbyte.packing import codes_per_run, unpack_zeros

ROWS_LIMIT = 32
"""Rows of x from which dequantizing tiles is faster (bench/measure_cpu_layers.py)."""

TILE_WEIGHTS = 2**20
"""Weights dequantized at a time, for many rows."""

LANES = 16
"""Output channels of a block."""

SHARED_BYTES = 2**20
"""Packed size from which repacking uses several threads; below it, starting them costs more."""


class CpuNative:
    """``csrc/`` behind the common contract."""

    name = "cpu_native"
    repacks = True
    activation_bits = 16
    """8: x is quantized first (cpu_int8.py)."""

    def find_obstacle(self) -> str | None:
        """Return why the library cannot be used; None if it can."""
        return open_library().obstacle

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the kernel cannot run a layer; None if it can."""
        if spec.device_type != "cpu":
            return f"runs on cpu, not on {spec.device_type}"
        if spec.dtype not in DTYPES:
            return f"supports float32, bfloat16 and float16, not {spec.dtype}"
        run = codes_per_run(spec.bits)
        if spec.group_size % run:
            return f"needs group_size a multiple of {run} at {spec.bits} bits"
        if spec.in_features % run:
            return f"needs in_features a multiple of {run} at {spec.bits} bits"
        return None

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Repack the words by blocks of output channels, with columns sorted by group."""
        scales = stored.scales
        if scales.dtype not in DTYPES:
            scales = scales.float()
        zeros = order = None
        if not spec.symmetric:
            numbers = unpack_zeros(stored.qzeros, spec.bits, spec.zero_offset)
            zeros = numbers.t().to(torch.uint8).contiguous()
        if stored.g_idx is not None:
            order = torch.argsort(stored.g_idx, stable=True).to(torch.int32)
        shape = LinearShape(
            bits=spec.bits,
            in_features=spec.in_features,
            out_features=spec.out_features,
            group_size=spec.group_size,
            scale_dtype=DTYPES[scales.dtype],
            symmetric=int(spec.symmetric),
            has_order=int(order is not None),
        )
        functions = open_library().functions
        assert functions is not None
        packed = torch.empty(functions.hb_packed_bytes(shape), dtype=torch.uint8)
        qweight, scales = stored.weight[0].contiguous(), scales.contiguous()
        status = functions.hb_pack(
            shape,
            qweight.data_ptr(),
            scales.data_ptr(),
            None if zeros is None else zeros.data_ptr(),
            None if order is None else order.data_ptr(),
            packed.data_ptr(),
            torch.get_num_threads() if packed.nbytes >= SHARED_BYTES else 1,
        )
        check_status(status, f"Cannot pack a {spec.in_features} -> {spec.out_features} linear")
        return (packed,)

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Return ``qweight`` as stored."""
        functions = open_library().functions
        assert functions is not None
        words = (spec.in_features * spec.bits // 32, spec.out_features)
        qweight = torch.empty(words, dtype=torch.int32)
        status = functions.hb_unpack(
            operands.weight[0].data_ptr(), qweight.data_ptr(), torch.get_num_threads()
        )
        check_status(status, f"Cannot unpack a {spec.in_features} -> {spec.out_features} linear")
        return qweight

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply by the packed weight, or by dequantized tiles where x has many rows."""
        # One row of a small layer takes 100 µs, so Python overhead matters here.
        rows = x.numel() // spec.in_features
        functions = open_library().functions
        assert functions is not None
        if rows >= ROWS_LIMIT and not self._takes_many_rows(spec):
            return self._apply_tiles(x, operands, bias, spec)
        x = x.contiguous()
        result = x.new_empty((*x.shape[:-1], spec.out_features))
        status = functions.hb_linear(
            operands.weight[0].data_ptr(),
            DTYPES[spec.dtype],
            x.data_ptr(),
            rows,
            None if bias is None else bias.data_ptr(),
            result.data_ptr(),
            self.activation_bits,
            torch.get_num_threads(),
        )
        if status:
            check_status(status, f"Cannot run a {spec.in_features} -> {spec.out_features} linear")
        return result

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight [out, in]."""
        stored = replace(operands, weight=(self.restore(operands, spec),))
        return TorchReference().dequantize(stored, spec, dtype)

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Multiply by the weight, one tile of output channels at a time."""
        rows = gradient.reshape(-1, spec.out_features).to(_tile_dtype(spec))
        total = gradient.new_zeros(rows.shape[0], spec.in_features, dtype=torch.float32)
        for start, stop, tile in _dequantize_tiles(operands, spec):
            total += rows[:, start:stop] @ tile.t()
        if operands.g_idx is not None:
            total = total[:, torch.argsort(_sorted_columns(operands.g_idx))]
        return total.to(gradient.dtype).view(*gradient.shape[:-1], spec.in_features)

    def error_bound(self, spec: LinearSpec) -> float:
        """Few rows round only the result, many rows each weight too; zeros are applied in fp32."""
        unit = torch.finfo(spec.dtype).eps / 2
        folded = 1 if spec.symmetric else 2**spec.bits
        sums = torch.finfo(torch.float32).eps * (spec.in_features + folded)
        return 3 * unit + sums

    def _takes_many_rows(self, spec: LinearSpec) -> bool:
        """Whether the library is faster than dequantized tiles for many rows too."""
        if self.activation_bits < 16:
            return True
        return spec.dtype == torch.bfloat16 and has_tiles()

    def _apply_tiles(
        self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec
    ) -> Tensor:
        """Dequantize one tile of output channels at a time and multiply by it."""
        rows = x.reshape(-1, spec.in_features).to(_tile_dtype(spec))
        if operands.g_idx is not None:
            rows = rows[:, _sorted_columns(operands.g_idx)]
        result = x.new_empty(rows.shape[0], spec.out_features)
        for start, stop, tile in _dequantize_tiles(operands, spec):
            result[:, start:stop] = rows @ tile
        if bias is not None:
            result += bias
        return result.view(*x.shape[:-1], spec.out_features)


def _tile_dtype(spec: LinearSpec) -> torch.dtype:
    """fp32 for float16, of which the library writes no tiles; the result is still rounded once."""
    return torch.float32 if spec.dtype == torch.float16 else spec.dtype


def _sorted_columns(g_idx: Tensor) -> Tensor:
    """Column of the weight at each position of a packed row."""
    return torch.argsort(g_idx, stable=True)


def _dequantize_tiles(operands: Operands, spec: LinearSpec) -> Iterator[tuple[int, int, Tensor]]:
    """Yield (start, stop, weight [in, stop - start]) for each tile of output channels.

    Columns are in packed order, sorted by group; the buffer is reused for the next tile.
    """
    functions = open_library().functions
    assert functions is not None
    dtype = _tile_dtype(spec)
    width = max(TILE_WEIGHTS // spec.in_features // LANES, 1) * LANES
    width = min(width, spec.out_features)
    memory = torch.empty(spec.in_features * width, dtype=dtype)
    for start in range(0, spec.out_features, width):
        stop = min(start + width, spec.out_features)
        status = functions.hb_dequantize(
            operands.weight[0].data_ptr(),
            start,
            stop,
            DTYPES[dtype],
            memory.data_ptr(),
            torch.get_num_threads(),
        )
        check_status(status, f"Cannot dequantize channels {start}..{stop}")
        yield start, stop, memory[: spec.in_features * (stop - start)].view(spec.in_features, -1)
