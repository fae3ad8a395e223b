"""Scripted backends, calls, and a fake clock."""

from __future__ import annotations

import asyncio
import itertools
import math
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Call, Delta, Event, Finish, Load, Served, TokenLogprob, Usage

_numbers = itertools.count()


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def make_call(
    text: str = "Say something.", *, tags=(), deadline=None, id: str | None = None, **body
) -> Call:
    body.setdefault("model", "small")
    messages = [{"role": "user", "content": text}]
    return Call(
        kind="chat",
        body={"messages": messages, **body},
        id=id or f"chatcmpl-{next(_numbers)}",
        tags=frozenset(tags),
        deadline=deadline,
    )


def answer(text: str, *, logprob: float = -0.1, entropy: float | None = None) -> list[Event]:
    """Return the events of a good answer, one token per word."""
    words = text.split(" ")
    words = [word if n == 0 else " " + word for n, word in enumerate(words)]
    entropies = () if entropy is None else (entropy,)
    return [
        *(
            Delta(
                text=word,
                logprobs=(TokenLogprob(token=word, logprob=logprob, bytes=None),),
                entropies=entropies,
            )
            for word in words
        ),
        Finish(reason="stop"),
        Usage(prompt_tokens=5, completion_tokens=len(words)),
    ]


class ScriptedBackend:
    """Plays a script: events, exceptions to raise, seconds or an Event to wait for."""

    def __init__(
        self,
        name: str,
        script: list | Callable[[Call], list],
        *,
        models: tuple[str, ...] = ("small",),
        version: str = "",
        begins_after: float = 0.0,
    ) -> None:
        self.name = name
        self.models = models
        self.version = version
        self.script = script
        self.begins_after = begins_after
        self.calls: list[Call] = []
        self.running = 0
        self.cancelled = 0
        self.closed = False

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        self.calls.append(call)
        # As a real one, which reads the chat before it asks its engine.
        await asyncio.sleep(self.begins_after)
        if self.closed:
            raise ServeError("It is closed.", status=503, kind="server_error")
        self.running += 1
        done = False
        try:
            script = self.script(call) if callable(self.script) else self.script
            for step in script:
                if isinstance(step, Exception):
                    done = True
                    raise step
                if isinstance(step, asyncio.Event):
                    await step.wait()
                    continue
                if isinstance(step, int | float):
                    await (asyncio.Event().wait() if math.isinf(step) else asyncio.sleep(step))
                    continue
                if isinstance(step, Delta) and not call.body.get("logprobs"):
                    step = replace(step, logprobs=None)
                yield step
            done = True
        finally:
            self.running -= 1
            self.cancelled += not done

    async def is_ready(self) -> bool:
        return not self.closed

    def load(self) -> Load:
        return Load(running=self.running, waiting=0, cache_used_bytes=10, cache_bytes=100)

    async def close(self) -> None:
        self.closed = True


def failure(status: int = 500, **more) -> ServeError:
    return ServeError("The engine is gone.", status=status, kind="server_error", **more)


async def collect(router, call: Call, served: Served | None = None) -> tuple[str, Served]:
    """Return the text of an answer and which model gave it."""
    served = served or Served()
    text = ""
    async for event in router.stream(call, served):
        if isinstance(event, Delta):
            text += event.text
    return text, served
