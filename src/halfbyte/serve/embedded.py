"""A backend over an engine in this process: text in, text out.

::

    Call ──text/asked.py──> TokenRequest per choice ──> Engine.generate
    TokenEvent ──text/answer.py──> Delta, Finish; at the end Usage
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.contract import Ended, Engine, EngineInfo, Generated, Prompted
from halfbyte.serve.exchange import Call, Event, Load, Usage
from halfbyte.serve.text.answer import AnswerText
from halfbyte.serve.text.asked import AnswerLimits, Asked, read_call
from halfbyte.serve.text.prompts import Prompts
from halfbyte.serve.text.spelling import Spelling

LONG_PROMPT = 20_000
"""Characters above which a prompt is tokenized beside the event loop: it takes milliseconds."""


class EmbeddedBackend:
    """A model of this process."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        model: str,
        config: ServeConfig,
        chat_template: str | None = None,
    ) -> None:
        """Put text around an engine.

        Args:
            engine: Running.
            tokenizer: The model's.
            model: The name that clients call it by.
            config: For the limits.
            chat_template: In place of the model's own.
        """
        self._engine = engine
        self._model = model
        self._prompts = Prompts(tokenizer, template=chat_template)
        self._spelling = Spelling(tokenizer)
        self._limits = AnswerLimits(
            default_tokens=config.default_tokens, most_tokens=config.most_tokens
        )
        self._closed = False

    @property
    def name(self) -> str:
        """For logs and metrics."""
        return "embedded"

    @property
    def models(self) -> tuple[str, ...]:
        """The model, and its loaded adapters."""
        return (self._model, *self._engine.adapters)

    @property
    def engine_info(self) -> EngineInfo:
        """The engine's limits."""
        return self._engine.info

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer; closing cancels what the engine still does for it."""
        asked = await self._read(call)
        events: asyncio.Queue[Event | _Done | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._answer(choice, events)) for choice in asked]
        completion = 0
        cached: dict[int, int] = {}
        left = len(tasks)
        try:
            while left:
                event = await events.get()
                if isinstance(event, Exception):
                    raise event
                if isinstance(event, _Done):
                    left -= 1
                    completion += event.tokens
                    cached[event.prompt] = max(cached.get(event.prompt, 0), event.cached)
                else:
                    yield event
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        lengths = {choice.prompt: len(choice.request.prompt) for choice in asked}
        yield Usage(
            prompt_tokens=sum(lengths.values()),
            completion_tokens=completion,
            cached_tokens=sum(cached.values()),
        )

    async def is_ready(self) -> bool:
        """Tell whether it takes calls."""
        return not self._closed

    def load(self) -> Load:
        """Tell how busy it is."""
        load, info = self._engine.load(), self._engine.info
        return Load(
            running=load.running,
            waiting=load.waiting,
            cache_used_bytes=load.cache_used_bytes,
            cache_bytes=info.cache_bytes,
            weight_bytes=info.weight_bytes,
        )

    async def close(self) -> None:
        """Finish what runs, and free the engine."""
        if not self._closed:
            self._closed = True
            await self._engine.close()

    def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize.

        Args:
            body: Checked; with a prompt or messages.

        Returns:
            The ids, their number, the model's context, and their texts where asked for.
        """
        if "messages" in body:
            ids = self._prompts.encode_chat(
                body["messages"],
                tools=body.get("tools") or (),
                keywords=body.get("chat_template_kwargs"),
            )
        else:
            ids = self._prompts.encode_text(
                body["prompt"], add_special=body.get("add_special_tokens", True)
            )
        wanted = body.get("return_token_strs")
        return {
            "count": len(ids),
            "max_model_len": self._engine.info.context,
            "tokens": ids,
            "token_strs": [self._spelling.spell(token)[0] for token in ids] if wanted else None,
        }

    def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /detokenize.

        Args:
            body: Checked; with token ids.

        Returns:
            Their text.

        Raises:
            ServeError: An id is none of the model's.
        """
        size = self._engine.info.vocabulary
        if wrong := [token for token in body["tokens"] if not 0 <= token < size]:
            raise ServeError(
                f"The token id {wrong[0]} is none of the model's: they go from 0 to {size - 1}.",
                code="invalid_value",
                param="tokens",
            )
        return {"prompt": str(self._prompts.tokenizer.decode(body["tokens"]))}

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve an adapter under its name; the caller has checked the folder's place."""
        await self._engine.load_adapter(name, folder)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away."""
        await self._engine.unload_adapter(name)

    async def _read(self, call: Call) -> list[Asked]:
        model = call.body.get("model")
        adapter = None if model == self._model else model
        if adapter is not None and adapter not in self._engine.adapters:
            # A fallback is called by another model's name.
            adapter = None
        arguments = (call, self._prompts, self._engine.info, self._limits)
        if _count_characters(call.body) > LONG_PROMPT:
            return await asyncio.to_thread(read_call, *arguments, adapter=adapter)
        return read_call(*arguments, adapter=adapter)

    async def _answer(self, asked: Asked, events: asyncio.Queue[Any]) -> None:
        """Run one choice to its end; what happens goes into the queue."""
        try:
            done = await self._generate(asked, events)
        except Exception as error:  # noqa: BLE001 - raised again by whoever reads the queue
            events.put_nowait(error)
        else:
            events.put_nowait(done)

    async def _generate(self, asked: Asked, events: asyncio.Queue[Any]) -> _Done:
        text = AnswerText(
            asked.choice,
            self._prompts.tokenizer,
            self._spelling,
            stops=asked.stops,
            calls=asked.make_call_filter(),
            logprobs=asked.request.top_logprobs is not None,
        )
        done = _Done(asked.prompt)
        ended: Ended | None = None
        async with aclosing(self._engine.generate(asked.request)) as generated:
            async for event in generated:
                delta = None
                if isinstance(event, Prompted):
                    done.cached = event.cached_tokens
                    if asked.echo is not None:
                        delta = text.begin(event, asked.request.prompt, asked.echo)
                elif isinstance(event, Generated):
                    done.tokens += 1
                    delta = text.add(event)
                else:
                    ended = event
                if delta is not None:
                    events.put_nowait(delta)
                if text.is_complete:
                    break
        delta, finish = text.end(ended)
        if delta is not None:
            events.put_nowait(delta)
        events.put_nowait(finish)
        return done


class _Done:
    """A choice has ended: what it took."""

    def __init__(self, prompt: int) -> None:
        self.prompt = prompt
        self.tokens = 0
        self.cached = 0


def _count_characters(body: Mapping[str, Any]) -> int:
    """About how much text there is to tokenize, at once and roughly."""
    prompt = body.get("prompt")
    if prompt is not None:
        return len(prompt) if isinstance(prompt, str) else sum(map(len, map(str, prompt)))
    return sum(len(str(message.get("content"))) for message in body.get("messages", ()))
