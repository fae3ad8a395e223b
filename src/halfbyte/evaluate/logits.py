"""Negative log-likelihood and KL divergence per token, from logits. Pure tensor functions.

Everything is computed in fp32, a few rows at a time, so that the logits of a window (1.2 GB in fp32
for 2048 tokens and a vocabulary of 150,000, several times that with intermediates) are never copied
as a whole. Callers sum over tokens in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from halfbyte.errors import ConfigError

CHUNK_VALUES = 2**22
"""Logits converted to fp32 at a time: 16 MB, which stays near the size of the CPU's cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenComparison:
    """Comparison of two models' predictions, one value per token, on the CPU."""

    kl_nats: Tensor
    """float32 [tokens]: KL(base || quantized). Unit: nats."""
    agrees: Tensor
    """bool [tokens]: whether both rank the same token first."""
    base_nll_nats: Tensor
    """float32 [tokens]: negative log-likelihood of the target under the base. Unit: nats."""
    quantized_nll_nats: Tensor
    """float32 [tokens]: the same under the quantized model. Unit: nats."""


def measure_nll(logits: Tensor, target_ids: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each target token.

    Args:
        logits: [tokens, vocabulary], any float dtype and device.
        target_ids: [tokens]: the token that follows each position.

    Returns:
        float32 [tokens] on the CPU. Unit: nats.

    Raises:
        ConfigError: The shapes do not match, or an id is outside the vocabulary.
    """
    check_targets(logits, target_ids)
    targets = target_ids.to(logits.device)
    parts = []
    for rows in _row_chunks(logits):
        chunk = logits[rows].float()
        picked = chunk.gather(1, targets[rows].unsqueeze(1)).squeeze(1)
        parts.append((chunk.logsumexp(dim=1) - picked).cpu())
    return torch.cat(parts)


def compare_logits(
    base_logits: Tensor, quantized_logits: Tensor, target_ids: Tensor
) -> TokenComparison:
    """Compare two models' predictions of the same tokens.

    Args:
        base_logits: [tokens, vocabulary], any float dtype and device.
        quantized_logits: The same shape; may be on another device.
        target_ids: [tokens]: the token that follows each position.

    Returns:
        Divergence, agreement and both likelihoods per token.

    Raises:
        ConfigError: The shapes do not match, or an id is outside the vocabulary.
    """
    if base_logits.shape != quantized_logits.shape:
        raise ConfigError(
            f"Cannot compare logits of shape {list(base_logits.shape)} (base) with "
            f"{list(quantized_logits.shape)} (quantized): both models need the same vocabulary "
            "and the same tokens."
        )
    check_targets(base_logits, target_ids)
    device = base_logits.device
    targets = target_ids.to(device)
    kl, agrees, base_nll, quantized_nll = [], [], [], []
    for rows in _row_chunks(base_logits):
        p = base_logits[rows].float().log_softmax(dim=1)
        q = quantized_logits[rows].to(device).float().log_softmax(dim=1)
        target = targets[rows].unsqueeze(1)
        base_nll.append(-p.gather(1, target).squeeze(1).cpu())
        quantized_nll.append(-q.gather(1, target).squeeze(1).cpu())
        agrees.append((p.argmax(dim=1) == q.argmax(dim=1)).cpu())
        weight = p.exp()
        # A token of probability 0 contributes nothing, although log 0 - log 0 is NaN.
        terms = (p.sub_(q)).mul_(weight).masked_fill_(weight == 0, 0.0)
        kl.append(terms.sum(dim=1).cpu())
    return TokenComparison(
        kl_nats=torch.cat(kl),
        agrees=torch.cat(agrees),
        base_nll_nats=torch.cat(base_nll),
        quantized_nll_nats=torch.cat(quantized_nll),
    )


def check_targets(logits: Tensor, target_ids: Tensor) -> None:
    """Reject logits and target ids that do not match.

    Args:
        logits: Should be [tokens, vocabulary].
        target_ids: Should be [tokens], each inside the vocabulary.

    Raises:
        ConfigError: They do not match; names the shapes or the id.
    """
    if logits.dim() != 2 or logits.shape[:1] != target_ids.shape:
        raise ConfigError(
            f"Cannot score logits of shape {list(logits.shape)} against target ids of shape "
            f"{list(target_ids.shape)}: they must be [tokens, vocabulary] and [tokens]."
        )
    if target_ids.numel():
        low, high = int(target_ids.min()), int(target_ids.max())
        if low < 0 or high >= logits.shape[1]:
            raise ConfigError(
                f"Cannot score token id {low if low < 0 else high}: the model's vocabulary "
                f"is 0..{logits.shape[1] - 1}. Use the model's own tokenizer."
            )


def _row_chunks(logits: Tensor) -> Iterator[slice]:
    tokens, vocabulary = logits.shape
    step = max(1, CHUNK_VALUES // vocabulary)
    for start in range(0, tokens, step):
        yield slice(start, start + step)
