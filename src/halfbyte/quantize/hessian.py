"""Sum Hessians over layer inputs and factor them for the solver.

For one linear with weight W and inputs x, the squared output error of a rounded weight W - E is
tr(E H Eᵀ) with H the mean of x xᵀ. The solver needs H only through its upper factor R, H = R Rᵀ:
R[k, k]² is the loss of a unit error in column k after all later columns have compensated for it.

Source:
    Frantar et al. 2023, "GPTQ", https://arxiv.org/abs/2210.17323. The form used here needs no
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
"""A column whose mean square is at most this fraction of the largest counts as without signal."""
GRAM_TILE = 256
"""Columns per tile of XᵀX; only tiles on and left of the diagonal are computed."""
DEVICE_TILE = 2048
"""The same on a GPU, which needs larger products to be efficient."""
MAX_DAMPING = 1.0
EIGENVALUE_FLOOR = 1e-6


class HessianAccumulator:
    """Sums x xᵀ over calibration tokens, tile by tile, into fp32."""

    def __init__(self, in_features: int, device: torch.device, *, checked: bool = True) -> None:
        """Start with a sum of zero.

        Args:
            in_features: Width of the inputs.
            device: Where to sum.
            checked: Whether every batch is checked for NaN and infinity before it is added. On a
                GPU each check waits for the batch; without them, use :attr:`is_finite` at the end.
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
        """Whether the sum holds no NaN or infinity; any in a batch reaches the diagonal."""
        return bool(torch.isfinite(self._sum.diagonal()).all())

    def update(self, inputs: Tensor, sqrt_weights: Tensor | None = None) -> bool:
        """Add a batch of inputs [..., in]; a batch with non-finite values is counted, not added.

        Args:
            inputs: The batch.
            sqrt_weights: Square roots of the token weights, [tokens]; None: all equal.

        Returns:
            Whether it was added.
        """
        rows = inputs.reshape(-1, inputs.shape[-1])
        if rows.shape[0] == 0:
            return False
        # A sum takes one pass without a copy, and NaN and infinity cannot cancel in it.
        if self._checked and not math.isfinite(float(rows.sum(dtype=torch.float32))):
            self.dropped_tokens += rows.shape[0]
            return False
        if sqrt_weights is not None:
            rows = rows * sqrt_weights[:, None].to(rows.dtype)
        if rows.dtype == torch.bfloat16 and rows.device.type == "cpu" and sums_bf16_in_fp32():
            has_estimate = self.num_tokens >= rows.shape[0]
            ratio = rows.shape[0] / self.num_tokens if has_estimate else None
            add_bf16_gram(self._sum, rows, ratio)
        else:
            add_gram(self._sum, rows, self._tile)
        self.num_tokens += rows.shape[0]
        return True

    def total(self) -> Tensor:
        """Return the complete symmetric sum over tokens: [in, in], valid until the next batch."""
        for start, end in _tiles(self.in_features, self._tile):
            self._sum[:start, start:end] = self._sum[start:end, :start].t()
            tile = self._sum[start:end, start:end]
            tile.copy_(tile.tril() + tile.tril(-1).t())
        return self._sum


def add_gram(total: Tensor, rows: Tensor, tile: int = GRAM_TILE) -> None:
    """Add rowsᵀ rows to the lower tiles of a matrix, summed in fp32.

    A GPU's tensor cores multiply 16-bit numbers exactly and sum in fp32, so there the rows keep
    their dtype; elsewhere they are cast to fp32 first.

    Args:
        total: fp32 [in, in]; entries right of the diagonal tiles are unchanged.
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
    """Add rowsᵀ rows to the lower tiles of a matrix, on CPU units that multiply bf16.

    Such units sum in fp32 but return the sum in bf16. To keep precision, an estimate of the result
    is subtracted inside the product, so that only the difference is rounded to bf16. If the
    estimate is the scaled sum so far, the error is 1/500 of the amount by which batches of text
    differ from each other, and so 1/500 of the sampling noise of any Hessian. Without a sum so far,
    a first product is the estimate, and the relative error is two successive roundings, 2⁻¹⁸.

    Args:
        total: fp32 [in, in]; entries right of the diagonal tiles are unchanged.
        rows: bf16 [tokens, in].
        ratio: Tokens of this batch over tokens of the sum so far; None: use no estimate from it.
    """
    for start, end in _tiles(rows.shape[1], GRAM_TILE):
        left, right, tile = rows[:, start:end].t(), rows[:, :end], total[start:end, :end]
        estimate = left @ right if ratio is None else (tile * ratio).bfloat16()
        difference = torch.addmm(estimate, left, right, beta=-1)
        tile += estimate
        tile += difference


def _tiles(width: int, max_size: int) -> Iterator[tuple[int, int]]:
    """Split columns into equal tiles; yields start and end of each."""
    size = -(-width // -(-width // max_size))
    for start in range(0, width, size):
        yield start, min(start + size, width)


def shrink_to_pool(
    total: Tensor, num_tokens: int, pooled: Tensor, pooled_tokens: int
) -> tuple[Tensor, float]:
    """Shrink the Hessian of an expert with few tokens towards that of all experts of its stage.

    Args:
        total: Sum over the expert's tokens, [in, in].
        num_tokens: Number of those tokens.
        pooled: Sum over the tokens of all experts.
        pooled_tokens: Number of those tokens.

    Returns:
        The mean Hessian, and the weight of the pool in it, 0 to 1.
    """
    prior = 4 * total.shape[0]
    mixed = total + pooled * (prior / max(pooled_tokens, 1))
    return mixed / (num_tokens + prior), prior / (num_tokens + prior)


def shrink_to_diagonal(hessian: Tensor, share: float) -> None:
    """Shrink a Hessian towards its diagonal, in place: scale off-diagonal entries by 1 - share.

    Which inputs are large hardly depends on the text; how they correlate does. The solver uses the
    correlations to let one column compensate for another's error, and the more it relies on those
    of the calibration text, the worse the result on other text. At 1 there is no compensation:
    every column is rounded to the nearest code.

    Args:
        hessian: fp32 [in, in].
        share: 0 to 1.

    Source:
        Shrinkage of a covariance towards its diagonal: Schäfer and Strimmer 2005,
        https://doi.org/10.2202/1544-6115.1175, target D. They compute the share from the samples,
        to correct for sampling noise; here it is a setting, to correct for other kinds of text.
    """
    if share == 0:
        return
    diagonal = hessian.diagonal().clone()
    hessian.mul_(1 - share).diagonal().copy_(diagonal)


@dataclass(frozen=True, slots=True, kw_only=True)
class Factor:
    """A Hessian, damped and factored for the solver."""

    order: Tensor
    """int64 [in]: the column that is rounded k-th."""
    upper: Tensor
    """fp32 [in, in], upper triangular, in rounding order: H + damping = upper @ upperᵀ."""
    damping: float
    """Damping that was used, as a fraction of the mean diagonal."""
    added: float | None
    """The same in absolute terms: ``upper @ upper.T`` exceeds H by this on its diagonal. None: it
    is the factor of another matrix, because columns were dead or H could not be factored."""
    notes: tuple[str, ...]
    """One note per fallback that was used."""

    @property
    def curvature(self) -> Tensor:
        """Loss of a unit error per column after feedback: [in], in stored order."""
        curvature = torch.empty_like(self.upper[0])
        curvature[self.order] = self.upper.diagonal().square()
        return curvature


def factorize(hessian: Tensor, *, damping: float, act_order: bool) -> Factor:
    """Order, damp and factor a Hessian, with fallbacks that are noted.

    Args:
        hessian: Mean of x xᵀ, [in, in], fp32.
        damping: Added to the diagonal, as a fraction of its mean.
        act_order: Round columns by decreasing diagonal instead of in stored order.

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
        notes.append("no input signal: every column rounded to nearest")
    elif bool(dead.any()):
        # Their weights are kept and rounded normally: other text may use these columns.
        hessian[dead] = 0
        hessian[:, dead] = 0
        diagonal[dead] = diagonal[~dead].mean()
        notes.append(f"{int(dead.sum())} input columns carried no signal")
    order = torch.arange(hessian.shape[0], device=hessian.device)
    if act_order:
        order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        hessian = hessian[order][:, order]
    upper, used, added, fallbacks = _factor(hessian, damping)
    return Factor(
        order=order,
        upper=upper,
        damping=used,
        added=None if notes else added,
        notes=(*notes, *fallbacks),
    )


def _factor(hessian: Tensor, damping: float) -> tuple[Tensor, float, float | None, list[str]]:
    """Factor a Hessian by Cholesky; returns what :class:`Factor` holds, without the order.

    Fallbacks, in order: more damping, fp64, raised eigenvalues, the diagonal alone.
    """
    mean = float(hessian.diagonal().mean())
    level = damping
    while level <= MAX_DAMPING:
        upper = _upper_cholesky(hessian, level * mean)
        if upper is not None:
            notes = [f"damping raised from {damping:g} to {level:g}"] if level > damping else []
            return upper, level, level * mean, notes
        level *= 10
    double = hessian.double()
    upper = _upper_cholesky(double, damping * mean)
    if upper is not None:
        return upper.float(), damping, damping * mean, ["factored in double precision"]
    if bool(torch.isfinite(double).all()):
        values, vectors = torch.linalg.eigh((double + double.t()) / 2)
        floor = EIGENVALUE_FLOOR * float(values.max()) + damping * mean
        raised = (vectors * values.clamp(min=floor)) @ vectors.t()
        upper = _upper_cholesky(raised, 0.0)
        if upper is not None:
            return upper.float(), damping, None, ["small and negative eigenvalues raised"]
    roots = hessian.diagonal().nan_to_num(mean).clamp(min=mean * DEAD_RATIO).sqrt()
    return torch.diag(roots), damping, None, ["could not be factored: weighted round-to-nearest"]


def _upper_cholesky(matrix: Tensor, damping: float) -> Tensor | None:
    """Return the upper triangular R with R Rᵀ = matrix + damping; None if not positive definite."""
    flipped = matrix.flip(0, 1)
    flipped.diagonal().add_(damping)
    lower, info = torch.linalg.cholesky_ex(flipped)
    del flipped
    if int(info) != 0 or not bool(torch.isfinite(lower.diagonal()).all()):
        return None
    upper: Tensor = lower.flip(0, 1)
    return upper
