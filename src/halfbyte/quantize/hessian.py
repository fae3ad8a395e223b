"""Layer inputs -> Hessian -> its triangular factor.

For one linear with weight W and inputs x, the squared output error of a rounded weight W - E is
tr(E H Eᵀ) with H the mean of x xᵀ. The solver needs H only through its upper factor R, H = R Rᵀ:
R[k, k]² is the loss of rounding column k by one unit when all later columns may still answer.

Source:
    Frantar et al. 2023, "GPTQ", https://arxiv.org/abs/2210.17323. The factor form, which needs no
    inverse: R⁻¹ is the Cholesky factor that the paper computes from H⁻¹.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.machine.arithmetic import find_fp32_sum_obstacle, sums_bf16_in_fp32

DEAD_RATIO = 1e-10
"""A column whose mean square is below this fraction of the largest never carried a signal."""
GRAM_TILE = 256
"""Columns per tile of XᵀX; only tiles on and left of the diagonal are computed."""
DEVICE_TILE = 2048
"""The same on a GPU, whose products want to be large."""
MAX_DAMPING = 1.0
EIGENVALUE_FLOOR = 1e-6


class HessianAccumulator:
    """Sums x xᵀ over calibration tokens, tile by tile, into fp32."""

    def __init__(self, in_features: int, device: torch.device, *, checked: bool = True) -> None:
        """Start at zero.

        Args:
            in_features: Width of the inputs.
            device: Where to sum.
            checked: Whether every batch is looked at before it is added. On a GPU that means to
                wait for it each time; without, :attr:`is_finite` tells in the end.
        """
        self.in_features = in_features
        self.num_tokens = 0
        self.dropped_tokens = 0
        """Tokens of batches that held a NaN or an infinity."""
        self._checked = checked
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self._tile = GRAM_TILE if device.type == "cpu" else DEVICE_TILE

    @property
    def is_finite(self) -> bool:
        """Whether the sum holds no NaN or infinity; one in a batch shows on the diagonal."""
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def update(self, inputs: Tensor, roots: Tensor | None = None) -> bool:
        """Add a batch of inputs [..., in]; one with a non-finite number is counted, not added.

        Args:
            inputs: The batch.
            roots: Square roots of what its tokens count, [tokens]; None: all alike.

        Returns:
            Whether it was added.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if rows.shape[0] == 0:
            return False
        # A sum is one pass without a copy, and no NaN or infinity in it can cancel.
        if self._checked and not math.isfinite(float(rows.sum(dtype=torch.float32))):
            self.dropped_tokens += rows.shape[0]
            return False
        if roots is not None:
            rows = rows * roots[:, None].to(rows.dtype)
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and sums_bf16_in_fp32():
            known = self.num_tokens >= rows.shape[0]
            ratio = rows.shape[0] / self.num_tokens if known else None
            add_bf16_gram(self._sum, rows, ratio)
        else:
            add_gram(self._sum, rows, self._tile)
        self.num_tokens += rows.shape[0]
        return True

    def total(self) -> Tensor:
        """Give the sum over tokens, both halves filled in: [in, in], valid until the next batch."""
        for start, end in _tiles(self.in_features, self._tile):
            self._sum[:start, start:end] = self._sum[start:end, :start].t()
            tile = self._sum[start:end, start:end]
            tile.copy_(tile.tril() + tile.tril(-1).t())
        return self._sum


def add_gram(total: Tensor, rows: Tensor, tile: int = GRAM_TILE) -> None:
    """Add rowsᵀ rows to the lower tiles of a matrix, summed in fp32.

    A GPU's tensor cores multiply 16-bit numbers exactly and sum in fp32, so there the rows stay as
    they are; elsewhere they become fp32 first.

    Args:
        total: fp32 [in, in]; entries right of the diagonal tiles are left as they are.
        rows: [tokens, in].
        tile: Columns per tile.
    """
    exact = rows.dtype != torch.float32 and find_fp32_sum_obstacle(rows.device, rows.dtype) is None
    x = rows if exact else rows.float()
    for start, end in _tiles(rows.shape[1], tile):
        left, right = x[:, start:end].t(), x[:, :end]
        product = torch.mm(left, right, out_dtype=torch.float32) if exact else left @ right
        total[start:end, :end] += product


def add_bf16_gram(total: Tensor, rows: Tensor, ratio: float | None) -> None:
    """Add rowsᵀ rows to the lower tiles of a matrix, on units that multiply in bf16.

    Such units sum in fp32 but give the sum back in bf16. So they are made to subtract what is
    expected before they round: the error is then a bf16 rounding of the *surprise*. Where the sum
    so far is the expectation, that is 1/500 of the amount by which batches of text differ from each
    other, and so 1/500 of the noise that is in any Hessian of sampled text. Where nothing is known
    yet, a first product is the expectation, and the error is a rounding of a rounding, 2⁻¹⁸.

    Args:
        total: fp32 [in, in]; entries right of the diagonal tiles are left as they are.
        rows: bf16 [tokens, in].
        ratio: Tokens of this batch over tokens of the sum so far; None: expect nothing.
    """
    for start, end in _tiles(rows.shape[1], GRAM_TILE):
        left, right, tile = rows[:, start:end].t(), rows[:, :end], total[start:end, :end]
        expected = left @ right if ratio is None else (tile * ratio).bfloat16()
        surprise = torch.addmm(expected, left, right, beta=-1)
        tile += expected
        tile += surprise


def _tiles(width: int, largest: int) -> Iterator[tuple[int, int]]:
    """Cut columns into equal tiles."""
    size = -(-width // -(-width // largest))
    for start in range(0, width, size):
        yield start, min(start + size, width)


def shrink_to_pool(
    total: Tensor, num_tokens: int, pooled: Tensor, pooled_tokens: int
) -> tuple[Tensor, float]:
    """Mix the Hessian of a rarely routed expert with that of all experts of its stage.

    Args:
        total: Sum over the expert's own tokens, [in, in].
        num_tokens: How many those are.
        pooled: Sum over the tokens of all experts.
        pooled_tokens: How many those are.

    Returns:
        The mean Hessian, and the share of the pool in it, 0 to 1.
    """
    prior = 4 * total.shape[0]
    mixed = total + pooled * (prior / max(pooled_tokens, 1))
    return mixed / (num_tokens + prior), prior / (num_tokens + prior)


def shrink_to_diagonal(hessian: Tensor, share: float) -> None:
    """Take a share off all products of different inputs, in place.

    Which inputs are large hardly depends on the text; which are large together does. The solver
    lets one column answer for another's error by what is large together, and the more it trusts
    that, the worse is what it makes for other text. At 1, nothing answers: every column is rounded
    to the nearest code.

    Args:
        hessian: fp32 [in, in].
        share: 0 to 1.

    Source:
        Shrinkage of a covariance towards its diagonal: Schäfer and Strimmer 2005,
        https://doi.org/10.2202/1544-6115.1175, target D. There the share answers for the noise of
        few samples; here for text of other kinds, so it is not computed from the samples.
    """
    if share == 0:
        return
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().copy_(diagonal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A Hessian ready for the solver."""

    order: Tensor
    """int64 [in]: the column that is rounded k-th."""
    upper: Tensor
    """fp32 [in, in], upper triangular, in rounding order: H + damping = upper @ upperᵀ."""
    damping: float
    """Fraction of the mean diagonal that was added in the end."""
    added: float
    """What that came to: ``upper @ upper.T`` exceeds the Hessian by this on its diagonal."""
    notes: tuple[str, ...]
    """Every departure from the plain computation."""

    @property
    def curvature(self) -> Tensor:
        """Loss of a unit rounding error per column, after feedback: [in], in stored order."""
        curvature = torch.empty_like(self.upper[0])
        curvature[self.order] = self.upper.diagonal().square()
        return curvature


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor:
    """Order, damp and factor a Hessian; whatever it takes is noted.

    Args:
        hessian: Mean of x xᵀ, [in, in], fp32.
        damping: Added to the diagonal, as a fraction of its mean.
        act_order: Round columns by falling diagonal instead of in stored order.

    Returns:
        The factor.
    """
    notes: list[str] = []
    diagonal = hessian.diagonal()
    largest = float(diagonal.max())
    dead = diagonal <= DEAD_RATIO * largest
    if largest <= 0 or bool(dead.any()):
        hessian = hessian.clone()
        diagonal = hessian.diagonal()
    if largest <= 0:
        hessian.fill_diagonal_(1.0)
        notes.append("no input signal at all: every column rounded to nearest")
    elif bool(dead.any()):
        # The weights stay and are rounded normally: other inputs may well use these columns.
        hessian[dead] = 0
        hessian[:, dead] = 0
        diagonal[dead] = diagonal[~dead].mean()
        notes.append(f"{int(dead.sum())} input columns carried no signal")
    order = torch.arange(hessian.shape[0], device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    upper, used, how = _factor(hessian, damping)
    return Factor(
        order=order,
        upper=upper,
        damping=used,
        added=used * float(hessian.diagonal().mean()),
        notes=(*notes, *how),
    )


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, list[str]]:
    """Cholesky; else more damping; else fp64; else lifted eigenvalues; else the diagonal alone."""
    mean = float(hessian.diagonal().mean())
    level = damping
    while level <= MAX_DAMPING:
        upper = _upper_cholesky(hessian, level * mean)
        if upper is not None:
            notes = [f"damping raised from {damping:g} to {level:g}"] if level > damping else []
            return upper, level, notes
        level *= 10
    double = hessian.double()
    upper = _upper_cholesky(double, damping * mean)
    if upper is not None:
        return upper.float(), damping, ["factored in double precision"]
    if bool(torch.isfinite(double).all()):
        values, vectors = torch.linalg.eigh((double + double.t()) / 2)
        floor = EIGENVALUE_FLOOR * float(values.max()) + damping * mean
        lifted = (vectors * values.clamp(min=floor)) @ vectors.t()
        upper = _upper_cholesky(lifted, 0.0)
        if upper is not None:
            return upper.float(), damping, ["negative eigenvalues lifted"]
    roots = hessian.diagonal().nan_to_num(mean).clamp(min=mean * DEAD_RATIO).sqrt()
    return torch.diag(roots), damping, ["could not be factored: weighted round to nearest"]


def _upper_cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """R with R Rᵀ = matrix + damping, R upper triangular; None where that is not positive."""
    turned = matrix.flip(0, 1)
    turned.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(turned)
    del turned
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    upper: Tensor = lower.flip(0, 1)
    return upper
