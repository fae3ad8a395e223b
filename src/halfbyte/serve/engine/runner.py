"""The interface of runners, which compute logits over a paged KV cache, and the cache itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.errors import ModelError
from halfbyte.model.kv_cache import cache_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Consecutive tokens of one sequence; all tokens before them have been run."""

    tokens: Sequence[int]
    start: int
    """Position of the first token."""
    pages: Sequence[int]
    """Pages of the whole sequence, in the order of its positions."""
    logits: int
    """Number of last tokens to compute logits for; may be 0."""
    is_prompt: bool
    """Whether the tokens are part of the prompt. A token is always computed by the same path,
    however the prompt is split and also when it is recomputed after a failure."""
    adapter: str | None = None


class Runner(Protocol):
    """Runs pieces of many sequences through a model at once."""

    @property
    def description(self) -> str:
        """How the model is computed and why, for people."""

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values."""

    def make_pages(self, pages: int, context: int) -> None:
        """Allocate the KV cache.

        Args:
            pages: Number of pages.
            context: Max tokens of a sequence.
        """

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces, and write their keys and values into their pages.

        Args:
            pieces: Pieces of different sequences.

        Returns:
            Logits of each piece, float32 [piece.logits, vocabulary].
        """

    def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter."""

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter, which no piece uses any more."""


class Pages:
    """The paged KV cache: keys and values of all layers."""

    def __init__(self, layers: Sequence[tuple[Tensor, Tensor]], page_tokens: int) -> None:
        """Set the shapes; nothing is allocated yet.

        Args:
            layers: Keys and values of a single token per layer, [1, heads, 1, width].
            page_tokens: Tokens per page.
        """
        self.page_tokens = page_tokens
        self._samples = tuple(layers)
        self.keys: tuple[Tensor, ...] = ()
        """Per layer, [pages, heads, page_tokens, width]."""
        self.values: tuple[Tensor, ...] = ()

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values in all layers."""
        return sum(keys.nbytes + values.nbytes for keys, values in self._samples)

    @property
    def device(self) -> torch.device:
        """The device of the cache."""
        return self._samples[0][0].device

    def allocate(self, pages: int) -> None:
        """Allocate the memory and write to it, so that it is all committed from the start.

        Args:
            pages: Number of pages.
        """
        self.keys = tuple(self._make(pages, keys) for keys, _ in self._samples)
        self.values = tuple(self._make(pages, values) for _, values in self._samples)

    def allocate_another(self, pages: int) -> Pages:
        """Allocate a second cache for the same model.

        Args:
            pages: Number of pages.

        Returns:
            The new cache.
        """
        made = Pages(self._samples, self.page_tokens)
        made.allocate(pages)
        return made

    def _make(self, pages: int, sample: Tensor) -> Tensor:
        heads, width = sample.shape[1], sample.shape[-1]
        made = sample.new_empty(pages, heads, self.page_tokens, width)
        return made.fill_(0)


def sample_layers(model: PreTrainedModel) -> list[tuple[Tensor, Tensor]]:
    """Run one token to see what a model caches per layer.

    Args:
        model: The model, with its original attention.

    Returns:
        Keys and values of the token in each layer.

    Raises:
        ModelError: The model caches something other than keys and values per token.
    """
    name = type(model).__name__
    device = model.get_input_embeddings().weight.device
    with torch.inference_mode():
        output = model(torch.tensor([[1]], device=device), use_cache=True)
    try:
        layers = getattr(cache_of(output), "layers", [])
    except ModelError:
        layers = []
    found: list[tuple[Tensor, Tensor]] = []
    for index, layer in enumerate(layers):
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        shapes = [tuple(t.shape) for t in (keys, values) if isinstance(t, Tensor)]
        if keys is None or values is None or any(len(s) != 4 or s[2] != 1 for s in shapes):
            raise ModelError(
                f"Cannot serve a {name} with the embedded engine: layer {index} does not cache "
                f"keys and values per token (found {shapes or type(layer).__name__}). Use --engine "
                "vllm."
            )
        found.append((keys, values))
    if not found:
        raise ModelError(
            f"Cannot serve a {name} with the embedded engine: it has no KV cache. Use --engine "
            "vllm."
        )
    return found
