"""Lets the base model rate some answers: how likely would it have generated them?

A quantized model that degrades may still write fluent, well-formed text; its base model finds such
text unlikely. The rating is the mean log-likelihood per token, in nats, watched by ``drift.py``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Backend, Call, Delta, TextTools, TokenLogprob
from halfbyte.serve.watch.drift import Drift
from halfbyte.serve.watch.observation import Observation, content_text

log = logging.getLogger(__name__)

MAX_CHARACTERS = 8000
"""Characters of question and answer together; longer ones are not rated."""
TIMEOUT_SECONDS = 120.0
MAX_RUNNING = 1
REFERENCE_RATINGS = 64
"""Number of first ratings that become the reference. Only few answers are rated, so that the 512 of
``drift.py`` would take too long."""


class Oracle:
    """Rates a random sample of the answers with the base model."""

    def __init__(
        self, base: Backend, share: float, drift: Drift, *, seed: int | None = None
    ) -> None:
        """Set up the oracle.

        Args:
            base: The base model; its completions must support ``echo`` with ``logprobs``.
            share: Share of the answers that are rated.
            drift: Where the ratings are added.
            seed: For the random sample.
        """
        self._base = base
        self._share = share
        self._drift = drift
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def observe(self, observation: Observation) -> None:
        """Rate a finished request in the background, if it is in the sample."""
        answer = observation.answer
        if answer is None or answer.role != "primary" or self._random.random() >= self._share:
            return
        body, text = observation.call.body, answer.text()
        if not can_be_rated(body, text):
            return
        if len(self._running) >= MAX_RUNNING:
            self.counts["skipped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._rate(observation.call.id, body, text))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _rate(self, id: str, body: Mapping[str, Any], text: str) -> None:
        try:
            nats = await rate_answer(self._base, f"rate-{id}", body, text)
        except Exception as error:
            if not isinstance(error, ServeError):
                log.exception("rating the answer to %s failed", id)
            self.counts["failed"] += 1
            return
        if nats is None:
            self.counts["failed"] += 1
            return
        self.counts["rated"] += 1
        self._drift.add_value("likelihood", nats, reference_size=REFERENCE_RATINGS)

    async def close(self) -> None:
        """Cancel what is running."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def can_be_rated(body: Mapping[str, Any], answer: str) -> bool:
    """Return whether question and answer are text, not empty and not too long."""
    question = plain_text(body)
    return bool(answer.strip() and question) and len(question) + len(answer) <= MAX_CHARACTERS


async def rate_answer(
    base: Backend, id: str, request: Mapping[str, Any], answer: str
) -> float | None:
    """Compute how likely a model finds an answer.

    Args:
        base: The model; its completions must support ``echo`` with ``logprobs``. If it supports
            /tokenize too, its chat template is applied to a chat; else a chat is plain text.
        id: ID of the call.
        request: Body of the request that was answered.
        answer: The answer.

    Returns:
        Mean log-likelihood of the answer's tokens, in nats; None if the model reports none.
    """
    ids = await _tokenize(base, request, answer)
    question = plain_text(request)
    body = {
        "model": base.models[0] if base.models else "",
        "prompt": question + answer if ids is None else [*ids[0], *ids[1]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,  # some servers do not accept 0
        "temperature": 0,
    }
    deadline = time.monotonic() + TIMEOUT_SECONDS
    call = Call(kind="completion", body=body, id=id, deadline=deadline)
    tokens: list[TokenLogprob] = []
    async with asyncio.timeout(TIMEOUT_SECONDS), aclosing(base.stream(call)) as events:
        async for event in events:
            if isinstance(event, Delta):
                tokens += event.logprobs or ()
    if ids is None:
        start, end = len(question.encode()), len((question + answer).encode())
        rated = select_by_bytes(tokens, start, end)
    else:
        rated = tokens[len(ids[0]) : len(ids[0]) + len(ids[1])]
    logprobs = [token.logprob for token in rated if math.isfinite(token.logprob)]
    return sum(logprobs) / len(logprobs) if logprobs else None


async def _tokenize(
    base: Backend, request: Mapping[str, Any], answer: str
) -> tuple[list[int], list[int]] | None:
    """Return question and answer as token ids of the base model; None if it cannot tokenize."""
    if not isinstance(base, TextTools):
        return None
    prompts: list[dict[str, Any]] = [{"prompt": plain_text(request)}]
    if request.get("messages"):
        names = ("messages", "tools", "chat_template_kwargs")
        prompts.insert(0, {name: request[name] for name in names if request.get(name)})
    for prompt in prompts:
        try:
            before = await base.tokenize(prompt)
            after = await base.tokenize({"prompt": answer, "add_special_tokens": False})
            return list(map(int, before["tokens"])), list(map(int, after["tokens"]))
        except (ServeError, LookupError, TypeError, ValueError) as error:
            log.info("cannot tokenize an answer from %s: %s", " and ".join(prompt), error)
    return None


def select_by_bytes(tokens: Sequence[TokenLogprob], start: int, end: int) -> list[TokenLogprob]:
    """Return the tokens that begin in a byte range of the text."""
    selected, offset = [], 0
    for token in tokens:
        if start <= offset < end:
            selected.append(token)
        offset += len(token.token.encode()) if token.bytes is None else len(token.bytes)
    return selected


def plain_text(body: Mapping[str, Any]) -> str:
    """Return a request as plain text, without a chat template.

    For base models that have none. The exact form does not matter as long as it is always the same.
    """
    messages = body.get("messages")
    if isinstance(messages, Sequence):
        lines = [f"{m.get('role')}: {content_text(m.get('content'))}\n" for m in messages]
        return "".join(lines) + "assistant: "
    prompt = body.get("prompt", "")
    return prompt if isinstance(prompt, str) else ""
