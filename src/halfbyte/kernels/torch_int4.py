"""torch's int4 matrix multiplication on a CPU, for the few rows of a decode step.

Layout: [out / B, in, B / 2] bytes, two output channels per byte. B is 64, 32 or 16 and there are
two orders within a block, depending on the instruction set that torch uses. Both are detected by
packing random codes; the kernel is only used if unpacking them gives the same codes again.
Arithmetic: x in bf16, (code - 8) * scale + zero in fp32 from scales and zeros rounded to bf16, fp32
sums. Error: one bf16 rounding each of scale, zero * scale and the result. From ROWS_LIMIT rows on
the weight is dequantized (rounded once, as in torch_reference) and multiplied in bf16 by torch
instead, because the cost of the int4 op grows linearly with rows. Measured: AMD EPYC with AVX-512,
2 cores (bench/measure_int4_rows.py). For fp16 and fp32 torch's op is a plain loop, as slow as
dequantizing at one row and slower at more, so those are not supported.

Source:
    PyTorch ``aten/src/ATen/native/cpu/int4mm_kernel.cpp``: group sizes, layout, dtypes.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import first_line
from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.packing import pack_codes, unpack_codes, unpack_zeros

GROUP_SIZES = (32, 64, 128, 256)
"""Group sizes that the op supports."""

MIDDLE_CODE = 8
"""Code that the op subtracts from every code."""

ROWS_LIMIT = 64
"""Rows of x from which dequantizing first is at least as fast (bench/measure_int4_rows.py)."""

TILE_WEIGHTS = 2**20
"""Weights dequantized at a time, for many rows."""

PROBE_COLUMNS = 4


class TorchInt4:
    """``torch.ops.aten._weight_int4pack_mm_for_cpu`` behind the common contract."""

    name = "torch_int4"
    repacks = True

    def find_obstacle(self) -> str | None:
        """Return why this torch build cannot run the op; None if it can."""
        return _find_layout()[1]

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the op cannot run a layer; None if it can."""
        if spec.device_type != "cpu":
            return f"runs on cpu, not on {spec.device_type}"
        if spec.bits != 4:
            return f"supports 4 bits, not {spec.bits}"
        if spec.dtype != torch.bfloat16:
            dtype = str(spec.dtype).removeprefix("torch.")
            return f"fast only in bfloat16; torch runs {dtype} in a plain loop"
        if spec.group_size not in GROUP_SIZES:
            allowed = ", ".join(map(str, GROUP_SIZES))
            return f"supports group_size {allowed}, not {spec.group_size}"
        if spec.is_ragged:
            return f"group_size {spec.group_size} does not divide {spec.in_features} inputs"
        block = _block_rows()
        if spec.out_features % block:
            return f"needs out_features a multiple of {block}, not {spec.out_features}"
        return None

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Repack the codes; act-order columns are sorted by group, which changes no value."""
        codes = unpack_codes(stored.weight[0], spec.bits)
        zeros = unpack_zeros(stored.qzeros, spec.bits, spec.zero_offset).t().float()
        scales = stored.scales.float()
        offsets = (MIDDLE_CODE - zeros) * scales
        scales_and_zeros = torch.stack([scales, offsets], dim=-1).to(spec.dtype).contiguous()
        if stored.g_idx is None:
            return _pack(codes.t()), scales_and_zeros
        order = torch.argsort(stored.g_idx, stable=True)
        return _pack(codes[order].t()), scales_and_zeros, order

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Return ``qweight`` as stored."""
        codes = _unpack(operands.weight[0])
        return pack_codes(self._stored_order(codes, operands, dim=0), spec.bits)

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply with the op, or with the dequantized weight if x has many rows."""
        rows = x.reshape(-1, spec.in_features)
        if len(operands.weight) > 2:
            rows = rows[:, operands.weight[2]]
        if rows.shape[0] >= ROWS_LIMIT:
            result = self._apply_dense(rows, operands, spec)
        else:
            result = torch.ops.aten._weight_int4pack_mm_for_cpu(
                rows.contiguous(), operands.weight[0], spec.group_size, operands.weight[1]
            )
        if bias is not None:
            result += bias
        return result.view(*x.shape[:-1], spec.out_features)

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight [out, in]."""
        weight = self._dequantize_sorted(operands, spec, dtype, 0, spec.out_features)
        return self._stored_order(weight, operands, dim=0).t()

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Multiply by the dequantized weight, some groups of input columns at a time."""
        zeros = None
        if not spec.symmetric:
            zeros = unpack_zeros(operands.qzeros, spec.bits, spec.zero_offset).t()
        block = _block_rows()
        packed = operands.weight[0].view(-1, spec.in_features, block // 2)
        width = max(TILE_WEIGHTS // spec.out_features // spec.group_size, 1) * spec.group_size
        result = gradient.new_empty(*gradient.shape[:-1], spec.in_features)
        for start in range(0, spec.in_features, width):
            stop = min(start + width, spec.in_features)
            groups = slice(start // spec.group_size, stop // spec.group_size)
            codes = _unpack(packed[:, start:stop].reshape(spec.out_features, -1))
            tile = _to_numbers(
                codes,
                operands.scales[groups],
                None if zeros is None else zeros[groups],
                spec.group_size,
                gradient.dtype,
            )
            result[..., start:stop] = gradient @ tile.t()
        return self._stored_order(result, operands, dim=-1)

    def error_bound(self, spec: LinearSpec) -> float:
        """Scale and zero are rounded to bf16, and their difference can be smaller than both."""
        unit = torch.finfo(spec.dtype).eps / 2
        cancellation = 1 if spec.symmetric else 2 * MIDDLE_CODE
        sums = torch.finfo(torch.float32).eps * spec.in_features
        return (2 + 2 * cancellation) * unit + sums

    def _apply_dense(self, rows: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Dequantize one tile of output channels at a time and multiply by it."""
        block = _block_rows()
        width = max(TILE_WEIGHTS // spec.in_features // block, 1) * block
        result = rows.new_empty(rows.shape[0], spec.out_features)
        for start in range(0, spec.out_features, width):
            stop = min(start + width, spec.out_features)
            weight = self._dequantize_sorted(operands, spec, rows.dtype, start, stop)
            result[:, start:stop] = functional.linear(rows, weight.t())
        return result

    def _dequantize_sorted(
        self, operands: Operands, spec: LinearSpec, dtype: torch.dtype, start: int, stop: int
    ) -> Tensor:
        """Dequantize output channels start..stop to [in, stop - start], columns in packed order."""
        zeros = None
        if not spec.symmetric:
            zeros = unpack_zeros(operands.qzeros, spec.bits, spec.zero_offset)[start:stop].t()
        codes = _unpack(operands.weight[0][start:stop])
        return _to_numbers(codes, operands.scales[:, start:stop], zeros, spec.group_size, dtype)

    def _stored_order(self, columns: Tensor, operands: Operands, *, dim: int) -> Tensor:
        """Undo the sorting of act-order columns."""
        if len(operands.weight) < 3:
            return columns
        return columns.index_select(dim, torch.argsort(operands.weight[2]))


def _to_numbers(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, dtype: torch.dtype
) -> Tensor:
    """Dequantize codes [in, out] with scales and zeros [groups, out] to the weight [in, out]."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    grouped = codes.view(-1, group_size, codes.shape[1]).to(wide)
    if zeros is None:
        grouped.sub_(MIDDLE_CODE)
    else:
        # Contiguous: otherwise the subtraction takes ten times as long.
        grouped.sub_(zeros.to(wide).contiguous()[:, None])
    grouped.mul_(scales[:, None].to(wide))
    return grouped.view(codes.shape).to(dtype)


def _pack(codes: Tensor) -> Tensor:
    """Pack codes [out, in] into torch's layout; the op's second argument matters only on GPUs."""
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(
        codes.to(torch.int32).contiguous(), 1
    )
    return packed


def _unpack(packed: Tensor) -> Tensor:
    """Unpack torch's layout into uint8 codes [in, out]."""
    block, halves = _find_layout()[0]
    return _unpack_as(packed, block, halves)


def _unpack_as(packed: Tensor, block: int, halves: bool) -> Tensor:
    out_features, row_bytes = packed.shape
    in_features = 2 * row_bytes
    low_high = packed.view(out_features // block, in_features, block // 2)
    # Transpose while packed, so that the rows of the result are written in order.
    low_high = low_high.transpose(0, 1)
    codes = packed.new_empty(in_features, out_features // block, block)
    if halves:
        codes[..., : block // 2] = low_high & 15
        codes[..., block // 2 :] = low_high >> 4
    else:
        codes[..., 0::2] = low_high & 15
        codes[..., 1::2] = low_high >> 4
    return codes.view(in_features, out_features)


def _block_rows() -> int:
    return _find_layout()[0][0]


@functools.cache
def _find_layout() -> tuple[tuple[int, bool], str | None]:
    """Detect (rows per block, whether a byte pairs the halves of a block) by a round trip.

    The second item is why the op cannot be used; None if it can.
    """
    unknown = (64, True)
    if not hasattr(torch.ops.aten, "_weight_int4pack_mm_for_cpu"):
        return unknown, f"torch {torch.__version__} has no _weight_int4pack_mm_for_cpu"
    generator = torch.Generator("cpu").manual_seed(0)
    shape = (128, 2 * PROBE_COLUMNS)
    codes = torch.randint(0, 16, shape, generator=generator, device="cpu")
    try:
        packed = _pack(codes)
    except RuntimeError as error:
        return unknown, f"torch cannot pack: {first_line(error)}"
    for block in (64, 32, 16):
        for halves in (True, False):
            if torch.equal(_unpack_as(packed, block, halves).t(), codes.to(torch.uint8)):
                return (block, halves), None
    return unknown, f"torch {torch.__version__} packs int4 in an unknown layout"
