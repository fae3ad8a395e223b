"""Text out of a model, a token at a time, by the fastest way that this machine has for it.

::

    prompt ──native decoder (nn/native_decoder.py)──> keys, values, first logits ──> token, token …
           ├─> recorded steps (graph_steps.py), on an NVIDIA GPU
           └─> model.forward with its cache, where neither can be; the reasons are kept
"""

from __future__ import annotations

import inspect
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
from halfbyte.nn.native_decoder import NativeDecoder, cache_of, find_obstacle
from halfbyte.nn.native_head import NativeHead

ROOM_STEP = 1024
"""Positions by which the room of recorded steps grows: recording anew takes a second."""

MOST_INCOMPLETE = 3
"""Bytes of a UTF-8 character that is not complete, and so tokens that may wait for the rest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is drawn."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    """0: always the likeliest token."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; it must be 1 or more.")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"temperature is {self.temperature}; it must be 0 or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; it must be above 0 and at most 1.")
        if not -(2**63) <= self.seed < 2**64:
            raise ConfigError(f"seed is {self.seed}; it must be from -2**63 to 2**64 - 1.")


@dataclass(slots=True, kw_only=True)
class Timing:
    """What one generation took."""

    prompt_tokens: int
    prompt_seconds: float = 0.0
    """Until the first token."""
    step_seconds: list[float] = field(default_factory=list)
    """Of each later token."""

    @property
    def prompt_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prompt_seconds

    @property
    def rate(self) -> float:
        """Generated tokens per second, the first one left out; 0 where there was no other."""
        total = sum(self.step_seconds)
        return len(self.step_seconds) / total if total else 0.0


class Steps(Protocol):
    """The way from one token to the next logits."""

    def __call__(self, token: int, position: int) -> Tensor:
        """Logits [vocabulary] after the token at a position."""


class Generator:
    """A model with the way to generate that was chosen for it."""

    def __init__(self, model: PreTrainedModel, *, head_bits: int = 16, native: bool = True) -> None:
        """Choose the way.

        Args:
            model: Loaded, with its kernels chosen.
            head_bits: 16: the head as stored; 8 or 4: a rounded copy, which is read faster.
            native: Whether anything but the model's own forward and cache may be used.

        Raises:
            ConfigError: A rounded head was asked for where the compiled decoder cannot run.
        """
        self.model = model
        self.obstacle = find_obstacle(model) if native else "not asked for"
        """Why the compiled decoder does not run; None where it does."""
        self.graph_obstacle = graph_steps.find_obstacle(model) if native else "not asked for"
        """Why steps are not recorded; None where they are."""
        self._recorded: GraphSteps | None = None
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
        self._longest = max_context_length(config)

    def describe_way(self) -> str:
        """Say how tokens come about, and why no faster."""
        if self.obstacle is None:
            return "compiled decoder"
        if self.graph_obstacle is None:
            recorded = self._recorded
            reason = recorded.own_forward_because if recorded else None
            way = "a CUDA graph a token"
            return f"{way}, of Transformers' own forward: {reason}" if reason else way
        # On a GPU the compiled decoder is no alternative.
        on_gpu = self.model.device.type == "cuda"
        other = f"no CUDA graph: {self.graph_obstacle}" if on_gpu else None
        return f"Transformers' own forward ({other or f'no compiled decoder: {self.obstacle}'})"

    def stream(
        self, prompt: Sequence[int], sampling: Sampling, timing: Timing | None = None
    ) -> Iterator[int]:
        """Generate.

        Args:
            prompt: Token ids; at least one.
            sampling: How to draw, and how many at the most; the model's last position ends it too.
            timing: Filled in on the way.

        Yields:
            Token ids; an end-of-text token is not among them.

        Raises:
            ConfigError: The prompt is empty, or has more tokens than the model has positions.
        """
        if not prompt:
            raise ConfigError("The prompt is empty; generating needs one token at least.")
        most = sampling.max_new_tokens
        if self._longest:
            # The last token that is drawn needs no position: it is not run.
            most = min(most, self._longest - len(prompt) + 1)
        if most < 1:
            raise ConfigError(
                f"The prompt has {len(prompt)} tokens; the model has {self._longest} positions. "
                "Shorten it."
            )
        timing = timing or Timing(prompt_tokens=len(prompt))
        draw = _make_draw(sampling)
        start = time.perf_counter()
        with torch.inference_mode():
            logits, step = self._read_prompt(prompt, len(prompt) + most)
            token = draw(logits)
        timing.prompt_seconds = time.perf_counter() - start
        count = most - 1
        if sampling.temperature == 0 and isinstance(step, GraphSteps):
            later = step.follow(token, count)
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

    def _read_prompt(self, prompt: Sequence[int], capacity: int) -> tuple[Tensor, Steps]:
        """Run the prompt; give its last logits and the way on."""
        if self.head is not None:
            head, decoder = self.head, NativeDecoder(self.model, capacity)
            last = decoder.read(prompt)[-1]
            return head(last), lambda token, position: head(decoder.step(token, position))
        device = self.model.get_input_embeddings().weight.device
        ids = torch.tensor([list(prompt)], device=device)
        if self.graph_obstacle is None:
            steps = self._find_room(capacity)
            return steps.read(ids), steps
        # Only the last position's logits: of a long prompt all of them would be gigabytes.
        output = self.model(ids, use_cache=True, logits_to_keep=1)
        return output.logits[0, -1].float(), _OwnSteps(self.model, cache_of(output))

    def _find_room(self, capacity: int) -> GraphSteps:
        if self._recorded is None or self._recorded.capacity < capacity:
            self._recorded = None  # its cache makes room for the larger one
            self._recorded = GraphSteps(self.model, -(-capacity // ROOM_STEP) * ROOM_STEP)
        return self._recorded


class _OwnSteps:
    """The model's own forward with its own cache."""

    def __init__(self, model: PreTrainedModel, cache: Any) -> None:
        self.model = model
        # Transformers 5.24 renames the argument and warns of the old name.
        names = inspect.signature(model.forward).parameters
        self.keywords = {"cache" if "cache" in names else "past_key_values": cache}

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
        # Less the largest first, and wide: a tiny temperature must not overflow.
        logits = logits.cpu()
        scaled = (logits - logits.max()).double() / sampling.temperature
        shares = torch.softmax(scaled.float(), dim=-1)
        if sampling.top_p < 1:
            sorted_shares, order = shares.sort(descending=True)
            # The token that crosses the line is the last one kept.
            kept = sorted_shares.cumsum(0) - sorted_shares < sampling.top_p
            shares = torch.zeros_like(shares).index_put_((order[kept],), sorted_shares[kept])
        return int(torch.multinomial(shares, 1, generator=generator))

    return draw


class TextStream:
    """Token ids in, text out as soon as it is certain."""

    def __init__(self, tokenizer: Any, *, skip_special: bool = True) -> None:
        """Start.

        Args:
            tokenizer: The model's.
            skip_special: Leave out tokens that the tokenizer calls special.
        """
        self._decoder = _find_decoder(tokenizer)
        self._skip_special = skip_special
        self._ids: list[int] = []
        # Ids before `_read` are out; from `_start` on they are decoded again, because what a
        # tokenizer makes of a token depends on the one before it.
        self._start = self._read = 0

    def add(self, *tokens: int) -> str:
        """Take tokens.

        Args:
            *tokens: Their ids, at least one.

        Returns:
            The text that is new; empty while a character is still incomplete.
        """
        self._ids += tokens
        text = self._decode(None)
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            # A character lacks at most three of its bytes' tokens; what stands before them is
            # broken for good, and holding it would decode ever more of it.
            return self._take(len(self._ids) - MOST_INCOMPLETE)
        return self._take(len(self._ids), text)

    def finish(self) -> str:
        """Give what was still held back, an incomplete character among it."""
        return self._take(len(self._ids))

    def _take(self, stop: int, text: str | None = None) -> str:
        """Give the text of the ids up to `stop` that are not out yet; `text` is all of them."""
        if stop <= self._read:
            return ""
        old, new = self._decode(self._read), self._decode(stop) if text is None else text
        self._start, self._read = self._read, stop
        return new[len(old) :]

    def _decode(self, stop: int | None) -> str:
        ids = self._ids[self._start : stop]
        return str(self._decoder.decode(ids, skip_special_tokens=self._skip_special))


def _find_decoder(tokenizer: Any) -> Any:
    """Give what decodes: the Rust tokenizer itself where Transformers adds nothing to it.

    Its wrapper takes six times as long for two tokens, and text is decoded twice for each one.
    """
    wraps = isinstance(tokenizer, PreTrainedTokenizerFast)
    own = PreTrainedTokenizerFast
    plain = wraps and (type(tokenizer).decode, type(tokenizer)._decode) == (own.decode, own._decode)
    if plain and not tokenizer.clean_up_tokenization_spaces:
        return tokenizer.backend_tokenizer
    return tokenizer


def encode_chat(tokenizer: Any, messages: Sequence[dict[str, str]]) -> list[int]:
    """Turn a conversation into the prompt for its next answer.

    Args:
        tokenizer: With a chat template.
        messages: Each with "role" and "content".

    Returns:
        Token ids.

    Raises:
        ConfigError: The tokenizer has no chat template, or that does not take this conversation.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ConfigError(
            "The model's tokenizer has no chat template: it was not trained to chat. "
            "Use halfbyte generate."
        )
    try:
        encoded = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, return_dict=True
        )
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        # A template is a program of the model's maker; it says what it does not take.
        raise ConfigError(
            f"The model's chat template does not take this conversation: {first_line(error)}. "
            "Its roles, and their order, must be those that the model was trained with."
        ) from error
    return list(encoded["input_ids"])
