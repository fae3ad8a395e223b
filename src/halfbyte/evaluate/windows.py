"""Text to windows of token ids: how every measurement here cuts its text.

The text is tokenised whole, in one piece and without a BOS token, then cut into non-overlapping
windows of equal length. An incomplete last window is left out, so that every window weighs the
same. Inside a window every token but the first is predicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import ConfigError

DEFAULT_WINDOW = 2048
"""Tokens per window where neither the caller nor the model sets a smaller one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Windows:
    """Windows of token ids, ready to be run."""

    ids: Tensor
    """int64 [windows, tokens], on the CPU."""
    note: str | None = None
    """What a reader of the numbers should know about the cut, or None."""

    @property
    def length(self) -> int:
        """Tokens per window, the first included, which is not predicted."""
        return self.ids.shape[1]

    def batches(self, size: int) -> tuple[Tensor, ...]:
        """Split the windows into batches for the model.

        Args:
            size: Windows per batch.

        Returns:
            int64 [up to size, tokens] each.

        Raises:
            ConfigError: A size below 1.
        """
        if size < 1:
            raise ConfigError(f"batch_size is {size}; it must be 1 or more.")
        return torch.split(self.ids, size)


def tokenize_text(tokenizer: Any, text: str, *, add_bos: bool = False) -> Tensor:
    """Turn a whole text into token ids, in one piece.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: Any length.
        add_bos: Put the tokenizer's BOS token before the text, once.

    Returns:
        int64 [tokens].

    Raises:
        ConfigError: A BOS token is asked for and the tokenizer has none.
    """
    # verbose=False: a text longer than the model's context is what we cut up next.
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if add_bos:
        if tokenizer.bos_token_id is None:
            raise ConfigError(
                f"Cannot put a BOS token before the text: {type(tokenizer).__name__} has none. "
                "Leave add_bos off."
            )
        ids.insert(0, tokenizer.bos_token_id)
    return torch.tensor(ids, dtype=torch.int64)


def split_windows(
    ids: Tensor | Sequence[int], length: int = DEFAULT_WINDOW, *, limit: int | None = None
) -> Windows:
    """Cut token ids into non-overlapping windows of one length.

    Args:
        ids: Token ids of the whole text, one-dimensional.
        length: Tokens per window. Ids shorter than that become one window of their own length,
            with a note.
        limit: Use at most this many windows, from the start; None: all.

    Returns:
        The windows; the incomplete last one is left out.

    Raises:
        ConfigError: A length or limit that cannot be, or too few ids to predict one token.
    """
    if length < 2:
        raise ConfigError(f"window is {length} tokens; it must be 2 or more to predict one token.")
    if limit is not None and limit < 1:
        raise ConfigError(f"windows is {limit}; it must be 1 or more. Leave it out to use all.")
    flat = torch.as_tensor(ids, dtype=torch.int64).cpu()
    if flat.dim() != 1:
        raise ConfigError(
            f"Cannot split token ids of shape {list(flat.shape)} into windows: one dimension is "
            "needed, the ids of the whole text."
        )
    if len(flat) < 2:
        raise ConfigError(
            f"Cannot measure on a text of {len(flat)} tokens: at least 2 are needed to predict "
            "one. Give a longer text."
        )
    if len(flat) < length:
        return Windows(
            ids=flat.unsqueeze(0),
            note=f"The text has {len(flat)} tokens, less than one window of {length}: measured on "
            "one shorter window, without a standard error.",
        )
    count = len(flat) // length
    note = None
    if limit is not None and limit > count:
        note = f"The text has {count} windows of {length} tokens; {limit} were asked for."
    count = count if limit is None else min(count, limit)
    return Windows(ids=flat[: count * length].reshape(count, length), note=note)
