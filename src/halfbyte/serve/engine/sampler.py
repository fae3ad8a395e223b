"""Sample the next token from logits.

::

    logits [vocabulary] ──> penalties ─> bias ─> grammar ─> temperature
                        ──> min_p, top_k, top_p ──> draw by one uniform random number

The order is vLLM's. A token depends only on the logits, request and random numbers of its sequence.
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

TOP_P_CANDIDATES = 512
"""Most likely tokens that are sorted first for top_p; if they do not suffice, all are sorted."""


class Sampler:
    """Samples the tokens of one request."""

    def __init__(self, request: TokenRequest, matcher: Matcher | None = None) -> None:
        """Set the sampling parameters.

        Args:
            request: The request.
            matcher: The matcher of its grammar, if it has one.
        """
        self.request = request
        self.matcher = matcher
        self._random: np.random.Generator | None = None
        self._counts: Counter[int] = Counter()
        self._has_penalties = bool(request.frequency_penalty or request.presence_penalty)
        self._keeps_logits = (
            not self._has_penalties
            and request.repetition_penalty == 1.0
            and not request.logit_bias
            and matcher is None
        )

    @property
    def is_greedy(self) -> bool:
        """Whether the next token is always the argmax of the model's logits."""
        return self._keeps_logits and self.request.temperature == 0

    def draw(self, logits: Tensor, tokens: Sequence[int]) -> int:
        """Draw the next token.

        Args:
            logits: float32 [vocabulary]; not modified.
            tokens: Prompt and answer so far.

        Returns:
            The token's id.
        """
        request = self.request
        logits = logits if self._keeps_logits else self._adjust(logits, tokens)
        if request.temperature == 0:
            return int(logits.argmax())
        # Subtracting the maximum first avoids an overflow at very low temperatures.
        scaled = (logits - logits.amax()) / request.temperature
        return self._pick(_filter(torch.softmax(scaled, dim=-1), request))

    def add(self, token: int) -> None:
        """Count a token of the answer, for the penalties."""
        self._counts[token] += 1

    def _adjust(self, logits: Tensor, tokens: Sequence[int]) -> Tensor:
        request, device = self.request, logits.device
        logits = logits.clone()
        if request.repetition_penalty != 1.0:
            seen = torch.tensor(sorted(set(tokens)), device=device)
            values = logits[seen]
            factor = request.repetition_penalty
            logits[seen] = torch.where(values > 0, values / factor, values * factor)
        if self._has_penalties and self._counts:
            ids = torch.tensor(list(self._counts), device=device)
            counts = torch.tensor(list(self._counts.values()), device=device)
            logits[ids] -= request.presence_penalty + request.frequency_penalty * counts
        if request.logit_bias:
            ids = torch.tensor(list(request.logit_bias), device=device)
            logits[ids] += torch.tensor(list(request.logit_bias.values()), device=device)
        if self.matcher is not None:
            logits.masked_fill_(~self.matcher.allowed().to(device), float("-inf"))
        return logits

    def _pick(self, weights: Tensor) -> int:
        """Draw from unnormalized probabilities."""
        sums = weights.double().cumsum(0)
        target = torch.tensor([self._draw_uniform()], dtype=torch.float64, device=sums.device)
        # The first token whose cumulative sum exceeds the target; its probability is not 0.
        return int(torch.searchsorted(sums, target * sums[-1], right=True).clamp(max=len(sums) - 1))

    def _draw_uniform(self) -> float:
        """Draw a number in [0, 1); the generator is created at the first draw."""
        if self._random is None:
            seed = self.request.seed
            seed = secrets.randbits(63) if seed is None else seed % 2**64
            self._random = np.random.Generator(np.random.PCG64(seed))
        return float(self._random.random())


def _filter(probabilities: Tensor, request: TokenRequest) -> Tensor:
    """Apply min_p, top_k and top_p: set the probabilities of excluded tokens to 0."""
    threshold = probabilities.new_zeros(())
    if request.min_p > 0:
        threshold = probabilities.amax() * request.min_p
    if 0 < request.top_k < probabilities.shape[0]:
        threshold = torch.maximum(threshold, probabilities.topk(request.top_k).values[-1])
    if request.top_p < 1:
        # top_p applies to what min_p and top_k have kept.
        kept = probabilities * (probabilities >= threshold)
        threshold = torch.maximum(threshold, _find_top_p_threshold(kept, request.top_p))
    return probabilities * (probabilities >= threshold)


def _find_top_p_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """Return the probability of the last of the most likely tokens that together reach top_p."""
    target = probabilities.sum() * top_p
    vocabulary = probabilities.shape[0]
    for count in (min(TOP_P_CANDIDATES, vocabulary), vocabulary):
        values = probabilities.topk(count).values
        sums = values.cumsum(0)
        if sums[-1] >= target:
            break
    # The token that reaches the target is the last one kept.
    kept = int((sums - values < target).sum())
    return values[max(kept - 1, 0)]
