"""A decode step as one CUDA graph, over Transformers' static cache.

::

    prompt ──model.forward──> static cache, first logits
    token  ──recorded once──> step, step … (a replay each): halfbyte.nn.gpu_step where the model has
                              its parts and gives the same logits, else the model's own forward

A token takes hundreds of launches, each costing the CPU more than the GPU; a recorded graph costs
one. What is recorded must not depend on Python: caches that count in Python are refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from halfbyte.errors import ConfigError, ModelError
from halfbyte.nn.decoder_parts import find_drift, make_probe_tokens
from halfbyte.nn.gpu_step import GpuStep, find_deviation, find_mismatch, record

PROBE_TOKENS = 8
"""Tokens of the prompt on which a step is tried before it is trusted."""


class GraphSteps:
    """A model with room for a sequence: a prompt, then one token after the other."""

    def __init__(self, model: PreTrainedModel, capacity: int, *, own_forward: bool = False) -> None:
        """Make room.

        Args:
            model: :func:`find_obstacle` has nothing against it, but maybe the device.
            capacity: Positions to make room for, the prompt's included.
            own_forward: Step by the model's own forward in any case.
        """
        self.capacity = capacity
        self.length = 0
        self.own_forward_because = "asked for" if own_forward else find_mismatch(model)
        """Why the model's own forward is recorded; None where that is not so."""
        self._model = model
        self._cache = StaticCache(
            config=model.config.get_text_config(decoder=True),
            # The probe's step writes behind its prompt.
            max_cache_len=capacity + 1,
        )
        self._names = frozenset(inspect.signature(model.forward).parameters)
        device = model.get_input_embeddings().weight.device
        self._places = torch.zeros(2, dtype=torch.int64, device=device)
        self._token, self._position = self._places[:1], self._places[1:]
        self._table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        self._step: GpuStep | None = None
        self._ready = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def read(self, prompt: Tensor) -> Tensor:
        """Begin a sequence; what was before is forgotten.

        Args:
            prompt: int64 [1, tokens], on the model's device.

        Returns:
            Logits [vocabulary] after its last token, float32.

        Raises:
            ConfigError: The prompt does not fit, or is not one sequence.
        """
        batch, length = prompt.shape
        if batch != 1 or not 0 < length <= self.capacity:
            raise ConfigError(
                f"The prompt is {batch} x {length} tokens; allowed are 1 x 1..{self.capacity}."
            )
        with torch.inference_mode():
            if not self._ready:
                self._prepare()
                self._ready = True
            return self._begin(prompt)

    def __call__(self, token: int, position: int) -> Tensor:
        """Run a token.

        Args:
            token: Its id.
            position: Its place in the sequence; the one after the last.

        Returns:
            Logits [vocabulary], float32.

        Raises:
            ConfigError: The position is another, or there is no room.
        """
        if position != self.length or not 0 < position < self.capacity:
            raise ConfigError(
                f"A token was given for position {position}; the next is {self.length} of "
                f"{self.capacity}. Make the capacity larger or start anew."
            )
        with torch.inference_mode():
            self._aim(token, position)
            if self._graph is None:
                logits = self._run()
            else:
                self._graph.replay()
                logits = self._logits.clone()
            self.length += 1
            return logits

    def follow(self, token: int, count: int) -> Iterator[int]:
        """Run a token and after it always the likeliest, without waiting for the CPU in between.

        Args:
            token: The first one's id; its place is behind the last.
            count: Tokens to find.

        Yields:
            The likeliest next tokens.

        Raises:
            ConfigError: There is no room for them.
        """
        if self.length + count > self.capacity:
            raise ConfigError(
                f"There is no room for {count} tokens behind {self.length} of {self.capacity}."
            )
        if self._graph is None:
            for _ in range(count):
                token = int(self(token, self.length).argmax())
                yield token
            return
        self._aim(token, self.length)
        found = torch.zeros(2, dtype=torch.int64).pin_memory()
        stream = torch.cuda.current_stream(self._places.device)
        events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        for index in range(count + 1):
            # A step runs while the token before it is taken.
            if index < count:
                self._graph.replay()
                found[index % 2].copy_(self._places[0], non_blocking=True)
                events[index % 2].record(stream)
                self.length += 1
            if index:
                events[(index - 1) % 2].synchronize()
                yield int(found[(index - 1) % 2])

    def _begin(self, prompt: Tensor) -> Tensor:
        self._rewind(0)
        self.length = prompt.shape[1]
        return self._forward(prompt, torch.arange(self.length, device=prompt.device))

    @torch.inference_mode()
    def _aim(self, token: int, position: int) -> None:
        # In the mode: the tensor is one of it where the caller was in it when this was made.
        self._places.copy_(torch.tensor([token, position]))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last token by the model's own forward."""
        # Transformers 5.24 renames the argument.
        name = "cache" if "cache" in self._names else "past_key_values"
        keywords: dict[str, Any] = {name: self._cache}
        logits: Tensor = self._model(
            ids, position_ids=positions[None], use_cache=True, logits_to_keep=1, **keywords
        ).logits
        return logits[0, -1].float()

    def _run(self) -> Tensor:
        """Logits after the token."""
        if self._step is not None:
            return self._step(self._token, self._position, self._table)[0].float()
        return self._forward(self._token[None], self._position)

    def _prepare(self) -> None:
        """Choose the step on a made-up prompt, and record it."""
        count = min(PROBE_TOKENS, self.capacity)
        tokens = make_probe_tokens(self._model, count)
        probe = torch.tensor([tokens], device=self._places.device)
        self._begin(probe)
        self._aim(tokens[0], count)
        if self.own_forward_because is None:
            self._choose(probe)
        if self._places.device.type == "cuda":
            self._record()

    def _choose(self, probe: Tensor) -> None:
        """Take the faster step where it computes the same."""
        expected = self._forward(self._token[None], self._position)
        # Twice by itself, in other pieces: what rounding does.
        self._rewind(self.length - 1)
        ids = torch.cat([probe[:, -1:], self._token[None]], dim=1)
        again = self._forward(ids, torch.arange(self.length - 1, self.length + 1).to(ids.device))
        self._rewind(self.length)
        pairs = [(layer.keys, layer.values) for layer in self._cache.layers]
        self._step = GpuStep(self._model, pairs, self.capacity + 1)
        deviation = find_deviation(self._run(), expected, again)
        if deviation is not None:
            name = type(self._model).__name__
            deviation = f"a {name} computes something else: {deviation}"
        self.own_forward_because = deviation or find_drift(self._model)
        if self.own_forward_because is not None:
            self._step = None

    def _record(self) -> None:
        self._graph, self._logits = record(self._run_on, self._places.device, self._start_again)

    def _run_on(self) -> Tensor:
        """Logits after the token; the next one and its place, unless others are put there."""
        logits = self._run()
        self._token.copy_(logits.argmax())
        self._position.add_(1)
        return logits

    def _start_again(self) -> None:
        self._position.fill_(self.length)
        self._rewind(self.length)

    def _rewind(self, length: int) -> None:
        """Forget what was written from a position on."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model's steps cannot be recorded; None where they can.

    Args:
        model: Loaded.

    Returns:
        The reason.

    Raises:
        ModelError: The model has no configuration to make a cache from.
    """
    config = getattr(model, "config", None)
    if config is None:
        raise ModelError(f"A {type(model).__name__} has no config to make a cache from.")
    devices = {parameter.device for parameter in (*model.parameters(), *model.buffers())}
    if len(devices) != 1 or next(iter(devices)).type != "cuda":
        found = ", ".join(sorted(map(str, devices)))
        return f"it is on {found}, not on one CUDA device"
    return find_cache_obstacle(model)


def find_cache_obstacle(model: PreTrainedModel) -> str | None:
    """Say why a model's cache cannot be part of a graph; None where it can."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"Transformers does not offer a static cache for a {type(model).__name__}"
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        return f"its cache counts in Python ({', '.join(sorted(others))})"
    return None
