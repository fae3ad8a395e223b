"""Divergence: how far a quantized model's predictions are from its base's, token by token.

Far more telling than two perplexities: each token is compared with itself, so the texts' own
ups and downs cancel, and a model that is wrong in new ways cannot hide behind one that is right
in others. ``DivergenceAccumulator`` takes logits window by window; :func:`divergence` runs both
models on the same token ids.
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
    each_window,
    exponential,
    run_windows,
)
from halfbyte.evaluate.window_mean import WindowMean

PERCENTILES = (50.0, 90.0, 95.0, 99.0, 99.9, 100.0)
"""Of the divergence over tokens; 100 is the largest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DivergenceResult:
    """How far a quantized model is from its base on one text."""

    kl_nats: float
    """Mean of KL(base || quantized) per token. Unit: nats."""
    kl_standard_error: float | None
    """Of ``kl_nats``, over windows; None where there is only one window. Unit: nats."""
    kl_percentiles: dict[str, float]
    """By percentile over tokens, "100" the largest. Unit: nats."""
    top1_agreement: float
    """Share of positions where both rank the same token first, 0..1."""
    top1_standard_error: float | None
    """Of ``top1_agreement``, over windows."""
    base: PerplexityResult
    quantized: PerplexityResult
    nll_increase_nats: float
    """Mean by which the quantized model is more surprised per token. Unit: nats."""
    nll_increase_standard_error: float | None
    """Of ``nll_increase_nats``, over windows; paired, so far below those of the perplexities."""
    num_tokens: int
    num_windows: int
    window: int
    """Tokens per window, the first included, which is not predicted."""
    note: str | None = None
    """What a reader of the numbers should know, or None."""

    @property
    def perplexity_ratio(self) -> float:
        """Perplexity of the quantized model over that of the base."""
        return exponential(self.nll_increase_nats)

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {**asdict(self), "perplexity_ratio": self.perplexity_ratio}


class DivergenceAccumulator:
    """Collect the divergence of a quantized model from its base, window by window."""

    def __init__(self) -> None:
        self._kl = WindowMean()
        self._agreement = WindowMean()
        self._increase = WindowMean()
        self._base = PerplexityAccumulator()
        self._quantized = PerplexityAccumulator()
        self._kl_tokens: list[Tensor] = []

    def update(self, base_logits: Tensor, quantized_logits: Tensor, target_ids: Tensor) -> None:
        """Add windows that both models were run on.

        Args:
            base_logits: [tokens, vocabulary] of one window or [windows, tokens, vocabulary] of
                several: the predictions of ``target_ids``.
            quantized_logits: The same shape.
            target_ids: [tokens] or [windows, tokens].

        Raises:
            ConfigError: The shapes do not fit each other, or an id is outside the vocabulary.
            ModelError: A model's logits are not numbers; says where.
        """
        if base_logits.shape != quantized_logits.shape:
            raise ConfigError(
                f"Cannot compare logits of shape {list(base_logits.shape)} (base) with "
                f"{list(quantized_logits.shape)} (quantized): both models need the same "
                "vocabulary and the same tokens."
            )
        for base, quantized, targets in each_window(base_logits, quantized_logits, target_ids):
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
        """How many windows were added."""
        return self._kl.num_windows

    def result(
        self,
        *,
        base_dtype: str | None = None,
        quantized_dtype: str | None = None,
        note: str | None = None,
    ) -> DivergenceResult:
        """Give the divergence over all windows so far.

        Args:
            base_dtype: What the base computed in; copied into the result.
            quantized_dtype: What the quantized model computed in; copied into the result.
            note: What a reader should know; copied into the result.

        Returns:
            The result.

        Raises:
            ModelError: No window was added.
        """
        if not self.num_windows:
            raise ModelError("Cannot give a divergence: no window was measured. Add one first.")
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
    """Give ``PERCENTILES`` of one-dimensional values, interpolated linearly, by name."""
    # Sorted by hand: torch.quantile refuses more than 16 million values.
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
    """Measure how far a quantized model is from its base on a text: same token ids through both.

    Both models are in memory together, and each window goes through both before the next: the
    quantized one adds about a quarter to what the base needs, and no logits need to be kept.

    Args:
        base: A loaded Hugging Face causal language model, or the folder of one.
        quantized: The model to judge: loaded, or a folder (a GPTQ checkpoint, or any other model
            of the same vocabulary).
        text: The text, or its token ids; None: the evaluation text that ships with halfbyte.
        tokenizer: Needed with loaded models and a text; the base's folder brings its own.
        window: Tokens per window; None: 2048, or the models' longest where that is less.
        windows: Use at most this many windows, from the start of the text; None: all.
        batch_size: Windows per forward pass. Changes speed and memory, not the result.
        add_bos: Put a BOS token before the text. It stands once at its start, not in each window.
        dtype: What models from folders compute in; "auto": float32 on a CPU, as stored elsewhere.
            Loaded models stay as they are.
        device: Where models from folders run; "auto": the first GPU, or the CPU.
        progress: Called after each pair of forward passes.

    Returns:
        Divergence, agreement and both perplexities, with standard errors over windows.

    Raises:
        ConfigError: A setting, a text that does not fit the models, or models that do not share
            their vocabulary; nothing was run but perhaps the first window.
        ModelError: A model cannot be loaded, or it computes what is not a number.
    """
    first = open_subject(base, tokenizer=tokenizer, dtype=dtype, device=device)
    second = open_subject(quantized, dtype=dtype, device=device)
    cut = resolve_windows(first, text, window=window, limit=windows, add_bos=add_bos, also=second)
    check_same_tokenizer(first, second, text)
    accumulator = DivergenceAccumulator()
    for ids in cut.batches(batch_size):
        accumulator.update(run_windows(first, ids), run_windows(second, ids), ids[:, 1:])
        if progress is not None:
            progress(accumulator.num_windows, len(cut.ids))
    return accumulator.result(
        base_dtype=first.dtype_name, quantized_dtype=second.dtype_name, note=cut.note
    )
