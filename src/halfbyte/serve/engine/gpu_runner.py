"""Answers on a GPU by recorded steps; prompts and adapters by Transformers' forward.

::

    pieces ──prompts, adapters──> TransformersRunner ──> pages, logits
           └─answers, a token each──> the recorded step for so many rows, or the next power of two

Both share the pages. A step of few launches (:mod:`halfbyte.nn.gpu_step`) is recorded once for each
number of rows; rows that nobody needs write to a page of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from halfbyte.nn.decoder_parts import find_drift, make_probe_tokens
from halfbyte.nn.gpu_step import GpuStep, find_deviation, find_mismatch, record
from halfbyte.serve.engine.runner import Pages, Piece
from halfbyte.serve.engine.transformers_runner import TransformersRunner

PROBE_TOKENS = 8
"""Tokens that are run both ways before a model is trusted."""


class GpuRunner:
    """Runs answers by recorded steps."""

    def __init__(self, model: PreTrainedModel, pages: Pages) -> None:
        """Take a model over.

        Args:
            model: One of which find_mismatch said None.
            pages: The cache.
        """
        self.model = model
        self.pages = pages
        self.device = model.get_input_embeddings().weight.device
        # Before the model is taken over: after that it runs pieces only.
        obstacle = find_mismatch(model) or find_drift(model)
        self._plain = TransformersRunner(model, pages, reason="prompts")
        self.obstacle = obstacle or self._find_deviation()
        """Why no steps are recorded; None where they are."""
        self._context = 0
        self._step: GpuStep | None = None
        self._recorded: dict[int, _Recorded] = {}

    @property
    def description(self) -> str:
        """Which way, and why."""
        if self.obstacle is None:
            return f"recorded steps on {self.device.type}; prompts by Transformers' forward"
        return f"{self._plain.description}; no recorded steps: {self.obstacle}"

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""
        return self.pages.bytes_per_token

    def make_pages(self, pages: int, context: int) -> None:
        """Set the cache's memory up, with a page for rows that nobody needs."""
        self.pages.allocate(pages + 1)
        self._context = context
        self._gather_weights()

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces: answers of a token each by a recorded step, all others as they are."""
        quick = [index for index, piece in enumerate(pieces) if self._is_quick(piece)]
        others = [index for index in range(len(pieces)) if index not in set(quick)]
        results: dict[int, Tensor] = {}
        if others:
            found = self._plain.run([pieces[index] for index in others])
            results.update(zip(others, found, strict=True))
        if quick:
            found = self._run_quickly([pieces[index] for index in quick])
            results.update(zip(quick, found, strict=True))
        return [results[index] for index in range(len(pieces))]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter."""
        self._plain.load_adapter(name, folder)
        # PEFT loads by load_state_dict, which packs the base's weights anew.
        self._gather_weights()

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away."""
        self._plain.unload_adapter(name)

    def _is_quick(self, piece: Piece) -> bool:
        alone = len(piece.tokens) == 1 and not piece.is_prompt and piece.adapter is None
        return alone and self._step is not None

    def _gather_weights(self) -> None:
        self._recorded.clear()
        if self.obstacle is None:
            self._step = _make_step(self.model, self.pages, self._context)

    def _run_quickly(self, pieces: Sequence[Piece]) -> list[Tensor]:
        assert self._step is not None
        count = 1 << (len(pieces) - 1).bit_length()
        if count not in self._recorded:
            most = -(-self._context // self.pages.page_tokens)
            spare = self.pages.keys[0].shape[0] - 1
            self._recorded[count] = _Recorded(self._step, count, most, spare, self.device)
        logits = self._recorded[count].run(pieces)
        return [logits[row, None][: piece.logits] for row, piece in enumerate(pieces)]

    def _find_deviation(self) -> str | None:
        """Run a token both ways, and by Transformers' forward in other pieces too."""
        pages = self.pages
        size = pages.page_tokens
        count = -(-(PROBE_TOKENS + 1) // size)
        own = pages.make_own(count)
        self._plain.pages = own
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
            found = _make_step(self.model, own, count * size)(
                torch.tensor(tokens[-1:], device=self.device),
                torch.tensor([PROBE_TOKENS], device=self.device),
                torch.arange(count, dtype=torch.int32, device=self.device)[None],
            )[0]
        deviation = find_deviation(found, expected, again)
        name = type(self.model).__name__
        return deviation and f"a {name} computes something else: {deviation}"


class _Recorded:
    """A step of so many rows, with the tensors that it reads."""

    def __init__(
        self, step: GpuStep, rows: int, most_pages: int, spare: int, device: torch.device
    ) -> None:
        self._step = step
        self._rows = rows
        self._spare = spare
        self._places = torch.zeros(2, rows, dtype=torch.int64, device=device)
        self._tables = torch.full((rows, most_pages), spare, dtype=torch.int32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._graph, self._logits = record(self._compute, device)

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Logits [rows, vocabulary], float32; those of rows that nobody needs among them."""
        left = self._rows - len(pieces)
        tokens = [piece.tokens[0] for piece in pieces] + [0] * left
        positions = [piece.start for piece in pieces] + [0] * left
        tables = torch.full(self._tables.shape, self._spare, dtype=torch.int32)
        for row, piece in enumerate(pieces):
            tables[row, : len(piece.pages)] = torch.tensor(list(piece.pages), dtype=torch.int32)
        with torch.inference_mode():
            self._places.copy_(torch.tensor([tokens, positions]))
            self._tables.copy_(tables)
            if self._graph is None:
                return self._compute()
            self._graph.replay()
            # The next step of these rows writes to the same place.
            return self._logits.clone()

    def _compute(self) -> Tensor:
        return self._step(self._places[0], self._places[1], self._tables).float()


def _make_step(model: PreTrainedModel, pages: Pages, context: int) -> GpuStep:
    pairs = list(zip(pages.keys, pages.values, strict=True))
    return GpuStep(model, pairs, context, bare=True)
