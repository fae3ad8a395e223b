"""Runs pieces with Transformers' forward: any causal language model, on any device.

::

    pieces ──> tokens [1, all], their positions ──> model.forward
    its attention ──> writes keys and values to the pages; each piece attends to its own sequence

Linears, norms and the head process the tokens of all sequences together, so weights are read once.
Attention runs torch's SDPA per sequence: padding to the longest sequence, or one mask over all
keys, becomes slower on a CPU with every sequence, and would make a row's result depend on the
lengths of others. Pieces with adapters are run adapter by adapter, through PEFT's linears.
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

from halfbyte.checkpoint.labels import ADAPTER_CONFIG
from halfbyte.errors import ConfigError, HalfbyteError, ModelError, ServeError, require_extra
from halfbyte.model.kv_cache import cache_argument
from halfbyte.nn.decoder_parts import make_probe_tokens
from halfbyte.serve.engine.adapter_check import WEIGHTS_FILE, find_base_change
from halfbyte.serve.engine.runner import Pages, Piece

ATTENTION = "halfbyte_pages"
"""Name under which our attention is registered with Transformers."""

STEP = "halfbyte_step"
"""Keyword argument that passes the step through the model to our attention."""

PROBE_TOKENS = 12
"""Tokens with which both attentions are compared when a model is loaded."""

MAX_DEVIATION = 0.05
"""Norm of the logits' deviation relative to their own; bf16 rounding gives about 0.02."""


class TransformersRunner:
    """Runs pieces through ``model.forward``."""

    def __init__(self, model: PreTrainedModel, pages: Pages, *, reason: str = "") -> None:
        """Replace a model's attention and check the result.

        Args:
            model: The loaded model; only this runner may run it from now on.
            pages: The KV cache; it may be shared with another runner.
            reason: Why this runner was chosen, for the description.
        """
        self.model = model
        self.device = model.get_input_embeddings().weight.device
        self.reason = reason
        names = inspect.signature(model.forward).parameters
        self._cache_name = cache_argument(model)
        self._has_logits_to_keep = "logits_to_keep" in names
        with torch.inference_mode():
            tokens = torch.tensor([make_probe_tokens(model, PROBE_TOKENS)])
            expected = model(tokens.to(self.device), use_cache=False).logits[0].float()
        self.pages = pages
        AttentionInterface.register(ATTENTION, attend)
        model.set_attn_implementation(ATTENTION)
        self._active: str | None = None
        self._adapters: set[str] = set()
        self._peft_model: Any = None
        """Set when the first adapter is loaded."""
        self._check(tokens[0].tolist(), expected)

    @property
    def description(self) -> str:
        """How the model is computed, and why."""
        reason = f": {self.reason}" if self.reason else ""
        return f"Transformers' forward on {self.device.type}{reason}"

    @property
    def bytes_per_token(self) -> int:
        """Size of a token's keys and values."""
        return self.pages.bytes_per_token

    def make_pages(self, pages: int, context: int) -> None:
        """Allocate the KV cache."""
        del context  # the model's own tables are long enough
        self.pages.allocate(pages)

    def run(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces, grouped by adapter."""
        groups: dict[str | None, list[int]] = defaultdict(list)
        for index, piece in enumerate(pieces):
            groups[piece.adapter].append(index)
        results: dict[int, Tensor] = {}
        for adapter, indices in groups.items():
            self._switch(adapter)
            found = self._run_group([pieces[index] for index in indices])
            results.update(zip(indices, found, strict=True))
        return [results[index] for index in range(len(pieces))]

    def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter in safetensors format.

        Args:
            name: Name of the adapter.
            folder: Folder of the adapter.

        Raises:
            ServeError: The name is in use, or the folder has no adapter for this model.
            MissingExtraError: PEFT is not installed.
        """
        if name in self._adapters:
            raise ServeError(
                f"Cannot load {name}: an adapter of that name is already loaded. Unload it first.",
                status=409,
                code="adapter_exists",
            )
        for file in (ADAPTER_CONFIG, WEIGHTS_FILE):
            if not (Path(folder) / file).is_file():
                raise ServeError(
                    f"Cannot load {name}: its folder has no {file}. Save the adapter with PEFT's "
                    "save_pretrained.",
                    code="invalid_adapter",
                )
        with require_extra("peft", "finetune", f"Loading the adapter {name}"):
            import peft  # noqa: F401 - checked before the model is changed
        try:
            self._insert_adapter(name, folder)
        except (HalfbyteError, ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            # PEFT may have inserted its layers and loaded a part of the weights into them.
            self._remove_adapter(name)
            raise ServeError(
                f"Cannot load {name}: the adapter does not fit this model: {error}",
                code="invalid_adapter",
            ) from error
        self._adapters.add(name)

    def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        self._remove_adapter(name)
        self._adapters.discard(name)

    def _insert_adapter(self, name: str, folder: str) -> None:
        """Insert an adapter's layers into the model, switched off, and load their weights."""
        from peft import PeftConfig, get_peft_model

        settings = PeftConfig.from_pretrained(folder)
        if settings.is_prompt_learning:
            raise ValueError(f"{settings.peft_type.value} changes prompts instead of layers")
        if change := find_base_change(self.model, Path(folder), settings):
            raise ValueError(change)
        settings.inference_mode = True
        if self._peft_model is None:
            # PEFT inserts its layers into self.model, which is still the one to run.
            self._peft_model = get_peft_model(self.model, settings, adapter_name=name)
        else:
            self._peft_model.add_adapter(name, settings)
        # PEFT accepts a file that lacks weights: those layers would change nothing.
        missing = self._peft_model.load_adapter(folder, adapter_name=name).missing_keys
        if missing:
            raise ValueError(f"its file has no weights for {missing[0]}")
        self.model.eval()
        self._switch_off()

    def _remove_adapter(self, name: str) -> None:
        if self._peft_model is not None:
            self._switch_off()
            if name in self._peft_model.peft_config:
                self._peft_model.delete_adapter(name)

    def _switch_off(self) -> None:
        self._peft_model.base_model.disable_adapter_layers()
        self._active = None

    def _switch(self, adapter: str | None) -> None:
        if adapter == self._active:
            return
        if adapter is None:
            self._switch_off()
            return
        self._peft_model.base_model.enable_adapter_layers()
        self._peft_model.set_adapter(adapter)
        self._active = adapter

    def _run_group(self, pieces: Sequence[Piece]) -> list[Tensor]:
        """Run pieces that use the same adapter."""
        tokens: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for piece in pieces:
            tokens += piece.tokens
            positions += range(piece.start, piece.start + len(piece.tokens))
            rows += range(len(tokens) - piece.logits, len(tokens))
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        keywords: dict[str, Any] = {
            self._cache_name: _PagedCache(),
            STEP: _Step(self.pages, pieces),
        }
        if self._has_logits_to_keep:
            keywords["logits_to_keep"] = index
        with torch.inference_mode():
            logits: Tensor = self.model(
                torch.tensor([tokens], device=self.device),
                position_ids=torch.tensor([positions], device=self.device),
                use_cache=True,
                **keywords,
            ).logits[0]
            if not self._has_logits_to_keep:
                logits = logits[index]
        return list(torch.split(logits.float(), [piece.logits for piece in pieces]))

    def _check(self, tokens: list[int], expected: Tensor) -> None:
        """Compare logits with the original attention's, for a sequence in two pieces and whole."""
        pages, size = self.pages, self.pages.page_tokens
        count = -(-len(tokens) // size)
        self.pages = pages.allocate_another(2 * count)
        tables = [range(count), range(count, 2 * count)]
        half = len(tokens) // 2
        parts = [(tokens[:half], 0, 0), (tokens[half:], half, 0), (tokens, 0, 1)]
        first, rest, whole = (
            Piece(tokens=part, start=start, pages=tables[i], logits=len(part), is_prompt=True)
            for part, start, i in parts
        )
        try:
            start = self.run([first])[0]
            end, other = self.run([rest, whole])
        except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
            raise ModelError(
                f"Cannot serve a {type(self.model).__name__} with the embedded engine: its forward "
                f"does not support custom attention ({error}). Use --engine vllm."
            ) from error
        self.pages = pages
        for found in (torch.cat([start, end]), other):
            deviation = float((found - expected).norm() / expected.norm())
            if not deviation <= MAX_DEVIATION:
                raise ModelError(
                    f"Cannot serve a {type(self.model).__name__} with the embedded engine: its "
                    f"logits deviate from the model's own by {deviation:.3f} of their norm, at "
                    f"most {MAX_DEVIATION} is allowed. Use --engine vllm."
                )


class _Step:
    """The pieces of one forward pass, and where their keys and values are stored."""

    def __init__(self, pages: Pages, pieces: Sequence[Piece]) -> None:
        self.pages = pages
        device = pages.device
        size = pages.page_tokens
        self.parts = []
        tables, offsets = [], []
        row = 0
        for piece in pieces:
            length = piece.start + len(piece.tokens)
            table = torch.tensor(list(piece.pages[: -(-length // size)]), device=device)
            self.parts.append((row, row + len(piece.tokens), length, table))
            positions = torch.arange(piece.start, length, device=device)
            tables.append(table[positions // size])
            offsets.append(positions % size)
            row += len(piece.tokens)
        # Page of each row, and offset within the page.
        self._row_pages, self._row_offsets = torch.cat(tables), torch.cat(offsets)

    def store(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write rows [1, heads, rows, width] to their pages."""
        pages, offsets = self._row_pages, self._row_offsets
        self.pages.keys[layer][pages, :, offsets] = keys[0].transpose(0, 1)
        self.pages.values[layer][pages, :, offsets] = values[0].transpose(0, 1)


class _PagedCache(Cache):  # type: ignore[misc]
    """A no-op cache that returns new keys and values unchanged: the attention stores them."""

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
    s_aux: Tensor | None = None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Compute attention, each piece over its own sequence; the signature is Transformers'.

    Args:
        module: The attention layer, for its index.
        query: [1, heads, rows, width].
        key: Keys of the same rows, [1, key heads, rows, width].
        value: Values, shaped as the keys.
        attention_mask: Ignored; masks follow from the pieces.
        scaling: Factor of the scores.
        sliding_window: Max number of positions to attend to, including the token's own.
        softcap: Bound of the scores, applied with tanh.
        s_aux: Attention sinks [heads]: the score of one more position, whose value is 0.
        **keywords: Contains the step.

    Returns:
        Output [1, rows, heads, width], and None for the attention weights.

    Raises:
        ConfigError: The model was not called by its runner.
    """
    step: _Step | None = keywords.get(STEP)
    if step is None:
        raise ConfigError(
            "This model belongs to a serving engine and cannot be run directly. Load it again."
        )
    layer: int = module.layer_idx  # type: ignore[assignment]
    step.store(layer, key, value)
    outputs = []
    for first, last, length, table in step.parts:
        keys = _gather(step.pages.keys[layer], table, length)
        values = _gather(step.pages.values[layer], table, length)
        mask = _make_mask(last - first, length, sliding_window, query.device)
        part = query[:, :, first:last]
        outputs.append(_attend_one(part, keys, values, mask, scaling, softcap, s_aux))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _make_mask(
    rows: int, length: int, sliding_window: int | None, device: torch.device
) -> Tensor | None:
    """Make the causal mask [rows, length] of a sequence's last rows; None if all is visible."""
    if rows == 1 and (sliding_window is None or length <= sliding_window):
        return None
    queries = torch.arange(length - rows, length, device=device)[:, None]
    keys = torch.arange(length, device=device)[None]
    mask = keys <= queries
    if sliding_window is not None:
        mask &= keys > queries - sliding_window
    return mask


def _gather(pages: Tensor, table: Tensor, length: int) -> Tensor:
    """Gather the keys or values of a sequence, [1, heads, length, width]."""
    found = pages[table].transpose(0, 1)
    return found.reshape(1, found.shape[0], -1, found.shape[-1])[:, :, :length]


def _attend_one(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if softcap is None and sinks is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // keys.shape[1]
    keys, values = (t.repeat_interleave(groups, dim=1) for t in (keys, values))
    scores = (
        query @ keys.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    )
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        column = sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = torch.softmax(scores.float(), dim=-1)[..., : values.shape[2]]
    return weights.to(query.dtype) @ values
