"""The backend for a model that runs in this process.

::

    Call ──text/choice_requests.py──> TokenRequest per choice ──> Engine.generate
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
from halfbyte.serve.text.prompts import LONG_PROMPT_CHARACTERS, Prompts
from halfbyte.serve.text.token_text import Spelling


class EmbeddedBackend:
    """Answers calls with a model that runs in this process."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Any,
        *,
        model: str,
        config: ServeConfig,
        chat_template: str | None = None,
    ) -> None:
        """Connect an engine and a tokenizer.

        Args:
            engine: The running engine.
            tokenizer: The model's tokenizer.
            model: The model's name for clients.
            config: Contains the limits on answers.
            chat_template: Replaces the model's own.
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
        """Name in logs and metrics."""
        return "embedded"

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the model and its loaded adapters."""
        return (self._model, *self._engine.adapters)

    @property
    def engine_info(self) -> EngineInfo:
        """The engine's limits."""
        return self._engine.info

    async def stream(self, call: Call) -> AsyncGenerator[Event, None]:
        """Answer a call; closing the iterator cancels its generation in the engine."""
        choices = await self._read(call)
        counts = [
            _TokenCounts(prompt=choice.prompt, prompt_tokens=len(choice.request.prompt))
            for choice in choices
        ]
        is_only_choice = len(choices) == 1
        streams = [
            self._answer(choice, count, is_only_choice)
            for choice, count in zip(choices, counts, strict=True)
        ]
        options = call.body.get("stream_options") or {}
        reports_usage = bool(options.get("continuous_usage_stats"))
        # A single choice needs no task and queue, which would double the cost of each piece.
        merged = streams[0] if is_only_choice else _merge(streams)
        async with aclosing(merged) as events:
            async for event in events:
                if reports_usage and isinstance(event, Delta):
                    event = replace(event, usage=_sum_usage(counts))
                yield event
        yield _sum_usage(counts)

    async def is_ready(self) -> bool:
        """Return whether it accepts calls."""
        return not self._closed

    def load(self) -> Load:
        """Return how busy the engine is."""
        load, info = self._engine.load(), self._engine.info
        return Load(
            running=load.running,
            waiting=load.waiting,
            cache_used_bytes=load.cache_used_bytes,
            cache_bytes=info.cache_bytes,
            weight_bytes=info.weight_bytes,
        )

    async def close(self) -> None:
        """Finish the running calls and free the engine."""
        if not self._closed:
            self._closed = True
            await self._engine.close()

    async def tokenize(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """Answer /tokenize.

        Args:
            body: Validated; contains a prompt or messages.

        Returns:
            The token ids, their number, the model's context length, and the tokens' texts if
            requested.
        """
        # A long text would block the event loop and delay all streams.
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
            body: Validated; contains token ids.

        Returns:
            Their text.

        Raises:
            ServeError: An id is outside the model's vocabulary.
        """
        size = self._engine.info.vocabulary
        if invalid := [token for token in body["tokens"] if not 0 <= token < size]:
            raise ServeError(
                f"The token id {invalid[0]} is outside the model's vocabulary of 0 to {size - 1}.",
                code="invalid_value",
                param="tokens",
            )
        text = await asyncio.to_thread(self._prompts.tokenizer.decode, body["tokens"])
        return {"prompt": str(text)}

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load an adapter; the caller has checked that its folder may be loaded."""
        await self._engine.load_adapter(name, folder)
        self.adapter_folders[name] = folder
        self.missing_adapters.pop(name, None)

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter."""
        self.adapter_folders.pop(name, None)
        await self._engine.unload_adapter(name)

    async def _read(self, call: Call) -> list[ChoiceRequest]:
        model = call.body.get("model")
        adapter = None if model == self._model else model
        if adapter is not None and adapter not in self._engine.adapters:
            # As a fallback it receives calls with another model's name.
            adapter = None
        arguments = (call, self._prompts, self._engine.info, self._limits)
        if count_characters(call.body) > LONG_PROMPT_CHARACTERS:
            return await asyncio.to_thread(read_call, *arguments, adapter=adapter)
        return read_call(*arguments, adapter=adapter)

    async def _answer(
        self, choice: ChoiceRequest, counts: _TokenCounts, is_only_choice: bool
    ) -> AsyncGenerator[Event, None]:
        """Generate one choice, and update its token counts."""
        text = AnswerText(
            choice.choice,
            self._prompts.tokenizer,
            self._spelling,
            stops=choice.stops,
            calls=choice.make_call_filter(),
            logprobs=choice.request.top_logprobs is not None,
        )
        ended: Ended | None = None
        async with aclosing(self._engine.generate(choice.request)) as generated:
            async for events in generated:
                tokens: list[Generated] = []
                for event in events:
                    if isinstance(event, Generated):
                        tokens.append(event)
                    elif isinstance(event, Ended):
                        ended = event
                    else:
                        counts.cached_tokens = event.cached_tokens
                        if choice.echo is not None:
                            yield text.echo_prompt(event, choice.request.prompt, choice.echo)
                text.add(tokens)
                counts.new_tokens = text.tokens
                if ended is not None or text.is_complete:
                    break
                if (delta := text.take()) is not None:
                    yield delta
        delta, finish = text.end(ended)
        if delta is not None:
            yield replace(delta, is_last=is_only_choice)
        yield finish


@dataclass(slots=True, kw_only=True)
class _TokenCounts:
    """Token counts of one choice so far."""

    prompt: int
    """Index of its prompt."""
    prompt_tokens: int
    new_tokens: int = 0
    cached_tokens: int = 0


def _sum_usage(counts: Sequence[_TokenCounts]) -> Usage:
    """Sum the counts of all choices; a prompt shared by several choices counts once."""
    lengths = {count.prompt: count.prompt_tokens for count in counts}
    cached: dict[int, int] = {}
    for count in counts:
        cached[count.prompt] = max(cached.get(count.prompt, 0), count.cached_tokens)
    return Usage(
        prompt_tokens=sum(lengths.values()),
        completion_tokens=sum(count.new_tokens for count in counts),
        cached_tokens=sum(cached.values()),
    )


async def _merge(streams: Sequence[AsyncGenerator[Event, None]]) -> AsyncGenerator[Event, None]:
    """Merge streams in order of arrival; closing the result closes all of them."""
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
