"""Perplexity of a model on a text.

``PerplexityAccumulator`` takes logits window by window; :func:`perplexity` runs the model itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ModelError
from halfbyte.evaluate.loading import Subject, open_subject, resolve_windows
from halfbyte.evaluate.logits import measure_nll
from halfbyte.evaluate.window_mean import WindowMean

Progress = Callable[[int, int], None]
"""Called after each step with (windows done, total)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """Perplexity on a text, with its standard error."""

    perplexity: float
    """Exponential of ``nll_nats``."""
    standard_error: float | None
    """Of the perplexity, over windows; None for a single window."""
    nll_nats: float
    """Mean negative log-likelihood per predicted token. Unit: nats."""
    nll_standard_error: float | None
    """Of ``nll_nats``, over windows. Unit: nats."""
    num_tokens: int
    """Predicted tokens: all except the first of each window."""
    num_windows: int
    window: int
    """Tokens per window, including the first; of the longest window if they differ."""
    dtype: str | None = None
    """Compute dtype of the model, if known."""
    note: str | None = None
    """A caveat about the numbers, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


class PerplexityAccumulator:
    """Accumulates the perplexity of one model, window by window."""

    def __init__(self) -> None:
        self._nll = WindowMean()
        self._window = 0

    def update(self, logits: Tensor, target_ids: Tensor) -> None:
        """Add the logits of one or several windows.

        Args:
            logits: [tokens, vocabulary] of one window or [windows, tokens, vocabulary] of several:
                the predictions of ``target_ids``, so without the last position of each window.
            target_ids: [tokens] or [windows, tokens]: each window without its first token.

        Raises:
            ModelError: A likelihood is NaN; says where.
        """
        for rows, targets in split_by_window(logits, target_ids):
            self.add_nll(measure_nll(rows, targets))

    def add_nll(self, nll_nats: Tensor) -> None:
        """Add the negative log-likelihoods of one window.

        Args:
            nll_nats: [tokens]. Unit: nats.

        Raises:
            ModelError: A likelihood is NaN; says where.
        """
        check_not_nan(nll_nats, self._nll.num_windows)
        self._nll.add(float(nll_nats.sum(dtype=torch.float64)), len(nll_nats))
        self._window = max(self._window, len(nll_nats) + 1)

    @property
    def num_windows(self) -> int:
        """Number of windows added."""
        return self._nll.num_windows

    def result(self, *, dtype: str | None = None, note: str | None = None) -> PerplexityResult:
        """Return the perplexity of all windows so far.

        Args:
            dtype: Compute dtype of the model; copied into the result.
            note: A caveat; copied into the result.

        Returns:
            The result.

        Raises:
            ModelError: No window was added.
        """
        if not self._nll.num_windows:
            raise ModelError(
                "Cannot compute a perplexity: no window was measured. Call update first."
            )
        nll, error = self._nll.mean, self._nll.standard_error
        perplexity = safe_exp(nll)
        return PerplexityResult(
            perplexity=perplexity,
            standard_error=None if error is None else perplexity * error,
            nll_nats=nll,
            nll_standard_error=error,
            num_tokens=self._nll.num_tokens,
            num_windows=self._nll.num_windows,
            window=self._window,
            dtype=dtype,
            note=note,
        )


def perplexity(
    model: Any | str | Path,
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
) -> PerplexityResult:
    """Measure a model's perplexity on a text, over non-overlapping windows.

    Args:
        model: A loaded Hugging Face causal language model, or the folder of one, including GPTQ
            checkpoints.
        text: The text, or its token ids; None: the evaluation text that ships with halfbyte.
        tokenizer: Needed for a loaded model and a text; a folder has its own.
        window: Tokens per window; None: 2048, or the model's context length if that is shorter.
        windows: Use at most this many windows, from the start of the text; None: all.
        batch_size: Windows per forward pass. Affects speed and memory, not the result.
        add_bos: Add a BOS token once at the start of the text, not in each window.
        dtype: Compute dtype of a model from a folder; "auto": float32 on a CPU, as stored
            elsewhere. A loaded model is not changed.
        device: Where a model from a folder runs; "auto": the first GPU, or the CPU.
        progress: Called after each forward pass with (windows done, total).

    Returns:
        Perplexity with its standard error over windows.

    Raises:
        ConfigError: An invalid setting, or a text that the model cannot take.
        ModelError: The model cannot be loaded, or its logits are NaN.
    """
    subject = open_subject(model, tokenizer=tokenizer, dtype=dtype, device=device)
    split = resolve_windows(subject, text, window=window, limit=windows, add_bos=add_bos)
    accumulator = PerplexityAccumulator()
    for ids in split.batches(batch_size):
        accumulator.update(run_windows(subject, ids), ids[:, 1:])
        if progress is not None:
            progress(accumulator.num_windows, len(split.ids))
    return accumulator.result(dtype=subject.dtype_name, note=split.note)


@torch.inference_mode()
def run_windows(subject: Subject, ids: Tensor) -> Tensor:
    """Run a model on windows and return the logits that predict all tokens except the first.

    Args:
        subject: The model.
        ids: int64 [windows, tokens].

    Returns:
        [windows, tokens - 1, vocabulary], a view without the last position, on the model's device.
    """
    logits: Tensor = subject.model(input_ids=ids.to(subject.input_device), use_cache=False).logits
    return logits[:, :-1]


def split_by_window(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of one or several windows into tuples, one per window.

    Args:
        *tensors: Logits first, then the tensors that belong to them. If the logits have three
            dimensions, the first one of every tensor is the window; if two, there is one window.

    Returns:
        One tuple per window.
    """
    if tensors[0].dim() == 2:
        return [tensors]
    return list(zip(*tensors, strict=True))


def check_not_nan(nll_nats: Tensor, window: int) -> None:
    """Reject likelihoods that are NaN.

    Args:
        nll_nats: [tokens] of one window.
        window: Index of the window, for the message.

    Raises:
        ModelError: One is NaN; says at which position.
    """
    bad = torch.isnan(nll_nats).nonzero()
    if len(bad):
        raise ModelError(
            f"Cannot measure window {window}: the model's logits are NaN at {len(bad)} of "
            f"{len(nll_nats)} positions, first at position {int(bad[0])}. The compute dtype may "
            "have overflowed: use float32 or bfloat16."
        )


def safe_exp(nll_nats: float) -> float:
    """Return the exponential; infinity on overflow."""
    try:
        return math.exp(nll_nats)
    except OverflowError:
        return math.inf
