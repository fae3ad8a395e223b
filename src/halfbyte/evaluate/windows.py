"""Splits a text into windows of token ids, the same way for all measurements.

The text is tokenized in one piece, without a BOS token, and split into non-overlapping windows of
equal length. An incomplete last window is dropped, so that all windows weigh the same. In each
window every token except the first is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError

DEFAULT_WINDOW = 2048
"""Tokens per window, unless the caller sets it or the model's context is shorter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of token ids."""

    ids: Tensor
    """int64 [windows, tokens], on the CPU."""
    note: str | None = None
    """A caveat about the split, or None."""

    @property
    def length(self) -> int:
        """Tokens per window, including the first, which is not predicted."""
        return self.ids.shape[1]

    def batches(self, size: int) -> tuple[Tensor, ...]:
        """Group the windows into batches.

        Args:
            size: Windows per batch.

        Returns:
            int64 [up to size, tokens] each.

        Raises:
            ConfigError: The size is below 1.
        """
        if size < 1:
            raise ConfigError(f"batch_size is {size}; it must be 1 or more.")
        return torch.split(self.ids, size)


def tokenize_text(tokenizer: Any, text: str, *, add_bos: bool = False) -> Tensor:
    """Tokenize a whole text in one piece.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: Of any length.
        add_bos: Add the tokenizer's BOS token once at the start.

    Returns:
        int64 [tokens].

    Raises:
        ConfigError: ``add_bos`` is set and the tokenizer has no BOS token.
    """
    # verbose=False: no warning about a text longer than the context; it is split next.
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if add_bos:
        if tokenizer.bos_token_id is None:
            raise ConfigError(
                f"Cannot add a BOS token to the text: {type(tokenizer).__name__} has none. "
                "Leave add_bos off."
            )
        ids.insert(0, tokenizer.bos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def split_windows(
    ids: Tensor | Sequence[int], length: int = DEFAULT_WINDOW, *, limit: int | None = None
) -> Windows:
    """Split token ids into non-overlapping windows of one length.

    Args:
        ids: Token ids of the whole text, one-dimensional.
        length: Tokens per window. A shorter text becomes one window of its own length, with a
            note.
        limit: Use at most this many windows, from the start; None: all.

    Returns:
        The windows; an incomplete last one is dropped.

    Raises:
        ConfigError: The length or limit is invalid, or there are too few ids to predict a token.
    """
    if length < 2:
        raise ConfigError(f"window is {length} tokens; it must be 2 or more to predict one token.")
    if limit is not None and limit < 1:
        raise ConfigError(f"windows is {limit}; it must be 1 or more. Leave it out to use all.")
    flat = torch.as_tensor(ids, dtype=torch.int64).cpu()
    if flat.dim() != 1:
        raise ConfigError(
            f"Cannot split token ids of shape {list(flat.shape)} into windows: they must have one "
            "dimension, the ids of the whole text."
        )
    if len(flat) < 2:
        raise ConfigError(
            f"Cannot measure on a text of {len(flat)} tokens: at least 2 are needed to predict "
            "one. Give a longer text."
        )
    if len(flat) < length:
        return Windows(
            ids=flat.unsqueeze(0),
            note=f"The text has {len(flat)} tokens, less than one window of {length}. It was "
            "measured as one shorter window, without a standard error.",
        )
    count = len(flat) // length
    note = None
    if limit is not None and limit > count:
        note = f"The text has {count} windows of {length} tokens; {limit} were requested."
    count = count if limit is None else min(count, limit)
    return Windows(ids=flat[: count * length].reshape(count, length), note=note)
