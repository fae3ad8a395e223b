"""A decode step as one CUDA graph: the model's own forward over Transformers' static cache.

::

    prompt ──model.forward──> static cache, first logits ──record──> step, step … (a replay each)

A token takes hundreds of launches, each costing the CPU more than the GPU; a recorded graph costs
one. What is recorded must not depend on Python: caches that count in Python are refused.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StaticCache
from transformers.cache_utils import StaticLayer

from halfbyte.errors import ConfigError, ModelError

WARM_UPS = 2
"""Steps before recording: what is compiled or allocated at first use must not be recorded."""


class GraphSteps:
    """The way from one token of a sequence to the next logits."""

    def __init__(self, model: PreTrainedModel, prompt: Tensor, capacity: int) -> None:
        """Run the prompt, and record a step where the model is on a GPU.

        Args:
            model: :func:`find_obstacle` has nothing against it, but maybe the device.
            prompt: int64 [1, tokens], on the model's device.
            capacity: Positions to make room for, the prompt's included.

        Raises:
            ConfigError: The prompt does not fit, or is not one sequence.
        """
        batch, self.length = prompt.shape
        # The warm-ups write behind the prompt.
        if batch != 1 or not 0 < self.length <= capacity:
            raise ConfigError(
                f"The prompt is {batch} x {self.length} tokens; allowed are 1 x 1..{capacity}."
            )
        self.capacity = capacity
        self._model = model
        self._cache = StaticCache(
            config=model.config.get_text_config(decoder=True),
            max_cache_len=max(capacity, self.length + 1),
        )
        self._names = frozenset(inspect.signature(model.forward).parameters)
        self._token = torch.zeros(1, 1, dtype=torch.int64, device=prompt.device)
        self._position = torch.zeros(1, dtype=torch.int64, device=prompt.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            positions = torch.arange(self.length, device=prompt.device)
            self.first_logits = self._run(prompt, positions)
            if prompt.device.type == "cuda":
                self._record()

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
        if position != self.length or position >= self.capacity:
            raise ConfigError(
                f"A token was given for position {position}; the next is {self.length} of "
                f"{self.capacity}. Make the capacity larger or start anew."
            )
        with torch.inference_mode():
            self._token.fill_(token)
            self._position.fill_(position)
            if self._graph is None:
                logits = self._run(self._token, self._position)
            else:
                self._graph.replay()
                logits = self._logits.clone()
            self.length += 1
            return logits

    def _run(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits of the last token."""
        # Transformers 5.24 renames the argument.
        name = "cache" if "cache" in self._names else "past_key_values"
        keywords: dict[str, Any] = {name: self._cache}
        logits: Tensor = self._model(
            ids, position_ids=positions[None], use_cache=True, logits_to_keep=1, **keywords
        ).logits
        return logits[0, -1].float()

    def _record(self) -> None:
        self._position.fill_(self.length)
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._run(self._token, self._position)
                self._rewind()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=stream):
                self._logits = self._run(self._token, self._position)
        torch.cuda.current_stream().wait_stream(stream)

    def _rewind(self) -> None:
        """Forget what was written behind the prompt."""
        for layer in self._cache.layers:
            layer.cumulative_length.fill_(self.length)


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
