"""The base model rates some answers: how likely would it have written them?

A quantized model that drifts into nonsense may still write fluent, well-formed text; its base finds
such text unlikely. One figure per answer, in nats per token, watched by ``drift.py``.
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

LONGEST_TEXT = 8000
"""Characters of question and answer together; longer ones are not rated."""
LONGEST_SECONDS = 120.0
AT_ONCE = 1
FIRST = 64
"""Ratings that become what is usual: with one answer in a hundred, 512 would take too long."""


class Oracle:
    """Asks the base model about some answers."""

    def __init__(
        self, base: Backend, share: float, drift: Drift, *, seed: int | None = None
    ) -> None:
        """Begin with nothing rated.

        Args:
            base: Its completions know ``echo`` and ``logprobs``.
            share: Of the answers.
            drift: Watches the likelihood.
            seed: Of the draw.
        """
        self._base = base
        self._share = share
        self._drift = drift
        self._random = random.Random(seed)
        self._running: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def observe(self, seen: Observation) -> None:
        """Rate a request that is over, if it is drawn."""
        answer = seen.answer
        if answer is None or answer.role != "primary" or self._random.random() >= self._share:
            return
        body, said = seen.call.body, answer.text()
        if not can_be_rated(body, said):
            return
        if len(self._running) >= AT_ONCE:
            self.counts["skipped"] += 1
            return
        task = asyncio.get_running_loop().create_task(self._rate(seen.call.id, body, said))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _rate(self, name: str, body: Mapping[str, Any], said: str) -> None:
        try:
            nats = await rate_answer(self._base, f"rate-{name}", body, said)
        except Exception as error:
            if not isinstance(error, ServeError):
                log.exception("rating %s failed", name)
            self.counts["failed"] += 1
            return
        if nats is None:
            self.counts["failed"] += 1
            return
        self.counts["rated"] += 1
        self._drift.note("likelihood", nats, first=FIRST)

    async def close(self) -> None:
        """Stop."""
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)


def can_be_rated(body: Mapping[str, Any], said: str) -> bool:
    """Tell whether there are a question and an answer, and not too long ones."""
    asked = plain_text(body)
    return bool(said.strip() and asked) and len(asked) + len(said) <= LONGEST_TEXT


async def rate_answer(base: Backend, id: str, asked: Mapping[str, Any], said: str) -> float | None:
    """Ask a model how likely an answer is.

    Args:
        base: Its completions know ``echo`` and ``logprobs``. Where it knows /tokenize too, a
            conversation is put by its own chat template; else it is read as plain text.
        id: Of the call.
        asked: Body of the request that was answered.
        said: The answer.

    Returns:
        Mean log-likelihood of its tokens, in nats; None where the model told none.
    """
    ids = await _in_tokens(base, asked, said)
    plain = plain_text(asked)
    body = {
        "model": base.models[0] if base.models else "",
        "prompt": plain + said if ids is None else [*ids[0], *ids[1]],
        "echo": True,
        "logprobs": 1,
        "max_tokens": 1,  # some servers take no 0
        "temperature": 0,
    }
    deadline = time.monotonic() + LONGEST_SECONDS
    call = Call(kind="completion", body=body, id=id, deadline=deadline)
    tokens: list[TokenLogprob] = []
    async with asyncio.timeout(LONGEST_SECONDS), aclosing(base.stream(call)) as events:
        async for event in events:
            if isinstance(event, Delta):
                tokens += event.logprobs or ()
    if ids is None:
        answer = between(tokens, len(plain.encode()), len((plain + said).encode()))
    else:
        answer = tokens[len(ids[0]) : len(ids[0]) + len(ids[1])]
    rated = [token.logprob for token in answer if math.isfinite(token.logprob)]
    return sum(rated) / len(rated) if rated else None


async def _in_tokens(
    base: Backend, asked: Mapping[str, Any], said: str
) -> tuple[list[int], list[int]] | None:
    """Give what was asked and what was said in the base's token ids; None where it tells none."""
    if not isinstance(base, TextTools):
        return None
    ways: list[dict[str, Any]] = [{"prompt": plain_text(asked)}]
    if asked.get("messages"):
        names = ("messages", "tools", "chat_template_kwargs")
        ways.insert(0, {name: asked[name] for name in names if asked.get(name)})
    for way in ways:
        try:
            before = await base.tokenize(way)
            answer = await base.tokenize({"prompt": said, "add_special_tokens": False})
            return list(map(int, before["tokens"])), list(map(int, answer["tokens"]))
        except (ServeError, LookupError, TypeError, ValueError) as error:
            log.info("an answer cannot be rated by %s: %s", " and ".join(way), error)
    return None


def between(tokens: Sequence[TokenLogprob], start: int, end: int) -> list[TokenLogprob]:
    """Give the tokens of a text that begin in a range of bytes."""
    found, place = [], 0
    for token in tokens:
        if start <= place < end:
            found.append(token)
        place += len(token.token.encode()) if token.bytes is None else len(token.bytes)
    return found


def plain_text(body: Mapping[str, Any]) -> str:
    """Give a request as one plain text, without any model's chat template.

    For a base that has none; what counts is that the same is rated every time.
    """
    messages = body.get("messages")
    if isinstance(messages, Sequence):
        return "".join(f"{m.get('role')}: {content_text(m.get('content'))}\n" for m in messages) + (
            "assistant: "
        )
    prompt = body.get("prompt", "")
    return prompt if isinstance(prompt, str) else ""
