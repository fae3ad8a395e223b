"""Divergence of a quantized model's predictions from its base's, token by token.

More sensitive than comparing two perplexities: predictions are paired per token, so the variation
of the text cancels, and new errors cannot be offset by improvements elsewhere.
``DivergenceAccumulator`` takes logits window by window; :func:`divergence` runs both models on the
same token ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError, ModelError
from halfbyte.evaluate.loading import (
    check_same_tokenizer,
    open_subject,
    resolve_windows,
)
from halfbyte.evaluate.logits import TokenComparison, compare_logits
from halfbyte.evaluate.perplexity import (
    PerplexityAccumulator,
    PerplexityResult,
    Progress,
    check_not_nan,
    run_windows,
    safe_exp,
    split_by_window,
)
from halfbyte.evaluate.window_mean import WindowMean

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""Of the divergence over tokens; 100 is the maximum."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceResult:
    """Divergence of a quantized model from its base on one text."""

    kl_nats: float
    """Mean of KL(base || quantized) per token. Unit: nats."""
    kl_standard_error: float | None
    """Of ``kl_nats``, over windows; None for a single window. Unit: nats."""
    kl_percentiles: dict[str, float]
    """By percentile over tokens; "100" is the maximum. Unit: nats."""
    top1_agreement: float
    """Share of positions where both models rank the same token first, 0..1."""
    top1_standard_error: float | None
    """Of ``top1_agreement``, over windows."""
    base: PerplexityResult
    quantized: PerplexityResult
    nll_increase_nats: float
    """Mean increase of the negative log-likelihood per token. Unit: nats."""
    nll_increase_standard_error: float | None
    """Of ``nll_increase_nats``, over windows; paired, so smaller than those of the perplexities."""
    num_tokens: int
    num_windows: int
    window: int
    """Tokens per window, including the first, which is not predicted."""
    note: str | None = None
    """A caveat about the numbers, or None."""

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the quantized model divided by that of the base."""
        return safe_exp(self.nll_increase_nats)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


class DivergenceAccumulator:
    """Accumulates the divergence of a quantized model from its base, window by window."""

    def __init__(self) -> None:
        self._kl = WindowMean()
        self._agreement = WindowMean()
        self._increase = WindowMean()
        self._base = PerplexityAccumulator()
        self._quantized = PerplexityAccumulator()
        self._kl_tokens: list[Tensor] = []

    def update(self, base_logits: Tensor, quantized_logits: Tensor, target_ids: Tensor) -> None:
        """Add the logits of one or several windows.

        Args:
            base_logits: [tokens, vocabulary] of one window or [windows, tokens, vocabulary] of
                several: the predictions of ``target_ids``.
            quantized_logits: The same shape.
            target_ids: [tokens] or [windows, tokens].

        Raises:
            ConfigError: The shapes do not match, or an id is outside the vocabulary.
            ModelError: A model's logits are NaN; says where.
        """
        if base_logits.shape != quantized_logits.shape:
            raise ConfigError(
                f"Cannot compare logits of shape {list(base_logits.shape)} (base) with "
                f"{list(quantized_logits.shape)} (quantized): both models need the same "
                "vocabulary and the same tokens."
            )
        for base, quantized, targets in split_by_window(base_logits, quantized_logits, target_ids):
            self._add(compare_logits(base, quantized, targets))

    def _add(self, tokens: TokenComparison) -> None:
        count = len(tokens.kl_nats)
        self._base.add_nll(tokens.base_nll_nats)
        self._quantized.add_nll(tokens.quantized_nll_nats)
        check_not_nan(tokens.kl_nats, self._kl.num_windows)
        increase = tokens.quantized_nll_nats.double() - tokens.base_nll_nats.double()
        self._increase.add(float(increase.sum()), count)
        self._kl.add(float(tokens.kl_nats.sum(dtype=torch.float64)), count)
        self._agreement.add(float(tokens.agrees.sum()), count)
        self._kl_tokens.append(tokens.kl_nats)

    @property
    def num_windows(self) -> int:
        """Number of windows added."""
        return self._kl.num_windows

    def result(
        self,
        *,
        base_dtype: str | None = None,
        quantized_dtype: str | None = None,
        note: str | None = None,
    ) -> DivergenceResult:
        """Return the divergence over all windows so far.

        Args:
            base_dtype: Compute dtype of the base; copied into the result.
            quantized_dtype: Compute dtype of the quantized model; copied into the result.
            note: A caveat; copied into the result.

        Returns:
            The result.

        Raises:
            ModelError: No window was added.
        """
        if not self.num_windows:
            raise ModelError(
                "Cannot compute a divergence: no window was measured. Call update first."
            )
        base = self._base.result(dtype=base_dtype)
        return DivergenceResult(
            kl_nats=self._kl.mean,
            kl_standard_error=self._kl.standard_error,
            kl_percentiles=percentiles(torch.cat(self._kl_tokens)),
            top1_agreement=self._agreement.mean,
            top1_standard_error=self._agreement.standard_error,
            base=base,
            quantized=self._quantized.result(dtype=quantized_dtype),
            nll_increase_nats=self._increase.mean,
            nll_increase_standard_error=self._increase.standard_error,
            num_tokens=base.num_tokens,
            num_windows=base.num_windows,
            window=base.window,
            note=note,
        )


def percentiles(values: Tensor) -> dict[str, float]:
    """Return ``PERCENTILES`` of one-dimensional values by name, with linear interpolation."""
    # torch.quantile does not support more than 16 million values.
    ordered = values.double().sort().values
    result = {}
    for percentile in PERCENTILES:
        position = percentile / 100 * (len(ordered) - 1)
        low = int(position)
        high = min(low + 1, len(ordered) - 1)
        share = position - low
        value = ordered[low] if share == 0 else ordered[low].lerp(ordered[high], share)
        result[f"{percentile:g}"] = float(value)
    return result


def divergence(
    base: Any | str | Path,
    quantized: Any | str | Path,
    text: str | Tensor | Sequence[int] | None = None,
    *,
    tokenizer: Any = None,
    window: int | None = None,
    windows: int | None = None,
    batch_size: int = 1,
    add_bos: bool = False,
    dtype: str | torch.dtype = "auto",
    device: str = "auto",
    progress: Progress | None = None,
) -> DivergenceResult:
    """Measure the divergence of a quantized model from its base on a text.

    Both models get the same token ids and are in memory together. Each window runs through both
    before the next one, so no logits are stored; the quantized model adds about a quarter to the
    base's memory.

    Args:
        base: A loaded Hugging Face causal language model, or the folder of one.
        quantized: The model to measure: loaded, or a folder (a GPTQ checkpoint, or any other model
            with the same vocabulary).
        text: The text, or its token ids; None: the evaluation text that ships with halfbyte.
        tokenizer: Needed for loaded models and a text; a folder of the base has its own.
        window: Tokens per window; None: 2048, or the models' context length if that is shorter.
        windows: Use at most this many windows, from the start of the text; None: all.
        batch_size: Windows per forward pass. Affects speed and memory, not the result.
        add_bos: Add a BOS token once at the start of the text, not in each window.
        dtype: Compute dtype of models from folders; "auto": float32 on a CPU, as stored elsewhere.
            Loaded models are not changed.
        device: Where models from folders run; "auto": the first GPU, or the CPU.
        progress: Called after each pair of forward passes with (windows done, total).

    Returns:
        Divergence, agreement and both perplexities, with standard errors over windows.

    Raises:
        ConfigError: An invalid setting, a text that the models cannot take, or models with
            different vocabularies.
        ModelError: A model cannot be loaded, or its logits are NaN.
    """
    base_subject = open_subject(base, tokenizer=tokenizer, dtype=dtype, device=device)
    quantized_subject = open_subject(quantized, dtype=dtype, device=device)
    split = resolve_windows(
        base_subject,
        text,
        window=window,
        limit=windows,
        add_bos=add_bos,
        second=quantized_subject,
    )
    check_same_tokenizer(base_subject, quantized_subject, text)
    accumulator = DivergenceAccumulator()
    for ids in split.batches(batch_size):
        accumulator.update(
            run_windows(base_subject, ids), run_windows(quantized_subject, ids), ids[:, 1:]
        )
        if progress is not None:
            progress(accumulator.num_windows, len(split.ids))
    return accumulator.result(
        base_dtype=base_subject.dtype_name,
        quantized_dtype=quantized_subject.dtype_name,
        note=split.note,
    )
