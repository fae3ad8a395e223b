"""The base model's own inputs beside the quantized model's -> what a rounded weight should aim at.

A linear behind rounded layers sees inputs x~ where the base model's sees x. The rounded weight that
gives the base model's outputs W x best, on x~, is not near W but near

    W* = W + W D H⁻¹,    D = mean of (x - x~) x~ᵀ,    H = mean of x~ x~ᵀ

and the squared distance to W x is that of the rounding error of W* plus what no weight can mend.
How much of the step is taken is decided on text that it was not computed from.

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
"""Of this many batches, one only checks what the others propose."""
SMALLEST_SHARE = 0.05
"""Less of the step is not worth its noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """Second moments of a linear's inputs, over some of the calibration text."""

    hessian: Tensor
    """Mean of x~ x~ᵀ: fp32 [in, in]."""
    drift: Tensor | None
    """Mean of (x - x~) x~ᵀ, its rows those of x - x~: fp32 [in, in]. None: not measured."""
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What the sweep is to come near to."""

    weight: Tensor
    """fp32 [out, in]."""
    share: float
    """How much of the step from W to W* was taken, 0..1."""


class MomentAccumulator:
    """Sums second moments of inputs, those of every fourth batch apart."""

    def __init__(self, in_features: int, device: torch.device, *, drift: bool) -> None:
        """Start at zero.

        Args:
            in_features: Width of the input.
            device: Where to sum.
            drift: Whether the base model's inputs are given too.
        """
        self.fit = _Half(in_features, device, drift=drift)
        self.check = _Half(in_features, device, drift=drift)

    def update(
        self,
        batch: int,
        inputs: Tensor,
        base_inputs: Tensor | None,
        roots: Tensor | None = None,
    ) -> None:
        """Add a batch.

        Args:
            batch: Its number.
            inputs: What reaches the linear in the quantized model, [..., in].
            base_inputs: The same of the base model, token by token; None where it is not known.
            roots: Square roots of what its tokens count, [tokens]; None: all alike.
        """
        half = self.check if batch % CHECK_EVERY == CHECK_EVERY - 1 else self.fit
        half.update(inputs, base_inputs, roots)

    @property
    def num_tokens(self) -> int:
        """Tokens in both parts."""
        return self.fit.hessian.num_tokens + self.check.hessian.num_tokens

    @property
    def dropped_tokens(self) -> int:
        """Tokens of batches that held a NaN or an infinity."""
        return self.fit.hessian.dropped_tokens + self.check.hessian.dropped_tokens

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.fit.hessian.in_features

    def total(self) -> Tensor:
        """Give the sum of x~ x~ᵀ over all tokens."""
        return self.fit.hessian.total() + self.check.hessian.total()

    def moments(self) -> tuple[Moments, Moments] | None:
        """Give the means of both parts; None where one of them saw nothing."""
        if not self.fit.hessian.num_tokens or not self.check.hessian.num_tokens:
            return None
        return self.fit.moments(), self.check.moments()


class _Half:
    def __init__(self, in_features: int, device: torch.device, *, drift: bool) -> None:
        self.hessian = HessianAccumulator(in_features, device)
        self.drift = torch.zeros(in_features, in_features, device=device) if drift else None

    def update(self, inputs: Tensor, base_inputs: Tensor | None, roots: Tensor | None) -> None:
        if not self.hessian.update(inputs, roots) or self.drift is None or base_inputs is None:
            return
        rows = inputs.reshape(-1, inputs.shape[-1])
        # A difference of near numbers: in bf16 it has 8 bits, enough for what is a correction.
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


def aim(
    weight: Tensor, fit: Moments, check: Moments, *, damping: float, shrinkage: float = 0.0
) -> Target:
    """Shift a weight towards the base model's outputs, as far as other text confirms.

    The step is computed from ``fit`` and its length chosen on ``check``, where the error is a
    parabola in it; then the step is computed again from both.

    Args:
        weight: fp32 [out, in].
        fit: Moments of most of the text, with drift.
        check: Moments of the rest, with drift.
        damping: Added to the Hessian's diagonal, as a fraction of its mean.
        shrinkage: Share taken off the products of different inputs where the step is computed, not
            where it is judged.

    Returns:
        The target; the weight itself where the step does not help.
    """
    assert fit.drift is not None
    assert check.drift is not None
    step = _step(weight, fit.hessian, fit.drift, damping, shrinkage)
    if step is None:
        return Target(weight=weight, share=0.0)
    wanted = float((step * (weight @ check.drift)).sum(dtype=torch.float64))
    bend = float(((step @ check.hessian) * step).sum(dtype=torch.float64))
    share = min(max(wanted / bend, 0.0), 1.0) if bend > 0 else 0.0
    if share < SMALLEST_SHARE:
        return Target(weight=weight, share=0.0)
    tokens = fit.num_tokens + check.num_tokens
    part = fit.num_tokens / tokens
    hessian = torch.lerp(check.hessian, fit.hessian, part)
    drift = torch.lerp(check.drift, fit.drift, part)
    step = _step(weight, hessian, drift, damping, shrinkage)
    if step is None:
        return Target(weight=weight, share=0.0)
    return Target(weight=weight + share * step, share=share)


def _step(
    weight: Tensor, hessian: Tensor, drift: Tensor, damping: float, shrinkage: float
) -> Tensor | None:
    """W D (H, shrunk, + damping)⁻¹; None where the Hessian cannot be factored."""
    damped = hessian.clone()
    shrink_to_diagonal(damped, shrinkage)
    damped.diagonal().add_(damping * float(hessian.diagonal().mean()))
    lower, info = torch.linalg.cholesky_ex(damped)
    if int(info) != 0:
        return None
    step = torch.cholesky_solve((weight @ drift).t(), lower).t()
    return step if bool(torch.isfinite(step).all()) else None
