"""An engine of scripted answers, token by token, over a real tokenizer."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field

from halfbyte.errors import ServeError
from halfbyte.serve.engine.contract import (
    Ended,
    EngineInfo,
    EngineLoad,
    Generated,
    Prefilled,
    ScoredToken,
    TokenEvent,
    TokenRequest,
)

DEFAULT_ANSWER = "Hello! This is an answer, with a naïve café and 日本語 🙂 in it."


@dataclass(kw_only=True)
class ScriptedEngine:
    """Answers by what the prompt contains; the last matching entry wins."""

    tokenizer: object
    script: dict[str, object] = field(default_factory=dict)
    """Part of a prompt -> text, or a list of token ids, or an exception."""
    delay: float = 0.0
    """Seconds between tokens."""
    together: int = 1
    """Events per batch."""
    context: int = 512
    requests: list[TokenRequest] = field(default_factory=list)
    running: int = 0
    closed_early: int = 0
    fail_after: int | None = None
    """Tokens after which the engine fails."""
    _adapters: dict[str, str] = field(default_factory=dict)

    @property
    def info(self):
        return EngineInfo(
            context=self.context,
            vocabulary=len(self.tokenizer),
            bytes_per_token=100,
            cache_bytes=100_000,
            weight_bytes=1_000_000,
            runner="fake",
        )

    @property
    def adapters(self):
        return tuple(self._adapters)

    async def load_adapter(self, name, folder):
        self._adapters[name] = folder

    async def unload_adapter(self, name):
        if name not in self._adapters:
            raise ServeError(f"No adapter {name}.", status=404, code="model_not_found")
        del self._adapters[name]

    def load(self):
        return EngineLoad(
            running=self.running,
            waiting=0,
            cache_used_bytes=0,
            restarts=0,
        )

    async def close(self):
        while self.running:
            await asyncio.sleep(0.01)

    async def generate(self, request: TokenRequest) -> AsyncGenerator[list[TokenEvent], None]:
        together: list[TokenEvent] = []
        async with aclosing(self._generate(request)) as events:
            async for event in events:
                together.append(event)
                if len(together) >= self.together or isinstance(event, Ended):
                    yield together
                    together = []

    async def _generate(self, request: TokenRequest) -> AsyncGenerator[TokenEvent, None]:
        self.requests.append(request)
        self.running += 1
        finished = False
        try:
            answer = self._find_answer(request)
            if isinstance(answer, Exception):
                raise answer
            yield Prefilled(cached_tokens=1, scored_prompt=self._score_prompt(request))
            for number, token in enumerate(answer):
                if number == request.max_new_tokens:
                    finished = True
                    yield Ended(reason="length")
                    return
                if number == self.fail_after:
                    raise ServeError("The engine broke.", status=503, kind="server_error")
                await asyncio.sleep(self.delay)
                if token in request.stop_tokens:
                    finished = True
                    yield Ended(reason="stop_token", stop_token=token)
                    return
                yield Generated(scored=self._score(token, request.top_logprobs), entropy=1.5)
            finished = True
            yield Ended(reason="end")
        except ServeError:
            finished = True
            raise
        finally:
            self.running -= 1
            self.closed_early += not finished

    def _find_answer(self, request):
        prompt = self.tokenizer.decode(list(request.prompt))
        answer = DEFAULT_ANSWER
        for part, said in self.script.items():
            if part in prompt:
                answer = said
        if isinstance(answer, str):
            return self.tokenizer(answer, add_special_tokens=False)["input_ids"]
        return answer

    def _score_prompt(self, request):
        if request.prompt_logprobs is None:
            return None
        rest = [self._score(token, request.prompt_logprobs) for token in request.prompt[1:]]
        return (None, *rest)

    def _score(self, token, top):
        if top is None:
            return ScoredToken(token=token, logprob=math.nan)
        others = [(token, -0.25), ((token + 1) % len(self.tokenizer), -2.0)]
        others += [((token + k) % len(self.tokenizer), -2.0 - k) for k in range(2, top)]
        return ScoredToken(token=token, logprob=-0.25, top=tuple(others[:top]))
