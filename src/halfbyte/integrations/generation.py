"""Generate text one token at a time, by the fastest method that the machine supports.

::

    prompt ─┬─> compiled decoder (nn/native_decoder.py), on a CPU ──> token, token …
            ├─> CUDA graphs (graph_steps.py), on an NVIDIA GPU
            └─> model.forward with its cache, if neither can run; the reasons are kept
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from halfbyte.errors import ConfigError, first_line
from halfbyte.integrations import graph_steps
from halfbyte.integrations.graph_steps import GraphSteps
from halfbyte.model.context_length import max_context_length
from halfbyte.model.kv_cache import cache_argument, cache_of
from halfbyte.nn.gpu_step import NotCapturable
from halfbyte.nn.native_decoder import NativeDecoder, find_obstacle
from halfbyte.nn.native_head import NativeHead

ROOM_STEP = 1024
"""Capacity of CUDA graph steps is a multiple of this, as capturing again takes a second."""

MAX_INCOMPLETE = 3
"""Maximum bytes of an incomplete UTF-8 character, and so tokens that may wait for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """Sampling settings."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: greedy decoding."""
    top_p: float = 1.0
    """Nucleus sampling: draw among the most likely tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be at least 0.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be from -2**63 to 2**64 - 1.")


@dataclass(slots=True, kw_only=True)
class Timing:
    """Timing of one generation."""

    prompt_tokens: int
    prompt_seconds: float = 0.0
    """Time to the first token."""
    step_seconds: list[float] = field(default_factory=list)
    """Time of each later token."""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def rate(self) -> float:
        """Generated tokens per second after the first token; 0 if there were none."""
        total = sum(self.step_seconds)
        return len(self.step_seconds) / total if total else 0.0


class Steps(Protocol):
    """A decode step."""

    def __call__(self, token: int, position: int) -> Tensor:
        """Run the token at a position and return the next logits [vocabulary]."""


class Generator:
    """Generates tokens with a model, by the method chosen for it."""

    def __init__(self, model: PreTrainedModel, *, head_bits: int = 16, native: bool = True) -> None:
        """Choose the method.

        Args:
            model: Loaded, with its kernels selected.
            head_bits: 16: the head as stored; 8 or 4: a rounded copy, which is faster to read.
            native: Allow faster methods than the model's forward with its cache.

        Raises:
            ConfigError: A rounded head was requested but the compiled decoder cannot run.
        """
        self.model = model
        self.obstacle = find_obstacle(model) if native else "not requested"
        """Why the compiled decoder is not used; None if it is."""
        self.graph_obstacle = graph_steps.find_obstacle(model) if native else "not requested"
        """Why CUDA graphs are not used; None if they are. The first prompt may find a reason."""
        self._graph_steps: GraphSteps | None = None
        self.head: NativeHead | None = None
        if self.obstacle is None:
            self.head = NativeHead(model.get_output_embeddings(), head_bits)
        elif head_bits != 16:
            raise ConfigError(
                f"A head of {head_bits} bits needs the compiled decoder, which cannot run here: "
                f"{self.obstacle}. Leave the head at 16 bits."
            )
        ends = model.generation_config.eos_token_id
        self.ends: frozenset[int] = frozenset([ends] if isinstance(ends, int) else ends or [])
        config = model.config.get_text_config(decoder=True)
        self._max_positions = max_context_length(config)

    def describe_decoding(self) -> str:
        """Describe the method that generates tokens, and why no faster one is used."""
        if self.obstacle is None:
            return "compiled decoder"
        if self.graph_obstacle is None:
            reason = self._graph_steps.fallback_reason if self._graph_steps else None
            suffix = f" of Transformers' forward: {reason}" if reason else ""
            return f"one CUDA graph per token{suffix}"
        # On a GPU the compiled decoder is not an alternative.
        on_gpu = self.model.device.type == "cuda"
        other = f"no CUDA graph: {self.graph_obstacle}" if on_gpu else None
        return f"Transformers' forward ({other or f'no compiled decoder: {self.obstacle}'})"

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, timing: Timing | None = None
    ) -> Iterator[int]:
        """Generate tokens.

        Args:
            prompt: Token ids; at least one.
            sampling: Sampling settings; generation also ends at the model's last position.
            timing: Filled in during generation.

        Yields:
            Token ids, without end-of-text tokens.

        Raises:
            ConfigError: The prompt is empty, or has more tokens than the model has positions.
        """
        if not prompt:
            raise ConfigError("The prompt is empty; generating needs at least one token.")
        max_new_tokens = sampling.max_new_tokens
        if self._max_positions:
            # The last token needs no position, because it is not run.
            max_new_tokens = min(max_new_tokens, self._max_positions - len(prompt) + 1)
        if max_new_tokens < 1:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens; the model has {self._max_positions} "
                "positions. Shorten the prompt."
            )
        timing = timing or Timing(prompt_tokens=len(prompt))
        draw = _make_draw(sampling)
        start = time.perf_counter()
        with torch.inference_mode():
            logits, step = self._prefill(prompt, len(prompt) + max_new_tokens)
            token = draw(logits)
        timing.prompt_seconds = time.perf_counter() - start
        count = max_new_tokens - 1
        if sampling.temperature == 0 and isinstance(step, GraphSteps):
            later = step.decode_greedily(token, count)
        else:
            later = _draw_each(step, draw, token, range(len(prompt), len(prompt) + count))
        while token not in self.ends:
            yield token
            start = time.perf_counter()
            following = next(later, None)
            if following is None:
                return
            token = following
            timing.step_seconds.append(time.perf_counter() - start)

    def _prefill(self, prompt: Sequence[int], capacity: int) -> tuple[Tensor, Steps]:
        """Run the prompt; return its last logits and the decode step."""
        if self.head is not None:
            head, decoder = self.head, NativeDecoder(self.model, capacity)
            last = decoder.prefill(prompt)[-1]
            return head(last), lambda token, position: head(decoder.step(token, position))
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([list(prompt)], device=device)
        if self.graph_obstacle is None:
            try:
                steps = self._find_graph_steps(capacity)
                return steps.prefill(ids), steps
            except NotCapturable as error:
                self.graph_obstacle, self._graph_steps = str(error), None
        # Only the last position: the logits of a whole long prompt would take gigabytes.
        output = self.model(ids, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float(), _ForwardSteps(self.model, cache_of(output))

    def _find_graph_steps(self, capacity: int) -> GraphSteps:
        if self._graph_steps is None or self._graph_steps.capacity < capacity:
            self._graph_steps = None  # free its cache before allocating a larger one
            self._graph_steps = GraphSteps(self.model, -(-capacity // ROOM_STEP) * ROOM_STEP)
        return self._graph_steps


class _ForwardSteps:
    """Decode steps by the model's forward with its own cache."""

    def __init__(self, model: PreTrainedModel, cache: Any) -> None:
        self.model = model
        self.keywords = {cache_argument(model): cache}

    def __call__(self, token: int, position: int) -> Tensor:
        ids = torch.tensor([[token]], device=self.model.get_input_embeddings().weight.device)
        logits: Tensor = self.model(ids, use_cache=True, **self.keywords).logits
        return logits[0, -1].float()


def _draw_each(
    step: Steps, draw: Callable[[Tensor], int], token: int, positions: range
) -> Iterator[int]:
    for position in positions:
        with torch.inference_mode():
            token = draw(step(token, position))
        yield token


def _make_draw(sampling: Sampling) -> Callable[[Tensor], int]:
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator().manual_seed(sampling.seed)

    def draw(logits: Tensor) -> int:
        # Subtract the maximum first, in double: a tiny temperature must not overflow.
        logits = logits.cpu()
        scaled = (logits - logits.max()).double() / sampling.temperature
        shares = torch.softmax(scaled.float(), dim=-1)
        if sampling.top_p < 1:
            sorted_shares, order = shares.sort(descending=True)
            # Keep tokens up to and including the one that crosses the threshold.
            kept = sorted_shares.cumsum(0) - sorted_shares < sampling.top_p
            shares = torch.zeros_like(shares).index_put_((order[kept],), sorted_shares[kept])
        return int(torch.multinomial(shares, 1, generator=generator))

    return draw


class TextStream:
    """Incremental detokenizer: returns text as soon as it is final."""

    def __init__(self, tokenizer: Any, *, skip_special: bool = True) -> None:
        """Start with no tokens.

        Args:
            tokenizer: The model's tokenizer.
            skip_special: Leave out special tokens.
        """
        self._decoder = _find_decoder(tokenizer)
        self._skip_special = skip_special
        self._ids: list[int] = []
        # The text of ids before `_read` has been returned; ids from `_start` on are decoded again,
        # because the text of a token depends on the token before it.
        self._start = self._read = 0

    def add(self, *tokens: int) -> str:
        """Add tokens.

        Args:
            *tokens: Their ids, at least one.

        Returns:
            The new text; empty while a character is still incomplete.
        """
        self._ids += tokens
        text = self._decode(None)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            # A valid character waits for at most three more bytes, so earlier bytes are invalid for
            # good; holding them back would decode more and more tokens each time.
            return self._take(len(self._ids) - MAX_INCOMPLETE)
        return self._take(len(self._ids), text)

    def finish(self) -> str:
        """Return the text held back so far, including an incomplete character."""
        return self._take(len(self._ids))

    def _take(self, stop: int, text: str | None = None) -> str:
        """Return the new text of the ids up to `stop`; `text` is that of all ids, if known."""
        if stop <= self._read:
            return ""
        old, new = self._decode(self._read), self._decode(stop) if text is None else text
        self._start, self._read = self._read, stop
        return new[len(old) :]

    def _decode(self, stop: int | None) -> str:
        ids = self._ids[self._start : stop]
        return str(self._decoder.decode(ids, skip_special_tokens=self._skip_special))


def _find_decoder(tokenizer: Any) -> Any:
    """Return the Rust tokenizer itself if Transformers adds nothing to its decoding.

    The wrapper takes six times as long for two tokens, and each token is decoded twice.
    """
    kind, base = type(tokenizer), PreTrainedTokenizerFast
    plain = isinstance(tokenizer, base) and (kind.decode, kind._decode) == (
        base.decode,
        base._decode,
    )
    if plain and not tokenizer.clean_up_tokenization_spaces:
        return tokenizer.backend_tokenizer
    return tokenizer


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Apply the chat template to a conversation, to get the prompt for the next answer.

    Args:
        tokenizer: A tokenizer with a chat template.
        messages: Messages with "role" and "content".

    Returns:
        Token ids.

    Raises:
        ConfigError: The tokenizer has no chat template, or the template rejects the conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The model's tokenizer has no chat template, so the model was not trained to chat. "
            "Use halfbyte generate."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A template is code that comes with the model, and raises errors of its own.
        raise ConfigError(
            f"The model's chat template rejects this conversation: {first_line(error)}. "
            "Use the roles, in the order, that the model was trained with."
        ) from error
    return list(encoded["input_ids"])
