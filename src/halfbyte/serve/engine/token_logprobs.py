"""How likely tokens are by the model's own distribution, before penalties and temperature."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.serve.engine.contract import Rated


@dataclass(frozen=True, slots=True, kw_only=True)
class Rating:
    """Some rows of logits, and what follows from each as a whole."""

    logits: Tensor
    """float32 [rows, vocabulary]; until the next rating."""
    likeliest: list[int]
    is_finite: list[bool]
    entropies: list[float]
    """In nats."""
    normalisers: list[float]
    """A token's natural log probability is its logit less this."""

    def rate_token(self, row: int, token: int, count: int | None) -> Rated:
        """Rate one token.

        Args:
            row: Of the logits.
            token: Its id.
            count: How many of the likeliest to give beside it; None: not even its own.

        Returns:
            The token, its logprob NaN where it was not asked for.
        """
        if count is None:
            return Rated(token=token, logprob=math.nan)
        logits, normaliser = self.logits[row], self.normalisers[row]
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, ids = logits.topk(min(count, logits.shape[0]))
            logprobs = [value - normaliser for value in values.tolist()]
            top = tuple(zip(ids.tolist(), logprobs, strict=True))
        return Rated(token=token, logprob=float(logits[token]) - normaliser, top=top)


class Rater:
    """Rates rows, in memory that it keeps.

    Tensors of a vocabulary's size are large enough that a new one each time costs more in new pages
    than its numbers do.
    """

    def __init__(self) -> None:
        """Start without memory."""
        self._work: tuple[Tensor, Tensor, Tensor] | None = None

    def rate(self, rows: Sequence[Tensor]) -> Rating:
        """Rate rows.

        Args:
            rows: Each float32 [vocabulary].

        Returns:
            The rating; its logits are the rater's until the next call.
        """
        logits, shifted, shares = (work[: len(rows)] for work in self._take(rows))
        torch.stack(list(rows), out=logits)
        likeliest = logits.argmax(-1)
        largest = logits.gather(1, likeliest[:, None])
        torch.sub(logits, largest, out=shifted)
        torch.exp(shifted, out=shares)
        sums = shares.sum(-1)
        # A token of probability 0 adds nothing; 0 times infinity would be not-a-number.
        inner = shifted.clamp_(min=-1e4).mul_(shares).sum(-1) / sums
        logs = sums.log()
        finite = torch.isfinite(largest[:, 0]) & torch.isfinite(sums)
        return Rating(
            logits=logits,
            likeliest=likeliest.tolist(),
            is_finite=finite.tolist(),
            entropies=(logs - inner).tolist(),
            normalisers=(largest[:, 0] + logs).tolist(),
        )

    def _take(self, rows: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        if self._work is None or self._work[0].shape[0] < len(rows):
            shape = (len(rows), rows[0].shape[0])
            self._work = (
                rows[0].new_empty(shape),
                rows[0].new_empty(shape),
                rows[0].new_empty(shape),
            )
        return self._work
