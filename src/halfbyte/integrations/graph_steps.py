"""A decode step as one CUDA graph, over Transformers' static cache.

::

    prompt ──model.forward──> static cache, first logits
    token  ──captured once──> step, step … (one replay each): halfbyte.nn.gpu_step if the model has
                              its parts and gives the same logits, otherwise the model's forward

A token takes hundreds of launches, each of which costs more CPU time than GPU time; replaying a
graph is a single launch. Captured code must not depend on Python state, so caches that count their
length in Python are not supported.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from halfbyte.errors import ConfigError, ModelError
from halfbyte.model.experts import UnfusedExperts
from halfbyte.model.kv_cache import cache_argument
from halfbyte.nn.decoder_parts import find_drift, make_probe_tokens
from halfbyte.nn.gpu_step import GpuStep, find_deviation, find_mismatch, record
from halfbyte.nn.grouped_experts import find_grouping_obstacle

PROBE_TOKENS = 8
"""Tokens of the probe prompt on which a step is compared with the model's forward."""


class GraphSteps:
    """Decodes one sequence at a time: prefill, then one graph replay per token."""

    def __init__(self, model: PreTrainedModel, capacity: int, *, own_forward: bool = False) -> None:
        """Allocate the cache.

        Args:
            model: A model for which :func:`find_cache_obstacle` returns None.
            capacity: Maximum number of positions, including the prompt.
            own_forward: Always use the model's forward for a step.
        """
        self.capacity = capacity
        self.length = 0
        self.fallback_reason = "requested" if own_forward else find_mismatch(model)
        """Why steps fall back to the model's forward; None if they do not."""
        self._model = model
        self._cache = StaticCache(
            config=model.config.get_text_config(decoder=True),
            # The probe's step writes one position after its prompt.
            max_cache_len=capacity + 1,
        )
        self._cache_argument = cache_argument(model)
        device = model.get_input_embeddings().weight.device
        self._inputs = torch.zeros(2, dtype=torch.int64, device=device)
        self._token, self._position = self._inputs[:1], self._inputs[1:]
        self._table = torch.zeros(1, 1, dtype=torch.int32, device=device)
        self._step: GpuStep | None = None
        self._ready = False
        self._graph: torch.cuda.CUDAGraph | None = None

    def prefill(self, prompt: Tensor) -> Tensor:
        """Start a new sequence, which replaces the previous one.

        Args:
            prompt: int64 [1, tokens], on the model's device.

        Returns:
            Logits [vocabulary] after the last token, float32.

        Raises:
            ConfigError: The prompt does not fit, or is not a single sequence.
            NotCapturable: The model waits for the GPU within a step.
        """
        batch, length = prompt.shape
        if batch != 1 or not 0 < length <= self.capacity:
            raise ConfigError(
                f"The prompt is {batch} x {length} tokens; allowed: 1 x 1..{self.capacity}."
            )
        with torch.inference_mode():
            if not self._ready:
                self._prepare()
                self._ready = True
            return self._begin(prompt)

    def __call__(self, token: int, position: int) -> Tensor:
        """Run a token.

        Args:
            token: Token id.
            position: Its position, which must be the next one of the sequence.

        Returns:
            Logits [vocabulary], float32.

        Raises:
            ConfigError: The position is not the next one, or exceeds the capacity.
        """
        if position != self.length or not 0 < position < self.capacity:
            raise ConfigError(
                f"Cannot run a token at position {position}: the next position is {self.length} of "
                f"{self.capacity}. Use a larger capacity or start a new sequence."
            )
        with torch.inference_mode():
            self._set_token(token, position)
            if self._graph is None:
                logits = self._run()
            else:
                self._graph.replay()
                logits = self._logits.clone()
            self.length += 1
            return logits

    def decode_greedily(self, token: int, count: int) -> Iterator[int]:
        """Generate tokens greedily, without waiting for the CPU between steps.

        Args:
            token: Id of the first token to run, at the next position.
            count: Number of tokens to generate.

        Yields:
            The most likely next tokens.

        Raises:
            ConfigError: The tokens exceed the capacity.
        """
        if self.length + count > self.capacity:
            raise ConfigError(
                f"Cannot generate {count} tokens after {self.length}: the capacity is "
                f"{self.capacity}. Use a larger capacity."
            )
        if self._graph is None:
            for _ in range(count):
                token = int(self(token, self.length).argmax())
                yield token
            return
        self._set_token(token, self.length)
        found = torch.zeros(2, dtype=torch.int64).pin_memory()
        stream = torch.cuda.current_stream(self._inputs.device)
        events = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        for index in range(count + 1):
            # A step runs while the caller handles the previous token.
            if index < count:
                self._graph.replay()
                found[index % 2].copy_(self._inputs[0], non_blocking=True)
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
    def _set_token(self, token: int, position: int) -> None:
        # In inference mode, as the tensor may be an inference tensor.
        self._inputs.copy_(torch.tensor([token, position]))

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Return the logits of the last token, computed by the model's forward."""
        keywords: dict[str, Any] = {self._cache_argument: self._cache}
        logits: Tensor = self._model(
            ids, position_ids=positions[None], use_cache=True, logits_to_keep=1, **keywords
        ).logits
        return logits[0, -1].float()

    def _run(self) -> Tensor:
        """Run the current token and return its logits."""
        if self._step is not None:
            return self._step(self._token, self._position, self._table)[0].float()
        return self._forward(self._token[None], self._position)

    def _prepare(self) -> None:
        """Choose the step on a probe prompt, and capture it."""
        count = min(PROBE_TOKENS, self.capacity)
        tokens = make_probe_tokens(self._model, count)
        probe = torch.tensor([tokens], device=self._inputs.device)
        self._begin(probe)
        self._set_token(tokens[0], count)
        if self.fallback_reason is None:
            self._choose_step(probe)
        if self._inputs.device.type == "cuda":
            self._record()

    def _choose_step(self, probe: Tensor) -> None:
        """Use the faster step if it reproduces the model's forward."""
        expected = self._forward(self._token[None], self._position)
        # Once more in other chunks, which shows rounding noise.
        self._rewind(self.length - 1)
        ids = torch.cat([probe[:, -1:], self._token[None]], dim=1)
        again = self._forward(ids, torch.arange(self.length - 1, self.length + 1).to(ids.device))
        self._rewind(self.length)
        pairs = [(layer.keys, layer.values) for layer in self._cache.layers]
        self._step = GpuStep(self._model, pairs, self.capacity + 1)
        deviation = find_deviation(self._run(), expected, again)
        if deviation is not None:
            name = type(self._model).__name__
            deviation = f"a {name} computes differently: {deviation}"
        self.fallback_reason = deviation or find_drift(self._model)
        if self.fallback_reason is not None:
            self._step = None

    def _record(self) -> None:
        self._graph, self._logits = record(self._run_on, self._inputs.device, self._reset)

    def _run_on(self) -> Tensor:
        """Run the current token, and set the most likely next one and its position as current."""
        logits = self._run()
        self._token.copy_(logits.argmax())
        self._position.add_(1)
        return logits

    def _reset(self) -> None:
        self._position.fill_(self.length)
        self._rewind(self.length)

    def _rewind(self, length: int) -> None:
        """Discard the cache from a position on."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(length)


def find_obstacle(model: PreTrainedModel) -> str | None:
    """Return why a model's decode steps cannot be captured as a CUDA graph.

    Args:
        model: The loaded model.

    Returns:
        The reason; None if they can be captured.

    Raises:
        ModelError: The model has no config to make a cache from.
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
    """Return why a model's cache cannot be used in a CUDA graph; None if it can."""
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"Transformers does not offer a static cache for a {type(model).__name__}"
    for module in model.modules():
        reason = find_grouping_obstacle(module) if isinstance(module, UnfusedExperts) else None
        if reason is not None:
            return f"which experts run is decided on the CPU, because {reason}"
    cache = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=1)
    others = {type(layer).__name__ for layer in cache.layers if type(layer) is not StaticLayer}
    if others:
        return f"its cache keeps state in Python ({', '.join(sorted(others))})"
    return None
