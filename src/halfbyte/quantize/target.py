"""Computes the target of rounding that corrects for the errors of the layers before.

A linear after rounded layers gets inputs x~ where the base model's linear gets x. The weight that
reproduces the base model's outputs W x best, given x~, is not W but

    W* = W + W D H⁻¹,    D = mean of (x - x~) x~ᵀ,    H = mean of x~ x~ᵀ

and the squared error to W x is that of rounding W* plus an error that no weight can remove. The
step from W to W* is scaled by a factor chosen on text that the step was not computed from.

Source:
    The exact minimiser of the "asymmetric calibration" objective: Arai et al. 2025, "Quantization
    Error Propagation" (QEP), https://arxiv.org/abs/2504.09629.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.quantize.hessian import HessianAccumulator, shrink_to_diagonal

CHECK_EVERY = 4
"""One of this many batches is used for checking only."""
MIN_SHARE = 0.05
"""Steps shortened to less than this are skipped, as mostly noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of a linear's inputs over a part of the calibration text."""

    hessian: Tensor
    """Mean of x~ x~ᵀ: fp32 [in, in]."""
    drift: Tensor | None
    """Mean of (x - x~) x~ᵀ, indexed [x - x~, x~]: fp32 [in, in]. None: not measured."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The weight that rounding should approximate."""

    weight: Tensor
    """fp32 [out, in]."""
    share: float
    """Fraction of the step from W to W* that was taken, 0..1."""


class MomentAccumulator:
    """Accumulates second moments of inputs, separately for fitting and checking."""

    def __init__(self, in_features: int, device: torch.device, *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Width of the input.
            device: Device of the sums.
            drift: Whether to accumulate the drift as well, from the base model's inputs.
        """
        self.fit = _Moments(in_features, device, drift=drift)
        self.check = _Moments(in_features, device, drift=drift)

    def update(
        self,
        batch: int,
        inputs: Tensor,
        base_inputs: Tensor | None,
        roots: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            batch: Its index.
            inputs: Inputs of the linear in the quantized model, [..., in].
            base_inputs: The same in the base model; None if not known.
            roots: Square roots of the token weights, [tokens]; None: equal weights.
        """
        half = self.check if batch % CHECK_EVERY == CHECK_EVERY - 1 else self.fit
        half.update(inputs, base_inputs, roots)

    @property
    def num_tokens(self) -> int:
        """Tokens in both parts."""
        return self.fit.hessian.num_tokens + self.check.hessian.num_tokens

    @property
    def dropped_tokens(self) -> int:
        """Tokens of batches that contained a NaN or an infinity."""
        return self.fit.hessian.dropped_tokens + self.check.hessian.dropped_tokens

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.fit.hessian.in_features

    def total(self) -> Tensor:
        """Return the sum of x~ x~ᵀ over all tokens."""
        return self.fit.hessian.total() + self.check.hessian.total()

    def moments(self) -> tuple[Moments, Moments] | None:
        """Return the means for fitting and for checking; None if either has no tokens."""
        if not self.fit.hessian.num_tokens or not self.check.hessian.num_tokens:
            return None
        return self.fit.moments(), self.check.moments()


class _Moments:
    def __init__(self, in_features: int, device: torch.device, *, drift: bool) -> None:
        self.hessian = HessianAccumulator(in_features, device)
        self.drift = torch.zeros(in_features, in_features, device=device) if drift else None

    def update(self, inputs: Tensor, base_inputs: Tensor | None, roots: Tensor | None) -> None:
        if not self.hessian.update(inputs, roots) or self.drift is None or base_inputs is None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        # Computed in fp32 to avoid cancellation; bf16 is then precise enough for a correction.
        difference = (base_inputs.reshape(rows.shape).float() - rows.float()).to(rows.dtype)
        if roots is not None:
            difference = difference * roots.square()[:, None].to(rows.dtype)
        self.drift += difference.t() @ rows

    def moments(self) -> Moments:
        num_tokens = self.hessian.num_tokens
        return Moments(
            hessian=self.hessian.total() / num_tokens,
            drift=None if self.drift is None else self.drift / num_tokens,
            num_tokens=num_tokens,
        )


def compute_target(
    weight: Tensor, fit: Moments, check: Moments, *, damping: float, shrinkage: float = 0.0
) -> Target:
    """Shift a weight toward the base model's outputs, as far as other text confirms.

    The step is computed from ``fit``, and its length minimizes the error on ``check``, which is
    quadratic in it. Then the step is computed again from both.

    Args:
        weight: fp32 [out, in].
        fit: Moments, with drift, over most of the text.
        check: Moments, with drift, over the rest.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.
        shrinkage: Fraction by which off-diagonal entries are reduced to compute the step; not used
            to check it.

    Returns:
        The target; the weight itself if the step does not help.
    """
    assert fit.drift is not None
    assert check.drift is not None
    step = _step(weight, fit.hessian, fit.drift, damping, shrinkage)
    if step is None:
        return Target(weight=weight, share=0.0)
    slope = float((step * (weight @ check.drift)).sum(dtype=torch.float64))
    curvature = float(((step @ check.hessian) * step).sum(dtype=torch.float64))
    share = min(max(slope / curvature, 0.0), 1.0) if curvature > 0 else 0.0
    if share < MIN_SHARE:
        return Target(weight=weight, share=0.0)
    tokens = fit.num_tokens + check.num_tokens
    fit_share = fit.num_tokens / tokens
    hessian = torch.lerp(check.hessian, fit.hessian, fit_share)
    drift = torch.lerp(check.drift, fit.drift, fit_share)
    step = _step(weight, hessian, drift, damping, shrinkage)
    if step is None:
        return Target(weight=weight, share=0.0)
    return Target(weight=weight + share * step, share=share)


def _step(
    weight: Tensor, hessian: Tensor, drift: Tensor, damping: float, shrinkage: float
) -> Tensor | None:
    """Return W D (shrunk H + damping)⁻¹; None if the Hessian cannot be factored."""
    damped = hessian.clone()
    shrink_to_diagonal(damped, shrinkage)
    damped.diagonal().add_(damping * float(hessian.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return None
    step = torch.cholesky_solve((weight @ drift).t(), lower).t()
    return step if bool(torch.isfinite(step).all()) else None
