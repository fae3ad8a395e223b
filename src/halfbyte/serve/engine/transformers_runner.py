"""The model's own forward over our pages: any causal language model, on any device.

::

    pieces ──> one row of tokens [1, all], their positions ──> model.forward
    its attention ──> keys and values into the pages; each piece attends to its own sequence

Linears, norms and the head see the tokens of all sequences at once, so weights are read once for
all of them. Attention goes sequence by sequence with torch's own: padding all to the longest, or
one mask over everybody's keys, costs more on a CPU the more sequences there are, and both make a
row's result depend on its neighbours' lengths. Pieces of different adapters are run one adapter
after the other: the linears are then PEFT's own.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, Cache, PreTrainedModel

from halfbyte.errors import ConfigError, ModelError, ServeError, require_extra
from halfbyte.nn.decoder_parts import make_probe_tokens
from halfbyte.serve.engine.runner import Pages, Piece

ATTENTION = "halfbyte_pages"
"""Name under which Transformers knows our attention."""

STEP = "halfbyte_step"
"""The keyword that brings the pieces through the model to it."""

PROBE_TOKENS = 12
"""Tokens that are run both ways before a model is trusted."""

MOST_DEVIATION = 0.05
"""Of the logits, as a share of their spread; bf16 alone makes about 0.02."""


class TransformersRunner:
    """Runs pieces through ``model.forward``."""

    def __init__(self, model: PreTrainedModel, pages: Pages, *, reason: str = "") -> None:
        """Take a model over; its attention becomes ours.

        Args:
            model: Loaded; nobody else runs it from now on.
            pages: The cache; another runner may compute with it as well.
            reason: Why this runner, for the description.
        """
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.reason = reason
        names = inspect.signature(model.forward).parameters
        # Transformers 5.24 renames the argument and warns of the old name.
        self._cache_name = "cache" if "cache" in names else "past_key_values"
        self._keeps = "logits_to_keep" in names
        with torch.inference_mode():
            tokens = torch.tensor([make_probe_tokens(model, PROBE_TOKENS)])
            expected = model(tokens.to(self.device), use_cache=False).logits[0].float()
        self.pages = pages
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        self._active: str | None = None
        self._adapters: set[str] = set()
        self._wrapped: Any = None
        """By PEFT, once there was an adapter."""
        self._check(tokens[0].tolist(), expected)

    @property
    def description(self) -> str:
        """Which way, and why."""
        reason = f": {self.reason}" if self.reason else ""
        return f"Transformers' forward on {self.device.type}{reason}"

    @property
    def bytes_per_token(self) -> int:
        """Of keys and values."""
        return self.pages.bytes_per_token

    def make_pages(self, pages: int, context: int) -> None:
        """Set the cache's memory up."""
        del context  # its own tables are long enough
        self.pages.allocate(pages)

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces, those of each adapter together."""
        groups: dict[str | None, list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            groups[piece.adapter].append(index)
        results: dict[int, Tensor] = {}
        for adapter, indices in groups.items():
            self._switch(adapter)
            found = self._run_alike([pieces[index] for index in indices])
            results.update(zip(indices, found, strict=True))
        return [results[index] for index in range(len(pieces))]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter of safetensors.

        Args:
            name: Of the adapter from now on.
            folder: Where it is.

        Raises:
            ServeError: The name is taken, or the folder holds no adapter for this model.
            MissingExtraError: PEFT is not installed.
        """
        if name in self._adapters:
            raise ServeError(
                f"Cannot load {name}: an adapter of that name is loaded. Unload it first.",
                status=409,
                code="adapter_exists",
            )
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            if not (Path(folder) / file).is_file():
                raise ServeError(
                    f"Cannot load {name}: its folder has no {file}. Save the adapter with PEFT's "
                    "save_pretrained.",
                    code="invalid_adapter",
                )
        with require_extra("peft", "finetune", f"Loading the adapter {name}"):
            from peft import PeftModel
        try:
            if self._wrapped is None:
                # Its layers go into our model, which stays the one that is run.
                self._wrapped = PeftModel.from_pretrained(self.model, folder, adapter_name=name)
            else:
                self._wrapped.load_adapter(folder, adapter_name=name)
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            raise ServeError(
                f"Cannot load {name}: it does not fit this model: {error}", code="invalid_adapter"
            ) from error
        self._adapters.add(name)
        self.model.eval()
        self._active = name
        self._switch(None)

    def unload_adapter(self, name: str) -> None:
        """Take an adapter away."""
        self._switch(None)
        self._wrapped.delete_adapter(name)
        self._adapters.discard(name)

    def _switch(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        layers = self._wrapped.base_model
        if adapter is None:
            layers.disable_adapter_layers()
        else:
            layers.enable_adapter_layers()
            self._wrapped.set_adapter(adapter)
        self._active = adapter

    def _run_alike(self, pieces: Sequence[Piece]) -> list[Tensor]:
        tokens = [token for piece in pieces for token in piece.tokens]
        places = [range(piece.start, piece.start + len(piece.tokens)) for piece in pieces]
        positions = [position for place in places for position in place]
        ends = torch.tensor([len(piece.tokens) for piece in pieces]).cumsum(0).tolist()
        rows = [range(end - piece.logits, end) for end, piece in zip(ends, pieces, strict=True)]
        wanted = [row for part in rows for row in part]
        index = torch.tensor(wanted, dtype=torch.long, device=self.device)
        keywords: dict[str, Any] = {
            self._cache_name: _PagedCache(),
            STEP: _Step(self.pages, pieces),
        }
        if self._keeps:
            keywords["logits_to_keep"] = index
        with torch.inference_mode():
            logits: Tensor = self.model(
                torch.tensor([tokens], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=True,
                **keywords,
            ).logits[0]
            if not self._keeps:
                logits = logits[index]
        return list(torch.split(logits.float(), [piece.logits for piece in pieces]))

    def _check(self, tokens: list[int], expected: Tensor) -> None:
        """Run some tokens both ways: two sequences, the first one in two pieces."""
        pages, size = self.pages, self.pages.page_tokens
        count = -(-len(tokens) // size)
        self.pages = pages.make_own(2 * count)
        tables = [range(count), range(count, 2 * count)]
        half = len(tokens) // 2
        parts = [(tokens[:half], 0, 0), (tokens[half:], half, 0), (tokens, 0, 1)]
        first, rest, whole = (
            Piece(tokens=part, start=start, pages=tables[i], logits=len(part), is_prompt=True)
            for part, start, i in parts
        )
        try:
            begun = self.run([first])[0]
            ended, other = self.run([rest, whole])
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            raise ModelError(
                f"Cannot serve a {type(self.model).__name__} by the embedded engine: its forward "
                f"does not take other attention ({error}). Serve it with --engine vllm."
            ) from error
        self.pages = pages
        for found in (torch.cat([begun, ended]), other):
            deviation = float((found - expected).norm() / expected.norm())
            if not deviation <= MOST_DEVIATION:
                raise ModelError(
                    f"Cannot serve a {type(self.model).__name__} by the embedded engine: its "
                    f"logits deviate by {deviation:.3f} of their size from the model's own, "
                    f"allowed are {MOST_DEVIATION}. Serve it with --engine vllm."
                )


class _Step:
    """The pieces of one forward, and where their keys and values go."""

    def __init__(self, pages: Pages, pieces: Sequence[Piece]) -> None:
        self.pages = pages
        device = pages.device
        size = pages.page_tokens
        self.parts = []
        tables, places = [], []
        row = 0
        for piece in pieces:
            length = piece.start + len(piece.tokens)
            table = torch.tensor(list(piece.pages[: -(-length // size)]), device=device)
            self.parts.append((row, row + len(piece.tokens), length, table))
            spots = torch.arange(piece.start, length, device=device)
            tables.append(table[spots // size])
            places.append(spots % size)
            row += len(piece.tokens)
        self._tables, self._places = torch.cat(tables), torch.cat(places)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put rows [1, heads, rows, width] into their pages."""
        self.pages.keys[layer][self._tables, :, self._places] = keys[0].transpose(0, 1)
        self.pages.values[layer][self._tables, :, self._places] = values[0].transpose(0, 1)


class _PagedCache(Cache):  # type: ignore[misc]
    """Gives a layer's new keys and values back as they are: the attention stores them."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self, key_states: Tensor, value_states: Tensor, *_arguments: Any, **_keywords: Any
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self, *_arguments: Any, **_keywords: Any) -> int:
        return 0


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Attend, each piece to its own sequence; the signature is Transformers'.

    Args:
        module: The attention layer, for its index.
        query: [1, heads, rows, width].
        key: Of the same rows, [1, key heads, rows, width].
        value: As key.
        attention_mask: None; what may be seen follows from the pieces.
        scaling: Of the scores.
        sliding_window: Tokens back, at most.
        softcap: Scores are bent to less than this.
        **keywords: With the step among them.

    Returns:
        [1, rows, heads, width], and no weights.

    Raises:
        ConfigError: The model was called by somebody else.
    """
    step: _Step | None = keywords.get(STEP)
    if step is None:
        raise ConfigError("This model belongs to a serving engine; load another one to run it.")
    layer: int = module.layer_idx  # type: ignore[assignment]
    step.store(layer, key, value)
    outputs = []
    for first, last, length, table in step.parts:
        keys = _gather(step.pages.keys[layer], table, length)
        values = _gather(step.pages.values[layer], table, length)
        rows = last - first
        mask = None
        if rows > 1 or (sliding_window is not None and length > sliding_window):
            at = torch.arange(length - rows, length, device=query.device)[:, None]
            seen = torch.arange(length, device=query.device)[None]
            mask = seen <= at
            if sliding_window is not None:
                mask &= seen > at - sliding_window
        part = query[:, :, first:last]
        outputs.append(_attend_one(part, keys, values, mask, scaling, softcap))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Give a sequence's [1, heads, length, width]."""
    found = pages[table].transpose(0, 1)
    return found.reshape(1, found.shape[0], -1, found.shape[-1])[:, :, :length]


def _attend_one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> Tensor:
    if softcap is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    scores = (
        query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return torch.softmax(scores.float(), dim=-1).to(query.dtype) @ values
