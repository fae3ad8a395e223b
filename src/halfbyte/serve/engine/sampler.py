"""From logits to the next token: penalties, bias, grammar, temperature, cut, draw.

::

    logits [vocabulary] ──> penalties ─> bias ─> grammar ─> temperature
                        ──> min_p, top_k, top_p ──> one uniform number picks

The order is vLLM's. A row's token depends on its own logits, request and random numbers only.
"""

from __future__ import annotations

import secrets
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from halfbyte.serve.engine.contract import TokenRequest
from halfbyte.serve.engine.grammar import Matcher

FIRST_LOOK = 512
"""Likeliest tokens that are sorted to find where top_p cuts; all of them where these fall short."""


class Sampler:
    """Draws the tokens of one request."""

    def __init__(self, request: TokenRequest, matcher: Matcher | None = None) -> None:
        """Start.

        Args:
            request: Its settings.
            matcher: Of its grammar.
        """
        self.request = request
        self.matcher = matcher
        self._random: np.random.Generator | None = None
        self._counts: Counter[int] = Counter()
        self._penalises = bool(request.frequency_penalty or request.presence_penalty)
        self._plain = (
            not self._penalises
            and request.repetition_penalty == 1.0
            and not request.logit_bias
            and matcher is None
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token of the model's own distribution is always the one."""
        return self._plain and self.request.temperature == 0

    def draw(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """Draw the next token.

        Args:
            logits: float32 [vocabulary]; left as they are.
            tokens: Prompt and answer so far.

        Returns:
            Its id.
        """
        request = self.request
        logits = logits if self._plain else self._adjust(logits, tokens)
        if request.temperature == 0:
            return int(logits.argmax())
        # Less the largest first: a tiny temperature must not overflow.
        scaled = (logits - logits.amax()) / request.temperature
        return self._pick(_cut(torch.softmax(scaled, dim=-1), request))

    def note(self, token: int) -> None:
        """Count a token that became part of the answer."""
        self._counts[token] += 1

    def _adjust(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        request, device = self.request, logits.device
        logits = logits.clone()
        if request.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(tokens)), device=device)
            values = logits[seen]
            factor = request.repetition_penalty
            logits[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._penalises and self._counts:
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), device=device)
            logits[ids] -= request.presence_penalty + request.frequency_penalty * counts
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=device)
            logits[ids] += torch.tensor(list(request.logit_bias.values()), device=device)
        if self.matcher is not None:
            logits.masked_fill_(~self.matcher.allowed().to(device), float("-inf"))
        return logits

    def _pick(self, shares: Tensor) -> int:
        sums = shares.double().cumsum(0)
        aim = torch.tensor([self._next_number()], dtype=torch.float64, device=sums.device)
        # The first token whose sum is above the aim; one of probability 0 never is the first.
        return int(torch.searchsorted(sums, aim * sums[-1], right=True).clamp(max=len(sums) - 1))

    def _next_number(self) -> float:
        """Give one from 0 to 1; who is greedy never needs one."""
        if self._random is None:
            seed = self.request.seed
            seed = secrets.randbits(63) if seed is None else seed % 2**64
            self._random = np.random.Generator(np.random.PCG64(seed))
        return float(self._random.random())


def _cut(shares: Tensor, request: TokenRequest) -> Tensor:
    """Set what is too unlikely to 0."""
    least = shares.new_zeros(())
    if request.min_p > 0:
        least = shares.amax() * request.min_p
    if 0 < request.top_k < shares.shape[0]:
        least = torch.maximum(least, shares.topk(request.top_k).values[-1])
    if request.top_p < 1:
        # Of what min_p and top_k left.
        least = torch.maximum(least, _threshold(shares * (shares >= least), request.top_p))
    return shares * (shares >= least)


def _threshold(shares: Tensor, top_p: float) -> Tensor:
    """Give the share of the last of the likeliest tokens that together reach top_p."""
    aim = shares.sum() * top_p
    for count in (min(FIRST_LOOK, shares.shape[0]), shares.shape[0]):
        values = shares.topk(count).values
        sums = values.cumsum(0)
        if sums[-1] >= aim:
            break
    # The token that crosses the line is the last one kept.
    kept = int((sums - values < aim).sum())
    return values[max(kept - 1, 0)]
