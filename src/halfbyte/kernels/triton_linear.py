"""The Triton kernels, for every GPU that Triton supports.

Layout: :mod:`halfbyte.kernels.fragments`. Up to ROWS_LIMIT rows of x
:mod:`halfbyte.kernels.triton_kernels` multiplies packed codes; for more rows the weight is
dequantized into a scratch tensor and multiplied by the vendor's library, which is faster than any
kernel that has to unpack codes between its products.
Arithmetic: code - zero is exact, its products with x are summed in fp32 and scaled in fp32 once per
group; one rounding of the result. The dequantized weight is rounded once. Deterministic.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.kernels.contract import LinearSpec, Operands
from halfbyte.kernels.fragments import (
    find_layout_mismatch,
    find_order,
    find_zeros,
    prepare_fragments,
    restore_fragments,
    slice_fragments,
    split_inputs,
)
from halfbyte.kernels.gpu_device import (
    count_processors,
    early_options,
    find_arrivals,
    find_gpu_obstacle,
    is_nvidia,
    make_arrivals,
    name_architecture,
    on_device,
)
from halfbyte.kernels.triton_configs import TritonConfig, choose_config

ROWS_LIMIT = 128
"""Above it the weight is dequantized first; at 128 rows that was 1.3 to 2.5 times as slow."""

GRADIENT_WEIGHTS = 2**24
"""Weights dequantized at a time in the backward pass: 32 MB in 16 bits, still a large product."""

DEVICES = ("cuda", "xpu")
"""torch also calls AMD GPUs ``cuda``."""


class TritonLinear:
    """The Triton kernels behind the common contract."""

    name = "triton"
    repacks = True

    def find_obstacle(self) -> str | None:
        """Return why Triton cannot run here; None if it can."""
        return find_triton_obstacle() or find_gpu_obstacle()

    def find_mismatch(self, spec: LinearSpec) -> str | None:
        """Return why the kernels cannot run a layer; None if they can."""
        if spec.device_type not in DEVICES:
            return f"runs on {' and '.join(DEVICES)}, not on {spec.device_type}"
        return find_layout_mismatch(spec)

    def describe_row_tiers(self, spec: LinearSpec) -> str:
        """Describe which code runs up to how many rows."""
        return f"up to {ROWS_LIMIT} rows Triton, then dequantized first"

    def prepare(self, stored: Operands, spec: LinearSpec) -> tuple[Tensor, ...]:
        """Repack the weight into fragments."""
        make_arrivals(stored.scales.device)
        return prepare_fragments(stored, spec)

    def restore(self, operands: Operands, spec: LinearSpec) -> Tensor:
        """Return ``qweight`` as stored."""
        return restore_fragments(operands, spec)

    def apply(self, x: Tensor, operands: Operands, bias: Tensor | None, spec: LinearSpec) -> Tensor:
        """Multiply by the packed codes, or by the dequantized weight if x has many rows."""
        rows = x.reshape(-1, spec.in_features)
        count = rows.shape[0]
        if count > ROWS_LIMIT:
            result = functional.linear(rows, self.dequantize(operands, spec, x.dtype), bias)
        elif count == 0:
            result = x.new_empty(0, spec.out_features)
        else:
            architecture, processors = name_architecture(x.device), count_processors(x.device)
            config = choose_config(
                architecture, processors, spec.in_features, spec.out_features, count
            )
            result = multiply(rows.contiguous(), operands, bias, spec, config)
        return result.view(*x.shape[:-1], spec.out_features)

    def dequantize(self, operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
        """Return the dequantized weight [out, in]."""
        return dequantize_fragments(operands, spec, dtype)

    def input_gradient(self, gradient: Tensor, operands: Operands, spec: LinearSpec) -> Tensor:
        """Multiply by the dequantized weight, some tiles of input columns at a time."""
        # Slices of columns: each entry is then a single sum, rounded once.
        rows = gradient.reshape(-1, spec.out_features)
        result = gradient.new_empty(rows.shape[0], spec.in_features)
        order = find_order(operands, spec)
        for start, stop in split_inputs(spec, GRADIENT_WEIGHTS):
            part, part_spec = slice_fragments(operands, spec, start, stop)
            product = rows @ self.dequantize(part, part_spec, gradient.dtype)
            if order is None:
                result[:, start:stop] = product
            else:
                result[:, order[start:stop].long()] = product
        return result.view(*gradient.shape[:-1], spec.in_features)

    def error_bound(self, spec: LinearSpec) -> float:
        """One rounding of the result and fp32 sums; with many rows, also one of each weight."""
        unit = torch.finfo(spec.dtype).eps / 2
        sums = torch.finfo(torch.float32).eps * spec.in_features
        return 3 * unit + sums


def multiply(
    rows: Tensor,
    operands: Operands,
    bias: Tensor | None,
    spec: LinearSpec,
    config: TritonConfig,
    *,
    fast: bool | None = None,
) -> Tensor:
    """Multiply by packed codes.

    Args:
        rows: [rows, in], contiguous.
        operands: As returned by ``prepare``.
        bias: [out] or None.
        spec: The layer.
        config: Tile sizes.
        fast: Whether to use NVIDIA's instructions; None: if the device is an NVIDIA GPU.

    Returns:
        [rows, out].
    """
    result = rows.new_empty(rows.shape[0], spec.out_features)
    launch_multiply(rows, operands, bias, result, spec, config, fast=fast)
    return result


def launch_multiply(
    x: Tensor,
    operands: Operands,
    bias: Tensor | None,
    result: Tensor,
    spec: LinearSpec,
    config: TritonConfig,
    *,
    fast: bool | None = None,
    early: bool = False,
    addresses: Tensor | None = None,
    block_experts: Tensor | None = None,
    block_counts: Tensor | None = None,
    sources: Tensor | None = None,
) -> None:
    """Launch the product of packed codes.

    Args:
        x: [rows, in], contiguous.
        operands: As returned by ``prepare``; with ``addresses`` those of any expert.
        bias: [out] or None; with ``addresses`` that of any expert.
        result: [rows, out], is filled.
        spec: The layer.
        config: Tile sizes.
        fast: Whether to use NVIDIA's instructions; None: if the device is an NVIDIA GPU.
        early: Use programmatic dependent launch where the device has it.
        addresses: int64 [experts, 5], addresses of each expert's codes, zeros, scales, order and
            bias; None if all rows have the same weight.
        block_experts: int32 [row blocks], the expert of each block of rows.
        block_counts: int32 [row blocks], how many rows of each block are computed.
        sources: int32 [rows], row of x for each row of the result; None if they are the same.
    """
    from halfbyte.kernels.triton_kernels import multiply_kernel

    count, device = result.shape[0], x.device
    steps = spec.in_features // 64
    grid = (
        -(-spec.out_features // config.block_out),
        config.splits,
        -(-count // config.block_rows),
    )
    zeros, order = find_zeros(operands, spec), find_order(operands, spec)
    workspace = arrivals = None
    if config.splits > 1:
        workspace = x.new_empty(config.splits, count, spec.out_features, dtype=torch.float32)
        arrivals = find_arrivals(device)
    with on_device(device):
        multiply_kernel[grid](
            x,
            operands.weight[0],
            zeros,
            operands.scales,
            order,
            bias,
            addresses,
            block_experts,
            block_counts,
            sources,
            result,
            workspace,
            arrivals,
            count,
            spec.in_features,
            spec.out_features,
            -(-steps // config.splits),
            BITS=spec.bits,
            GROUP_SIZE=spec.group_size,
            HAS_ZEROS=zeros is not None,
            HAS_ORDER=order is not None,
            HAS_BIAS=bias is not None,
            HAS_EXPERTS=addresses is not None,
            HAS_SOURCES=sources is not None,
            FAST=is_nvidia(device) if fast is None else fast,
            BLOCK_OUT=config.block_out,
            BLOCK_ROWS=config.block_rows,
            SPLITS=config.splits,
            STAGES=config.stages,
            num_warps=config.warps,
            num_stages=config.stages,
            **(early_options(device) if early else {"EARLY": False}),
        )


def dequantize_fragments(operands: Operands, spec: LinearSpec, dtype: torch.dtype) -> Tensor:
    """Dequantize a repacked weight to [out, in], each value rounded once to ``dtype``."""
    from halfbyte.kernels.triton_kernels import dequantize_kernel

    codes, scales = operands.weight[0], operands.scales
    shape = (spec.out_features, spec.in_features)
    if dtype == torch.float64:
        # Exact in fp32 for 16-bit scales: code - zero has at most 9 bits with its sign.
        return dequantize_fragments(operands, spec, torch.float32).double()
    result = torch.empty(shape, dtype=dtype, device=codes.device)
    zeros, order = find_zeros(operands, spec), find_order(operands, spec)
    block_out = 64
    with on_device(codes.device):
        dequantize_kernel[(spec.in_features // 64, -(-spec.out_features // block_out))](
            codes,
            zeros,
            scales,
            order,
            result,
            spec.in_features,
            spec.out_features,
            BITS=spec.bits,
            GROUP_SIZE=spec.group_size,
            HAS_ZEROS=zeros is not None,
            HAS_ORDER=order is not None,
            BLOCK_OUT=block_out,
            num_warps=4,
        )
    return result


@functools.cache
def find_triton_obstacle() -> str | None:
    """Return why Triton cannot compile here; None if it can."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton, which comes with torch for GPUs: pip install triton"
    if not any(shutil.which(name) for name in (os.environ.get("CC", "cc"), "gcc", "clang")):
        return "Triton needs a C compiler for its launchers: install gcc or clang"
    return None
