"""What computes logits from tokens, over pages of keys and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.nn.native_decoder import cache_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens of one sequence that follow each other; all before them have been run."""

    tokens: Sequence[int]
    start: int
    """Position of the first."""
    pages: Sequence[int]
    """Of the whole sequence, in the order of its positions."""
    logits: int
    """Of so many of the last tokens they are wanted; 0: of none."""
    is_prompt: bool
    """Whether they are the prompt's: a token is always run the same way, however a prompt was cut
    and whatever failed in between."""
    adapter: str | None = None


class Runner(Protocol):
    """A model, ready to run pieces of many sequences at once."""

    @property
    def description(self) -> str:
        """Which way, and why, for people."""

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""

    def make_pages(self, pages: int, context: int) -> None:
        """Set the cache's memory up.

        Args:
            pages: How many.
            context: Positions that a sequence can have.
        """

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces, and write their keys and values into their pages.

        Args:
            pieces: Of different sequences.

        Returns:
            For each, float32 [piece.logits, vocabulary].
        """

    def load_adapter(self, name: str, folder: str) -> None:
        """Make an adapter usable under a name."""

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away; no piece uses it any more."""


class Pages:
    """Keys and values of all layers, in pages that belong to nobody for good."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], page_tokens: int) -> None:
        """Keep what one token of each layer looks like.

        Args:
            layers: Keys and values of a single token, [1, heads, 1, width].
            page_tokens: Tokens to a page.
        """
        self.page_tokens = page_tokens
        self._samples = tuple(layers)
        self.keys: tuple[Tensor, ...] = ()
        """Of each layer, [pages, heads, page_tokens, width]."""
        self.values: tuple[Tensor, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._samples)

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return self._samples[0][0].device

    def allocate(self, pages: int) -> None:
        """Take the memory, and touch it: what is planned is there from the start.

        Args:
            pages: How many.
        """
        self.keys = tuple(self._make(pages, keys) for keys, _ in self._samples)
        self.values = tuple(self._make(pages, values) for _, values in self._samples)

    def make_own(self, pages: int) -> Pages:
        """Make another cache for the same model.

        Args:
            pages: How many.

        Returns:
            It, with its memory.
        """
        made = Pages(self._samples, self.page_tokens)
        made.allocate(pages)
        return made

    def _make(self, pages: int, sample: Tensor) -> Tensor:
        heads, width = sample.shape[1], sample.shape[-1]
        made = sample.new_empty(pages, heads, self.page_tokens, width)
        return made.fill_(0)


def sample_layers(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Find out what a model keeps of a token, by running one.

    Args:
        model: With its own attention.

    Returns:
        Keys and values of each layer.

    Raises:
        ModelError: It keeps something else than keys and values of each token.
    """
    name = type(model).__name__
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        cache = cache_of(model(torch.tensor([[1]], device=device), use_cache=True))
    found: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(getattr(cache, "layers", [])):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        shapes = [tuple(t.shape) for t in (keys, values) if isinstance(t, Tensor)]
        if keys is None or values is None or any(len(s) != 4 or s[2] != 1 for s in shapes):
            raise ModelError(
                f"Cannot serve a {name} by the embedded engine: layer {index} keeps no keys and "
                f"values per token (found {shapes or type(layer).__name__}). Serve it with "
                "--engine vllm."
            )
        found.append((keys, values))
    if not found:
        raise ModelError(
            f"Cannot serve a {name} by the embedded engine: it keeps no cache of keys and values. "
            "Serve it with --engine vllm."
        )
    return found
