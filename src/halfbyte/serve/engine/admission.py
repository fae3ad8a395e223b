"""Validate requests before they are queued."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

from halfbyte.errors import ServeError
from halfbyte.serve.adapters import check_is_loaded
from halfbyte.serve.engine.contract import EngineInfo, TokenRequest
from halfbyte.serve.engine.page_pool import PagePool

MAX_LOGPROBS = 1000
"""Maximum number of top logprobs per position."""

RANGES = {
    "temperature": (0.0, 100.0),
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "frequency_penalty": (-100.0, 100.0),
    "presence_penalty": (-100.0, 100.0),
    "repetition_penalty": (0.001, 1000.0),
    "top_k": (0, math.inf),
    "max_new_tokens": (0, math.inf),
}
"""Allowed ranges. They are wider than OpenAI's, which the API enforces."""


def check_request(
    request: TokenRequest, info: EngineInfo, adapters: Sequence[str], pool: PagePool
) -> None:
    """Check that the engine can answer a request.

    Args:
        request: The request.
        info: The engine's limits.
        adapters: Names of the loaded adapters.
        pool: The engine's KV cache.

    Raises:
        ServeError: 400, or 404 for an unknown adapter; names the value and what is allowed.
    """
    for name, (minimum, maximum) in RANGES.items():
        value = getattr(request, name)
        if not minimum <= value <= maximum:
            _reject(f"{name} is {value}; it must be from {minimum:g} to {maximum:g}.", name)
    if not request.prompt:
        _reject("The prompt is empty; it must have at least one token.", "prompt")
    _check_tokens(request.prompt, info.vocabulary, "prompt")
    _check_tokens(request.logit_bias, info.vocabulary, "logit_bias")
    if not all(math.isfinite(value) for value in request.logit_bias.values()):
        _reject("logit_bias has a value that is not finite; use finite numbers.", "logit_bias")
    for name in ("top_logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        maximum = min(info.vocabulary, MAX_LOGPROBS)
        if value is not None and not 0 <= value <= maximum:
            _reject(f"{name} is {value}; it must be from 0 to {maximum}.", name)
    if request.adapter is not None:
        check_is_loaded(request.adapter, adapters)
    total = len(request.prompt) + request.max_new_tokens
    capacity = pool.pages * pool.page_tokens
    if total > min(info.context, capacity):
        limit = (
            f"the model's context is {info.context} tokens"
            if info.context <= capacity
            else f"the KV cache holds {capacity} tokens"
        )
        raise ServeError(
            f"The request needs {total} tokens ({len(request.prompt)} of the prompt, "
            f"{request.max_new_tokens} of the answer); {limit}. Shorten the prompt or request "
            "fewer tokens.",
            code="context_length_exceeded",
            param="max_tokens" if len(request.prompt) < min(info.context, capacity) else "prompt",
        )


def _check_tokens(tokens: Iterable[int], vocabulary: int, name: str) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            _reject(
                f"{name} contains the token id {token}, which is outside the model's vocabulary of "
                f"0 to {vocabulary - 1}.",
                name,
            )


def _reject(message: str, param: str) -> NoReturn:
    raise ServeError(message, code="invalid_value", param=param)
