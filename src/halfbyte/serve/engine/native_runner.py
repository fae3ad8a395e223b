"""Runs pieces with the compiled decoder: all rows of all sequences in one call of the library.

Activations between layers are float32, and a row's result is independent of all others, bit by bit:
of the rest of the batch, of how the prompt was split into pieces, and of what came from the cache.
Prefill uses matrix units if the CPU has them, decode steps never do. Pieces with an adapter are run
by Transformers' forward over the same pages, because low-rank products for some rows of every
linear would need their own kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.kernels.native_library import Decoder, has_tiles, open_library
from halfbyte.nn.native_decoder import NativeDecoder, get_sizes
from halfbyte.nn.native_head import NativeHead
from halfbyte.nn.native_scratch import plan_scratch_bytes
from halfbyte.serve.engine.runner import Pages, Piece
from halfbyte.serve.engine.transformers_runner import TransformersRunner

HEAD_ROWS = 16
"""Rows of logits per call: a rounded head would compute more rows by another path."""


class NativeRunner:
    """Runs pieces with NativeDecoder."""

    def __init__(self, model: PreTrainedModel, pages: Pages, head_bits: int = 16) -> None:
        """Prepare a model.

        Args:
            model: A model for which find_obstacle returns None.
            pages: The KV cache.
            head_bits: 16, or the bits of a rounded head.
        """
        self.model = model
        self.pages = pages
        self._head = NativeHead(model.get_output_embeddings(), head_bits)
        self._context = 0
        self._logits: dict[bool, Tensor] = {}
        self._decoder: NativeDecoder | None = None
        self._adapted: TransformersRunner | None = None

    @property
    def description(self) -> str:
        """How the model is computed, and why."""
        return f"compiled decoder ({open_library().isa}), head of {self._head.bits} bits"

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values."""
        return self.pages.bytes_per_token

    def plan_step_bytes(self, tokens: int, context: int) -> int:
        """Return an upper bound of the memory of a step besides weights, cache and logits.

        Args:
            tokens: Max tokens of a step.
            context: Max tokens of a sequence.

        Returns:
            Bytes.
        """
        sizes = get_sizes(self.model)
        scratch = [
            plan_scratch_bytes(
                Decoder(**sizes), tokens, context, tiles=tiles, threads=torch.get_num_threads()
            )
            for tiles in {False, self.model.dtype == torch.bfloat16 and has_tiles()}
        ]
        # The embeddings, and hidden states in and out in float32.
        return max(scratch) + 3 * 4 * tokens * sizes["hidden"]

    def make_pages(self, pages: int, context: int) -> None:
        """Allocate the KV cache."""
        self.pages.allocate(pages)
        self._context = context
        self._gather_weights()

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces: decode steps, prompts, and those with adapters by Transformers' forward."""
        groups: dict[str, list[int]] = {"answer": [], "prompt": [], "adapter": []}
        for index, piece in enumerate(pieces):
            kind = "prompt" if piece.is_prompt else "answer"
            groups[kind if piece.adapter is None else "adapter"].append(index)
        results: dict[int, Tensor] = {}
        for kind, indices in groups.items():
            chosen = [pieces[index] for index in indices]
            if not chosen:
                continue
            if kind == "adapter":
                assert self._adapted is not None
                found = self._adapted.run(chosen)
            else:
                found = self._run_plain(chosen, prompt=kind == "prompt")
            results.update(zip(indices, found, strict=True))
        return [results[index] for index in range(len(pieces))]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter."""
        if self._adapted is None:
            self._adapted = TransformersRunner(self.model, self.pages, reason="adapters")
        try:
            self._adapted.load_adapter(name, folder)
        finally:
            # PEFT uses load_state_dict, which packs the base model's weights anew.
            self._gather_weights()

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        assert self._adapted is not None
        self._adapted.unload_adapter(name)

    def _gather_weights(self) -> None:
        cache = (self.pages.keys, self.pages.values)
        self._decoder = NativeDecoder(self.model, self._context, cache)

    def _run_plain(self, pieces: Sequence[Piece], *, prompt: bool) -> list[Tensor]:
        assert self._decoder is not None
        tokens: list[int] = []
        positions: list[int] = []
        tables: list[int] = []
        starts: list[int] = []
        logit_rows: list[int] = []
        for piece in pieces:
            count = len(piece.tokens)
            starts += [len(tables)] * count
            tables += piece.pages
            tokens += piece.tokens
            positions += range(piece.start, piece.start + count)
            logit_rows += range(len(tokens) - piece.logits, len(tokens))
        with torch.inference_mode():
            hidden = self._decoder.run(tokens, positions, tables, starts, prompt=prompt)
            logits = self._multiply_head(hidden[logit_rows], prompt=prompt)
        return list(torch.split(logits, [piece.logits for piece in pieces]))

    def _multiply_head(self, hidden: Tensor, *, prompt: bool) -> Tensor:
        """Compute logits, in a reused buffer if there are few rows."""
        if hidden.shape[0] > HEAD_ROWS:
            parts = torch.split(hidden, HEAD_ROWS)
            return torch.cat([self._head(part) for part in parts])
        if prompt not in self._logits:
            vocabulary = self.model.get_output_embeddings().out_features
            self._logits[prompt] = hidden.new_empty(HEAD_ROWS, vocabulary)
        return self._head(hidden, self._logits[prompt][: hidden.shape[0]])
