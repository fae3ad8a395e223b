"""Log probabilities and entropies of logits, before penalties and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.serve.engine.contract import ScoredToken


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredLogits:
    """Rows of logits and their statistics."""

    logits: Tensor
    """float32 [rows, vocabulary]; valid until the scorer's next call."""
    argmax: list[int]
    is_finite: list[bool]
    entropies: list[float]
    """In nats."""
    log_normalizers: list[float]
    """A token's natural log probability is its logit minus this."""

    def score_token(self, row: int, token: int, count: int | None) -> ScoredToken:
        """Compute the log probability of a token.

        Args:
            row: Row of the logits.
            token: The token's id.
            count: Number of most likely tokens to add; None computes no log probability at all.

        Returns:
            The token; its logprob is NaN if `count` is None.
        """
        if count is None:
            return ScoredToken(token=token, logprob=math.nan)
        logits, log_normalizer = self.logits[row], self.log_normalizers[row]
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, ids = logits.topk(min(count, logits.shape[0]))
            logprobs = [value - log_normalizer for value in values.tolist()]
            top = tuple(zip(ids.tolist(), logprobs, strict=True))
        return ScoredToken(token=token, logprob=float(logits[token]) - log_normalizer, top=top)


class LogitScorer:
    """Computes the statistics of logits in reused buffers.

    Tensors of a vocabulary's size are so large that allocating new memory pages would take longer
    than the computation.
    """

    def __init__(self) -> None:
        """Start without buffers."""
        self._buffers: tuple[Tensor, Tensor, Tensor] | None = None

    def score(self, rows: Sequence[Tensor]) -> ScoredLogits:
        """Compute the statistics of rows of logits.

        Args:
            rows: Each float32 [vocabulary].

        Returns:
            The statistics; their logits are valid until the next call.
        """
        logits, shifted, weights = (buffer[: len(rows)] for buffer in self._get_buffers(rows))
        torch.stack(list(rows), out=logits)
        argmax = logits.argmax(-1)
        largest = logits.gather(1, argmax[:, None])
        torch.sub(logits, largest, out=shifted)
        torch.exp(shifted, out=weights)
        sums = weights.sum(-1)
        # Clamped, because for tokens of probability 0 the product 0 * -inf would be NaN.
        inner = shifted.clamp_(min=-1e4).mul_(weights).sum(-1) / sums
        logs = sums.log()
        finite = torch.isfinite(largest[:, 0]) & torch.isfinite(sums)
        return ScoredLogits(
            logits=logits,
            argmax=argmax.tolist(),
            is_finite=finite.tolist(),
            entropies=(logs - inner).tolist(),
            log_normalizers=(largest[:, 0] + logs).tolist(),
        )

    def _get_buffers(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self._buffers is None or self._buffers[0].shape[0] < len(rows):
            shape = (len(rows), rows[0].shape[0])
            self._buffers = (
                rows[0].new_empty(shape),
                rows[0].new_empty(shape),
                rows[0].new_empty(shape),
            )
        return self._buffers
