"""Perplexity: how surprised a model is by a text, per token.

``PerplexityAccumulator`` takes logits window by window from whoever runs the model;
:func:`perplexity` runs it on a text.
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
"""Called after each step with (windows done, windows in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityResult:
    """Perplexity on a text, with how sure it is."""

    perplexity: float
    """e to the mean negative log-likelihood per predicted token."""
    standard_error: float | None
    """Of the perplexity, over windows; None where there is only one window."""
    nll_nats: float
    """Mean negative log-likelihood per predicted token. Unit: nats."""
    nll_standard_error: float | None
    """Of ``nll_nats``, over windows. Unit: nats."""
    num_tokens: int
    """Predicted tokens: all but the first of each window."""
    num_windows: int
    window: int
    """Tokens per window, the first included; the longest where they differ."""
    dtype: str | None = None
    """What the model computed in, where it is known."""
    note: str | None = None
    """What a reader of the numbers should know, or None."""

    def to_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return asdict(self)


class PerplexityAccumulator:
    """Collect the perplexity of one model, window by window."""

    def __init__(self) -> None:
        self._nll = WindowMean()
        self._window = 0

    def update(self, logits: Tensor, target_ids: Tensor) -> None:
        """Add windows that the model was run on.

        Args:
            logits: [tokens, vocabulary] of one window or [windows, tokens, vocabulary] of several:
                the predictions of ``target_ids``, so without the last position of each window.
            target_ids: [tokens] or [windows, tokens]: each window without its first token.

        Raises:
            ModelError: A likelihood is not a number; says where.
        """
        for rows, targets in each_window(logits, target_ids):
            self.add_nll(measure_nll(rows, targets))

    def add_nll(self, nll_nats: Tensor) -> None:
        """Add one window whose negative log-likelihoods per token are known.

        Args:
            nll_nats: [tokens]. Unit: nats.

        Raises:
            ModelError: A likelihood is not a number; says where.
        """
        check_not_nan(nll_nats, self._nll.num_windows)
        self._nll.add(float(nll_nats.sum(dtype=torch.float64)), len(nll_nats))
        self._window = max(self._window, len(nll_nats) + 1)

    def result(self, *, dtype: str | None = None, note: str | None = None) -> PerplexityResult:
        """Give the perplexity of all windows so far.

        Args:
            dtype: What the model computed in; copied into the result.
            note: What a reader should know; copied into the result.

        Returns:
            The result.

        Raises:
            ModelError: No window was added.
        """
        if not self._nll.num_windows:
            raise ModelError("Cannot give a perplexity: no window was measured. Add one first.")
        nll, error = self._nll.mean, self._nll.standard_error
        perplexity = exponential(nll)
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
        model: A loaded Hugging Face causal language model, or the folder of one (of a GPTQ
            checkpoint too).
        text: The text, or its token ids; None: the evaluation text that ships with halfbyte.
        tokenizer: Needed with a loaded model and a text; a folder brings its own.
        window: Tokens per window; None: 2048, or the model's longest where that is less.
        windows: Use at most this many windows, from the start of the text; None: all.
        batch_size: Windows per forward pass. Changes speed and memory, not the result.
        add_bos: Put a BOS token before the text. It stands once at its start, not in each window.
        dtype: What a model from a folder computes in; "auto": float32 on a CPU, as stored
            elsewhere. A loaded model stays as it is.
        device: Where a model from a folder runs; "auto": the first GPU, or the CPU.
        progress: Called after each forward pass.

    Returns:
        Perplexity with its standard error over windows.

    Raises:
        ConfigError: A setting, or a text that does not fit the model; nothing was run.
        ModelError: The model cannot be loaded, or it computes what is not a number.
    """
    subject = open_subject(model, tokenizer=tokenizer, dtype=dtype, device=device)
    cut = resolve_windows(subject, text, window=window, limit=windows, add_bos=add_bos)
    accumulator = PerplexityAccumulator()
    for ids in cut.batches(batch_size):
        accumulator.update(run_windows(subject, ids), ids[:, 1:])
        if progress is not None:
            progress(accumulator.result().num_windows, len(cut.ids))
    return accumulator.result(dtype=subject.dtype_name, note=cut.note)


@torch.inference_mode()
def run_windows(subject: Subject, ids: Tensor) -> Tensor:
    """Run a model on windows and give the logits that predict all but their first tokens.

    Args:
        subject: The model.
        ids: int64 [windows, tokens].

    Returns:
        [windows, tokens - 1, vocabulary], a view without the last position, on the model's device.
    """
    logits: Tensor = subject.model(input_ids=ids.to(subject.input_device), use_cache=False).logits
    return logits[:, :-1]


def each_window(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """Split tensors of one or several windows into windows, side by side.

    Args:
        *tensors: Logits first, then whatever goes with them. Logits of three dimensions hold
            several windows, one per row of every tensor; of two dimensions, one window.

    Returns:
        One tuple per window.
    """
    if tensors[0].dim() == 2:
        return [tensors]
    return list(zip(*tensors, strict=True))


def check_not_nan(nll_nats: Tensor, window: int) -> None:
    """Refuse likelihoods that are not a number.

    Args:
        nll_nats: [tokens] of one window.
        window: Its number, for the message.

    Raises:
        ModelError: One is NaN; says which token.
    """
    bad = torch.isnan(nll_nats).nonzero()
    if len(bad):
        raise ModelError(
            f"Cannot measure window {window}: the model's logits are not numbers at {len(bad)} of "
            f"{len(nll_nats)} positions, first at position {int(bad[0])}. The compute dtype may "
            "overflow: use float32 or bfloat16."
        )


def exponential(nll_nats: float) -> float:
    """Give e to the power; infinity where a float cannot hold it."""
    try:
        return math.exp(nll_nats)
    except OverflowError:
        return math.inf
