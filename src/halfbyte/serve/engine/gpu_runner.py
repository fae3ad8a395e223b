"""Runs decode steps on a GPU as CUDA graphs; prefill and adapters by Transformers' forward.

::

    pieces ──prompts, adapters──> TransformersRunner ──> pages, logits
           └─decode, one token each──> the CUDA graph of the batch size, rounded to a power of two

Both share the pages. The step (:mod:`halfbyte.nn.gpu_step`) is recorded once per batch size, which
is rounded up; padding rows write to a page of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.nn.decoder_parts import find_drift, make_probe_tokens
from halfbyte.nn.gpu_step import (
    GpuStep,
    NotCapturable,
    find_deviation,
    find_mismatch,
    record,
)
from halfbyte.serve.engine.runner import Pages, Piece
from halfbyte.serve.engine.transformers_runner import TransformersRunner

PROBE_TOKENS = 8
"""Tokens with which both paths are compared when a model is loaded."""


class GpuRunner:
    """Runs decode steps as CUDA graphs."""

    def __init__(self, model: PreTrainedModel, pages: Pages) -> None:
        """Prepare a model.

        Args:
            model: A model for which find_mismatch returns None.
            pages: The KV cache.
        """
        self.model = model
        self.pages = pages
        self.device = model.get_input_embeddings().weight.device
        # Before TransformersRunner replaces the attention: after that the model only runs pieces.
        obstacle = find_mismatch(model) or find_drift(model)
        self._plain = TransformersRunner(model, pages, reason="prompts")
        self.obstacle = obstacle or self._find_deviation()
        """Why steps are not recorded; None if they are."""
        self._context = 0
        self._step: GpuStep | None = None
        self._recorded: dict[int, _RecordedStep] = {}

    @property
    def description(self) -> str:
        """How the model is computed, and why."""
        if self.obstacle is None:
            return f"recorded steps on {self.device.type}; prompts by Transformers' forward"
        return f"{self._plain.description}; no recorded steps: {self.obstacle}"

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values."""
        return self.pages.bytes_per_token

    def make_pages(self, pages: int, context: int) -> None:
        """Allocate the KV cache, with an additional page for padding rows."""
        self.pages.allocate(pages + 1)
        self._context = context
        self._gather_weights()

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces: decode steps as a CUDA graph, all others by Transformers' forward."""
        decode = [index for index, piece in enumerate(pieces) if self._can_use_graph(piece)]
        others = [index for index in range(len(pieces)) if index not in set(decode)]
        results: dict[int, Tensor] = {}
        if others:
            found = self._plain.run([pieces[index] for index in others])
            results.update(zip(others, found, strict=True))
        if decode:
            found = self._run_graph([pieces[index] for index in decode])
            results.update(zip(decode, found, strict=True))
        return [results[index] for index in range(len(pieces))]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter."""
        try:
            self._plain.load_adapter(name, folder)
        finally:
            # PEFT uses load_state_dict, which packs the base model's weights anew.
            self._gather_weights()

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        self._plain.unload_adapter(name)

    def _can_use_graph(self, piece: Piece) -> bool:
        is_decode = len(piece.tokens) == 1 and not piece.is_prompt
        return is_decode and piece.adapter is None and self._step is not None

    def _gather_weights(self) -> None:
        self._recorded.clear()
        self._step = None
        # An adapter of a mixture of experts is part of the module that the step would run.
        if self.obstacle is None and find_mismatch(self.model) is None:
            self._step = _make_step(self.model, self.pages, self._context)

    def _run_graph(self, pieces: Sequence[Piece]) -> list[Tensor]:
        assert self._step is not None
        rows = 1 << (len(pieces) - 1).bit_length()
        if rows not in self._recorded:
            max_pages = -(-self._context // self.pages.page_tokens)
            padding_page = self.pages.keys[0].shape[0] - 1
            try:
                self._recorded[rows] = _RecordedStep(
                    self._step, rows, max_pages, padding_page, self.device
                )
            except NotCapturable as error:
                self.obstacle, self._step = str(error), None
                return self._plain.run(pieces)
        logits = self._recorded[rows].run(pieces)
        return [logits[row, None][: piece.logits] for row, piece in enumerate(pieces)]

    def _find_deviation(self) -> str | None:
        """Compare the step with Transformers' forward; a second chunking gives the tolerance."""
        pages = self.pages
        size = pages.page_tokens
        count = -(-(PROBE_TOKENS + 1) // size)
        probe_pages = pages.allocate_another(count)
        self._plain.pages = probe_pages
        tokens = make_probe_tokens(self.model, PROBE_TOKENS + 1)

        def run(first: int, last: int) -> Tensor:
            piece = Piece(
                tokens=tokens[first:last],
                start=first,
                pages=range(count),
                logits=1,
                is_prompt=True,
            )
            return self._plain.run([piece])[0][0]

        run(0, PROBE_TOKENS)
        again = run(PROBE_TOKENS - 1, PROBE_TOKENS + 1)
        expected = run(PROBE_TOKENS, PROBE_TOKENS + 1)
        self._plain.pages = pages
        with torch.inference_mode():
            found = _make_step(self.model, probe_pages, count * size)(
                torch.tensor(tokens[-1:], device=self.device),
                torch.tensor([PROBE_TOKENS], device=self.device),
                torch.arange(count, dtype=torch.int32, device=self.device)[None],
            )[0]
        deviation = find_deviation(found, expected, again)
        name = type(self.model).__name__
        return deviation and f"a {name} computes something else: {deviation}"


class _RecordedStep:
    """A step recorded for one batch size, with its input tensors."""

    def __init__(
        self, step: GpuStep, rows: int, max_pages: int, padding_page: int, device: torch.device
    ) -> None:
        self._step = step
        self._rows = rows
        self._padding_page = padding_page
        # Token ids and positions.
        self._inputs = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._tables = torch.full((rows, max_pages), padding_page, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph, self._logits = record(self._compute, device)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Return logits [rows, vocabulary], float32, including those of padding rows."""
        padding = self._rows - len(pieces)
        tokens = [piece.tokens[0] for piece in pieces] + [0] * padding
        positions = [piece.start for piece in pieces] + [0] * padding
        tables = torch.full(self._tables.shape, self._padding_page, dtype=torch.int32)
        for row, piece in enumerate(pieces):
            tables[row, : len(piece.pages)] = torch.tensor(list(piece.pages), dtype=torch.int32)
        with torch.inference_mode():
            self._inputs.copy_(torch.tensor([tokens, positions]))
            self._tables.copy_(tables)
            if self._graph is None:
                return self._compute()
            self._graph.replay()
            # The next replay overwrites the same tensor.
            return self._logits.clone()

    def _compute(self) -> Tensor:
        return self._step(self._inputs[0], self._inputs[1], self._tables).float()


def _make_step(model: PreTrainedModel, pages: Pages, context: int) -> GpuStep:
    pairs = list(zip(pages.keys, pages.values, strict=True))
    return GpuStep(model, pairs, context, bare=True)
