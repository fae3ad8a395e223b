"""Search the scale and zero of every group, before the sweep.

The search minimizes the squared rounding error of each group, weighted with the curvature of its
columns. Scales are evaluated as they are stored, in fp16.

Symmetric scales may be negative: with the zero at the middle code, codes reach one step further
down than up, and the sign of the scale decides which end of the group gets that step.

Source:
    Weighted scale search: Lin et al. 2025, "NeUQI"; negative scales: AutoRound's full-range
    symmetric grid (``auto_round/data_type/int.py``).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from halfbyte.errors import first_line
from halfbyte.kernels.gpu_device import on_device
from halfbyte.kernels.triton_linear import find_triton_obstacle
from halfbyte.quant_config import PER_CHANNEL

SMALLEST_SCALE = 1e-5
COARSE_STEPS = 16
FINE_STEPS = 8
LOW, HIGH = 0.25, 1.05
"""Range of the scales tried, as fractions of the scale that spans the whole group."""
CHUNK_WEIGHTS = 1 << 20
"""Weights searched together: few enough for the cache, many enough to amortize a torch call."""
DEVICE_CHUNK_WEIGHTS = 1 << 25
"""The same on a GPU, where a call costs as much as a million weights."""
PROGRAM_ROWS = 16
"""Output rows of one Triton program."""
MAX_GROUP_SIZE = 256
"""The Triton kernel holds groups in registers; larger ones are searched with torch operations."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """The values that weights are rounded to: ``scale * (code - zero)``, codes 0..2**bits-1."""

    bits: int
    scales: Tensor
    """fp32 [out, groups]; every value is exact in fp16."""
    zeros: Tensor
    """fp32 [out, groups], integers."""
    g_idx: Tensor
    """int64 [in]: the group of each column."""

    def rows(self, chosen: Tensor | slice) -> Grid:
        """Return the grid of some output rows."""
        return Grid(
            bits=self.bits,
            scales=self.scales[chosen],
            zeros=self.zeros[chosen],
            g_idx=self.g_idx,
        )

    def column_scales(self) -> Tensor:
        """Return the scale of every weight: [out, in]."""
        return self.scales[:, self.g_idx]

    def column_zeros(self) -> Tensor:
        """Return the zero of every weight: [out, in]."""
        return self.zeros[:, self.g_idx]

    def round_to_nearest(self, weight: Tensor) -> Tensor:
        """Return the nearest code of every weight: uint8 [out, in]."""
        codes = torch.round(weight / self.column_scales()).add_(self.column_zeros())
        return codes.clamp_(0, 2**self.bits - 1).to(torch.uint8)

    def dequantize(self, codes: Tensor) -> Tensor:
        """Return the weights of codes: fp32 [out, in]."""
        return (codes.float() - self.column_zeros()).mul_(self.column_scales())


def assign_groups(in_features: int, group_size: int, order: Tensor | None = None) -> Tensor:
    """Assign every column to a group.

    Args:
        in_features: Number of columns.
        group_size: Columns per group, -1 for one group; the last group may be shorter.
        order: Order of the columns in which to form groups (``desc_act``); None: stored order.

    Returns:
        int64 [in].
    """
    size = in_features if group_size == PER_CHANNEL else group_size
    device = None if order is None else order.device
    groups = torch.arange(in_features, device=device) // size
    if order is None:
        return groups
    g_idx = torch.empty_like(groups)
    g_idx[order] = groups
    return g_idx


def min_max_grid(weight: Tensor, g_idx: Tensor, *, bits: int, symmetric: bool) -> Grid:
    """Compute the min-max grid, which spans each group from its smallest to its largest weight.

    Args:
        weight: [out, in].
        g_idx: Group of each column.
        bits: Bits per code.
        symmetric: Fix the zero at the middle code.

    Returns:
        The grid.
    """
    grouped, _ = _group_columns(weight, torch.ones_like(weight[0]), g_idx)
    top = 2**bits - 1
    if symmetric:
        scales = round_to_stored(grouped.abs().amax(-1) / (top // 2))
        zeros = torch.full_like(scales, 2 ** (bits - 1))
    else:
        low, high = _range(grouped)
        scales = round_to_stored((high - low) / top)
        zeros = torch.round(-low / scales).clamp_(1, top)
    return Grid(bits=bits, scales=scales, zeros=zeros, g_idx=g_idx)


def search_grid(
    weight: Tensor, curvature: Tensor, g_idx: Tensor, *, bits: int, symmetric: bool
) -> Grid:
    """Search the scale and zero of every group.

    Args:
        weight: The weights to be rounded, fp32 [out, in].
        curvature: Loss of a unit rounding error per column, [in].
        g_idx: Group of each column, int64 [in].
        bits: Bits per code.
        symmetric: Fix the zero at the middle code and allow negative scales. Otherwise zeros are in
            1..2**bits-1, because the v1 dialect stores zero - 1.

    Returns:
        The grid.
    """
    grouped, weights = _group_columns(weight, curvature, g_idx)
    rows, groups, size = grouped.shape
    if _uses_kernel(grouped, symmetric):
        scales, zeros = _run_kernel(grouped, weights, bits, symmetric)
        return Grid(bits=bits, scales=scales, zeros=zeros, g_idx=g_idx)
    chunk = CHUNK_WEIGHTS if weight.device.type == "cpu" else DEVICE_CHUNK_WEIGHTS
    step = max(1, chunk // (groups * size))
    scales = torch.empty(rows, groups, device=weight.device)
    zeros = torch.full_like(scales, 2 ** (bits - 1))
    for start in range(0, rows, step):
        part = grouped[start : start + step]
        if symmetric:
            scales[start : start + step] = _search_symmetric(part, weights, bits)
        else:
            best = _search_asymmetric(part, weights, bits)
            scales[start : start + step], zeros[start : start + step] = best
    return Grid(bits=bits, scales=scales, zeros=zeros, g_idx=g_idx)


def _search_symmetric(grouped: Tensor, weights: Tensor, bits: int) -> Tensor:
    half = 2 ** (bits - 1)
    span = grouped.abs().amax(-1) / half
    search = _Search(grouped, weights, -half, half - 1, span)
    for share in _signed_shares(bits):
        search.try_scales(span * share, None, share)
    center = search.best_share.clone()
    for offset in _fine_offsets():
        search.try_scales(span * (center + offset), None, center + offset)
    return search.best_scales


def _search_asymmetric(grouped: Tensor, weights: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    top = 2**bits - 1
    low, high = _range(grouped)
    span = (high - low) / top
    exact = (-low / span.clamp(min=SMALLEST_SCALE)).clamp(0, top)
    zeros = [z.clamp(1, top) for z in (exact.floor(), exact.ceil())]
    search = _Search(grouped, weights, 0, top, span, zeros[0])
    for share in (*_coarse_shares(), 1.0):
        for zero in zeros:
            search.try_scales(span * share, zero, share)
    center = search.best_share.clone()
    for offset in _fine_offsets():
        for zero in zeros:
            search.try_scales(span * (center + offset), zero, center + offset)
    return search.best_scales, search.best_zeros


class _Search:
    """Keeps the best grid tried so far of every group."""

    def __init__(
        self,
        grouped: Tensor,
        weights: Tensor,
        lowest: int,
        highest: int,
        scales: Tensor,
        zeros: Tensor | None = None,
    ) -> None:
        self.grouped, self.weights = grouped, weights
        self.lowest, self.highest = lowest, highest
        self.best_loss = torch.full_like(scales, float("inf"))
        # For groups whose every loss overflows.
        self.best_scales = round_to_stored(scales)
        self.best_zeros = torch.zeros_like(scales) if zeros is None else zeros
        self.best_share = torch.zeros_like(scales)

    def try_scales(self, scales: Tensor, zeros: Tensor | None, share: Tensor | float) -> None:
        scales = round_to_stored(scales)
        column = scales.unsqueeze(-1)
        rounded = torch.div(self.grouped, column).round_()
        if zeros is None:
            rounded.clamp_(self.lowest, self.highest)
        else:
            # The code, nearest + zero, must stay in range.
            shift = zeros.unsqueeze(-1)
            rounded.add_(shift).clamp_(self.lowest, self.highest).sub_(shift)
        error = torch.addcmul(self.grouped, rounded, column, value=-1)
        loss = error.square_().mul_(self.weights).sum(-1)
        better = loss < self.best_loss
        self.best_loss = torch.where(better, loss, self.best_loss)
        self.best_scales = torch.where(better, scales, self.best_scales)
        if zeros is not None:
            self.best_zeros = torch.where(better, zeros, self.best_zeros)
        shares = torch.as_tensor(share, device=loss.device, dtype=loss.dtype)
        self.best_share = torch.where(better, shares, self.best_share)


def _group_columns(weight: Tensor, curvature: Tensor, g_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Gather columns by group: weights [out, groups, size] and curvature [groups, size].

    Shorter groups are padded with weights and curvatures of 0.
    """
    order = torch.argsort(g_idx, stable=True)
    sizes = torch.bincount(g_idx)
    groups, size = sizes.numel(), int(sizes.max())
    positions = g_idx[order] * size + _rank_in_group(g_idx[order], sizes)
    grouped = weight.new_zeros(weight.shape[0], groups * size, dtype=torch.float32)
    grouped[:, positions] = weight[:, order].float()
    weights = torch.zeros(groups * size, device=weight.device)
    weights[positions] = curvature[order].float()
    return grouped.reshape(-1, groups, size), weights.reshape(groups, size)


def _rank_in_group(sorted_groups: Tensor, sizes: Tensor) -> Tensor:
    starts = torch.cumsum(sizes, 0) - sizes
    return torch.arange(sorted_groups.numel(), device=sizes.device) - starts[sorted_groups]


def _range(grouped: Tensor) -> tuple[Tensor, Tensor]:
    return grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)


def sum_groups(values: Tensor, g_idx: Tensor, num_groups: int) -> Tensor:
    """Sum columns by group.

    Args:
        values: [out, in].
        g_idx: Group of each column, [in].
        num_groups: How many there are.

    Returns:
        [out, groups].
    """
    width = values.shape[1]
    size = -(-width // num_groups)
    if torch.equal(g_idx, torch.arange(width, device=g_idx.device) // size):
        padded = functional.pad(values, (0, num_groups * size - width))
        return padded.reshape(-1, num_groups, size).sum(-1)
    return values.new_zeros(values.shape[0], num_groups).index_add_(1, g_idx, values)


def round_to_stored(scales: Tensor) -> Tensor:
    """Round scales to fp16, at least SMALLEST_SCALE in absolute value; scales of 0 become 1."""
    sign = torch.where(scales < 0, -1.0, 1.0)
    size = scales.abs().clamp(min=SMALLEST_SCALE, max=torch.finfo(torch.float16).max)
    size = torch.where(scales == 0, torch.ones_like(size), size)
    return (sign * size).half().float()


def _signed_shares(bits: int) -> list[float]:
    half = 2 ** (bits - 1)
    # The min-max grid, which reaches the largest weight of either sign, is always a candidate.
    shares = (*_coarse_shares(), 1.0, half / (half - 1))
    return [sign * share for sign in (1.0, -1.0) for share in shares]


def _coarse_shares() -> list[float]:
    step = (HIGH - LOW) / (COARSE_STEPS - 1)
    return [LOW + i * step for i in range(COARSE_STEPS)]


def _fine_offsets() -> list[float]:
    step = (HIGH - LOW) / (COARSE_STEPS - 1)
    half = FINE_STEPS // 2
    return [step * i / (half + 1) for i in range(-half, half + 1) if i]


def _uses_kernel(grouped: Tensor, symmetric: bool) -> bool:
    return (
        grouped.device.type != "cpu"
        and grouped.shape[-1] <= MAX_GROUP_SIZE
        and find_kernel_obstacle(grouped.device, symmetric) is None
    )


@functools.cache
def find_kernel_obstacle(device: torch.device, symmetric: bool) -> str | None:
    """Compare the Triton kernel on a device with the plain search, once per process.

    Args:
        device: The device.
        symmetric: Whether grids are symmetric.

    Returns:
        Why the kernel is not used there; None: it runs and its grids are as good.
    """
    obstacle = find_triton_obstacle()
    if obstacle is not None:
        return obstacle
    generator = torch.Generator().manual_seed(0)
    # Typical sizes of a model: Triton compiles a separate kernel for others.
    rows, groups, size = 16, 16, 128
    weight = torch.randn(rows, groups * size, generator=generator)
    curvature = torch.rand(groups * size, generator=generator) + 0.1
    g_idx = assign_groups(groups * size, size)
    grouped, weights = _group_columns(weight, curvature, g_idx)
    expected = search_grid(weight, curvature, g_idx, bits=4, symmetric=symmetric)
    try:
        scales, zeros = _run_kernel(grouped.to(device), weights.to(device), 4, symmetric)
    except Exception as problem:  # noqa: BLE001 - a run must not fail because Triton does
        return f"{type(problem).__name__}: {first_line(problem)}"
    found = Grid(bits=4, scales=scales.cpu(), zeros=zeros.cpu(), g_idx=g_idx)
    losses = []
    for grid in (found, expected):
        error = weight - grid.dequantize(grid.round_to_nearest(weight))
        losses.append(float((error.square() * curvature).sum()))
    if losses[0] <= 1.0001 * losses[1]:
        return None
    return f"the loss of its grids is {losses[0] / losses[1]:.3f} times that of the plain search"


def _run_kernel(
    grouped: Tensor, weights: Tensor, bits: int, symmetric: bool
) -> tuple[Tensor, Tensor]:
    from halfbyte.quantize.grid_kernel import grid_kernel

    rows, groups, size = grouped.shape
    assert grouped.is_contiguous()
    shares = _signed_shares(bits) if symmetric else [*_coarse_shares(), 1.0]
    offsets = _fine_offsets()
    scales = torch.empty(rows, groups, device=grouped.device)
    zeros = torch.empty_like(scales)
    with on_device(grouped.device):
        grid_kernel[(groups, -(-rows // PROGRAM_ROWS))](
            grouped,
            weights.contiguous(),
            torch.tensor(shares, device=grouped.device),
            torch.tensor(offsets, device=grouped.device),
            scales,
            zeros,
            rows,
            groups,
            size,
            COARSE=len(shares),
            FINE=len(offsets),
            TOP=2**bits - 1,
            SYMMETRIC=symmetric,
            SMALLEST=SMALLEST_SCALE,
            LARGEST=torch.finfo(torch.float16).max,
            ROWS=PROGRAM_ROWS,
            SIZE=1 << (size - 1).bit_length(),
            num_warps=4,
        )
    return scales, zeros
