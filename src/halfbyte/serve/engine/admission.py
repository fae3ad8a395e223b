"""Which requests an engine takes: what would fail later is refused before it is queued."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NoReturn

from halfbyte.errors import ServeError
from halfbyte.serve.adapters import check_is_loaded
from halfbyte.serve.engine.contract import EngineInfo, TokenRequest
from halfbyte.serve.engine.page_pool import PagePool

MOST_LOGPROBS = 1000
"""Likeliest tokens that may be asked for in each place."""

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
"""Wider than OpenAI's: what can be computed. The API may allow less."""


def check_request(
    request: TokenRequest, info: EngineInfo, adapters: Sequence[str], pool: PagePool
) -> None:
    """Refuse a request that cannot be answered.

    Args:
        request: As it came.
        info: The engine's limits.
        adapters: That are loaded.
        pool: Its cache.

    Raises:
        ServeError: 400, or 404 for an adapter; names what was found and what is allowed.
    """
    for name, (least, most) in RANGES.items():
        value = getattr(request, name)
        if not least <= value <= most:
            _refuse(f"{name} is {value}; it must be from {least:g} to {most:g}.", name)
    if not request.prompt:
        _refuse("The prompt is empty; it must have one token at least.", "prompt")
    _check_tokens(request.prompt, info.vocabulary, "prompt")
    _check_tokens(request.logit_bias, info.vocabulary, "logit_bias")
    if not all(math.isfinite(value) for value in request.logit_bias.values()):
        _refuse("A value of logit_bias is no finite number.", "logit_bias")
    for name in ("top_logprobs", "prompt_logprobs"):
        value = getattr(request, name)
        most = min(info.vocabulary, MOST_LOGPROBS)
        if value is not None and not 0 <= value <= most:
            _refuse(f"{name} is {value}; it must be from 0 to {most}.", name)
    if request.adapter is not None:
        check_is_loaded(request.adapter, adapters)
    total = len(request.prompt) + request.max_new_tokens
    cached = pool.pages * pool.page_tokens
    if total > min(info.context, cached):
        limit = (
            f"the model has {info.context} positions"
            if info.context <= cached
            else f"the cache holds {cached} tokens in all"
        )
        raise ServeError(
            f"The request needs {total} tokens ({len(request.prompt)} of the prompt, "
            f"{request.max_new_tokens} of the answer); {limit}. Shorten the prompt, or ask for "
            "fewer.",
            code="context_length_exceeded",
            param="max_tokens" if len(request.prompt) < min(info.context, cached) else "prompt",
        )


def _check_tokens(tokens: Iterable[int], vocabulary: int, name: str) -> None:
    for token in tokens:
        if not 0 <= token < vocabulary:
            _refuse(f"{name} has token {token}; the model knows 0 to {vocabulary - 1}.", name)


def _refuse(message: str, param: str) -> NoReturn:
    raise ServeError(message, code="invalid_value", param=param)
