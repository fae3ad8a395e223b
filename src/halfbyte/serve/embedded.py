"""A backend over an engine in this process: text in, text out.

::

    Call ──text/asked.py──> TokenRequest per choice ──> Engine.generate
    TokenEvent ──text/answer.py──> Delta, Finish; at the end Usage
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Call, Delta, Event, Load, Usage
from halfbyte.serve.config import ServeConfig
from halfbyte.serve.engine.contract import Ended, Engine, EngineInfo, Generated
from halfbyte.serve.text.answer import AnswerText
from halfbyte.serve.text.choice_requests import ChoiceRequest, count_characters, read_call
from halfbyte.serve.text.prompts import Prompts
from halfbyte.serve.text.token_text import Spelling

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
        self._limits = config.answer_limits
        self._closed = False
        self.adapter_folders: dict[str, str] = {}
        """Folder of each loaded adapter, by name."""
        self.missing_adapters: dict[str, str] = {}
        """Adapters of the model that this one replaced which could not be loaded, and why."""

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
        took = [_Took(prompt=choice.prompt, length=len(choice.request.prompt)) for choice in asked]
        is_alone = len(asked) == 1
        streams = [self._answer(*both, is_alone) for both in zip(asked, took, strict=True)]
        options = call.body.get("stream_options") or {}
        tells_on_the_way = bool(options.get("continuous_usage_stats"))
        # One alone without a task and a queue: they would cost each piece as much as its text does.
        merged = streams[0] if is_alone else _merge(streams)
        async with aclosing(merged) as events:
            async for event in events:
                if tells_on_the_way and isinstance(event, Delta):
                    event = replace(event, usage=_add_up(took))
                yield event
        yield _add_up(took)

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

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize.

        Args:
            body: Checked; with a prompt or messages.

        Returns:
            The ids, their number, the model's context, and their texts where asked for.
        """
        # A long text takes long enough to hold up everybody's streams.
        return await asyncio.to_thread(self._tokenize, body)

    def _tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
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

    async def detokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
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
        text = await asyncio.to_thread(self._prompts.tokenizer.decode, body["tokens"])
        return {"prompt": str(text)}

    async def load_adapter(self, name: str, folder: str) -> None:
        """Serve an adapter under its name; the caller has checked the folder's place."""
        await self._engine.load_adapter(name, folder)
        self.adapter_folders[name] = folder
        self.missing_adapters.pop(name, None)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away."""
        self.adapter_folders.pop(name, None)
        await self._engine.unload_adapter(name)

    async def _read(self, call: Call) -> list[ChoiceRequest]:
        model = call.body.get("model")
        adapter = None if model == self._model else model
        if adapter is not None and adapter not in self._engine.adapters:
            # A fallback is called by another model's name.
            adapter = None
        arguments = (call, self._prompts, self._engine.info, self._limits)
        if count_characters(call.body) > LONG_PROMPT:
            return await asyncio.to_thread(read_call, *arguments, adapter=adapter)
        return read_call(*arguments, adapter=adapter)

    async def _answer(
        self, asked: ChoiceRequest, took: _Took, is_alone: bool
    ) -> AsyncGenerator[Event, None]:
        """Run one choice to its end, and note what it took."""
        text = AnswerText(
            asked.choice,
            self._prompts.tokenizer,
            self._spelling,
            stops=asked.stops,
            calls=asked.make_call_filter(),
            logprobs=asked.request.top_logprobs is not None,
        )
        ended: Ended | None = None
        async with aclosing(self._engine.generate(asked.request)) as generated:
            async for events in generated:
                tokens: list[Generated] = []
                for event in events:
                    if isinstance(event, Generated):
                        tokens.append(event)
                    elif isinstance(event, Ended):
                        ended = event
                    else:
                        took.cached = event.cached_tokens
                        if asked.echo is not None:
                            yield text.begin(event, asked.request.prompt, asked.echo)
                text.add(tokens)
                took.tokens = text.tokens
                if ended is not None or text.is_complete:
                    break
                if (delta := text.take()) is not None:
                    yield delta
        delta, finish = text.end(ended)
        if delta is not None:
            yield replace(delta, is_last=is_alone)
        yield finish


@dataclass(slots=True, kw_only=True)
class _Took:
    """What a choice took by now."""

    prompt: int
    """Index of its prompt."""
    length: int
    """Of the prompt, in tokens."""
    tokens: int = 0
    cached: int = 0


def _add_up(took: Sequence[_Took]) -> Usage:
    """Give what all choices took; a prompt that several share counts once."""
    lengths = {one.prompt: one.length for one in took}
    cached: dict[int, int] = {}
    for one in took:
        cached[one.prompt] = max(cached.get(one.prompt, 0), one.cached)
    return Usage(
        prompt_tokens=sum(lengths.values()),
        completion_tokens=sum(one.tokens for one in took),
        cached_tokens=sum(cached.values()),
    )


async def _merge(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Give what several streams give, as it comes; closing it closes all of them."""
    arrived: asyncio.Queue[Event | Exception | None] = asyncio.Queue()

    async def pump(stream: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(stream):
                async for event in stream:
                    arrived.put_nowait(event)
        except Exception as error:  # noqa: BLE001 - raised again by whoever reads the queue
            arrived.put_nowait(error)
        else:
            arrived.put_nowait(None)

    tasks = [asyncio.create_task(pump(stream)) for stream in streams]
    left = len(tasks)
    try:
        while left:
            found = await arrived.get()
            if isinstance(found, Exception):
                raise found
            if found is None:
                left -= 1
            else:
                yield found
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
