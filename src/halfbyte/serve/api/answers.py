"""Events as OpenAI's JSON: one object for a whole answer, or a chunk for each piece."""

from __future__ import annotations

import codecs
import math
import time
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.api.streaming import write_event, write_json
from halfbyte.serve.backend import (
    Call,
    Delta,
    Event,
    Finish,
    Kind,
    TokenLogprob,
    ToolCall,
    Usage,
)
from halfbyte.version import __version__

FINGERPRINT = f"halfbyte-{__version__}"
_OBJECTS: dict[tuple[Kind, bool], str] = {
    ("chat", False): "chat.completion",
    ("chat", True): "chat.completion.chunk",
    ("completion", False): "text_completion",
    ("completion", True): "text_completion",
}
_Utf8 = codecs.getincrementaldecoder("utf-8")
_TEXT = "\0"
"""In place of a text; in no model's name."""
LEAST_LOGPROB = -9999.0
"""In place of minus infinity, which JSON does not know; OpenAI's."""


@dataclass(slots=True)
class Choice:
    """One choice, gathered."""

    pieces: list[str] = field(default_factory=list)
    refusal: str = ""
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    calls: list[ToolCall] = field(default_factory=list)
    finish: str = ""

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


async def gather(
    events: AsyncIterator[Event], note: Callable[[Event], None] = lambda event: None
) -> tuple[dict[int, Choice], Usage]:
    """Wait for a whole answer.

    Args:
        events: Of one call.
        note: Told of each.

    Returns:
        Its choices by index, and what it took.

    Raises:
        ServeError: 502: the answer broke off.
    """
    choices: dict[int, Choice] = {}
    usage: Usage | None = None
    async for event in events:
        note(event)
        if isinstance(event, Usage):
            usage = event
            continue
        choice = choices.setdefault(event.choice, Choice())
        if isinstance(event, Finish):
            choice.finish = event.reason
            continue
        choice.pieces.append(event.text)
        choice.refusal += event.refusal
        choice.reasoning.append(event.reasoning)
        choice.calls.extend(event.tool_calls)
        if event.logprobs is not None:
            choice.logprobs = (choice.logprobs or []) + list(event.logprobs)
    if usage is None or not all(choice.finish for choice in choices.values()):
        raise ServeError(
            "The answer broke off before its end.",
            status=502,
            kind="server_error",
            code="incomplete_answer",
        )
    return choices, usage


class AnswerForm:
    """The JSON of one call's answer."""

    def __init__(self, call: Call, model: str) -> None:
        """Start.

        Args:
            call: That is answered.
            model: The name that is told.
        """
        self._call = call
        self._is_chat = call.kind == "chat"
        self._head = {"id": call.id, "created": int(time.time()), "model": model}
        self._opened: set[int] = set()
        opening = {
            **self._head,
            "object": _OBJECTS[call.kind, True],
            "system_fingerprint": FINGERPRINT,
        }
        # What all chunks of a stream begin with is written once.
        self._chunk_start = f"{write_json(opening)[:-1]},"
        # Of each choice: what stands before and after the text of a piece that is text alone.
        self._around: dict[int, tuple[bytes, bytes]] = {}
        # Of each completion's choice: characters so far, from which token offsets count.
        self._lengths: dict[int, int] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        options = call.body.get("stream_options") or {}
        self.with_usage = bool(options.get("include_usage"))

    def whole(self, choices: dict[int, Choice], usage: Usage) -> dict[str, Any]:
        """Give the whole answer.

        Args:
            choices: By index.
            usage: What it took.

        Returns:
            The body.
        """
        tell = self._whole_chat if self._is_chat else self._whole_completion
        body = {
            **self._head,
            "object": _OBJECTS[self._call.kind, False],
            "system_fingerprint": FINGERPRINT,
            "choices": [tell(index, choice) for index, choice in sorted(choices.items())],
        }
        return body | {"usage": tell_usage(usage)} if usage.is_told else body

    def chunks(self, event: Event) -> list[bytes]:
        """Give what a client is sent for an event.

        Args:
            event: The next one.

        Returns:
            Chunks as server-sent events; none for usage that was not asked for, or not told.
        """
        if isinstance(event, Usage):
            tells = self.with_usage and event.is_told
            return [self._chunk([], tell_usage(event))] if tells else []
        if type(event) is Delta and self._is_plain(event):
            return [self._plain_chunk(event)]
        so_far = None
        if self.with_usage and isinstance(event, Delta) and event.usage is not None:
            so_far = tell_usage(event.usage)
        if not self._is_chat:
            return [self._chunk([self._completion_piece(event)], so_far)]
        found = []
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            opening = {"role": "assistant", "content": "", "refusal": None}
            found.append(self._chunk([_chat_piece(event.choice, opening)]))
        if isinstance(event, Finish):
            found.append(self._chunk([_chat_piece(event.choice, {}, finish=event.reason)]))
            return found
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event.refusal:
            delta["refusal"] = event.refusal
        if event.text or not (delta or event.tool_calls):
            delta["content"] = event.text
        if event.tool_calls:
            delta["tool_calls"] = [
                {"index": call.index, **_tell_call(call)} for call in event.tool_calls
            ]
        found.append(self._chunk([_chat_piece(event.choice, delta, event.logprobs)], so_far))
        return found

    def _is_plain(self, event: Delta) -> bool:
        is_more = event.tool_calls or event.refusal or event.reasoning
        is_text = event.logprobs is None and not is_more and not self.with_usage
        return is_text and (event.choice in self._opened or not self._is_chat)

    def _plain_chunk(self, event: Delta) -> bytes:
        """Write a piece that differs from the one before in its text only."""
        around = self._around.get(event.choice)
        if around is None:
            piece = (
                _chat_piece(event.choice, {"content": _TEXT})
                if self._is_chat
                else self._completion_piece(replace(event, text=_TEXT))
            )
            before, _, after = self._chunk([piece]).partition(write_json(_TEXT).encode())
            around = self._around[event.choice] = (before, after)
        return write_json(event.text).encode("utf-8", "replace").join(around)

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None = None) -> bytes:
        rest: dict[str, Any] = {"choices": choices}
        if self.with_usage:
            rest["usage"] = usage
        return write_event(self._chunk_start + write_json(rest)[1:])

    def _whole_chat(self, index: int, choice: Choice) -> dict[str, Any]:
        content = choice.text
        message: dict[str, Any] = {
            "role": "assistant",
            "content": content or (None if choice.calls or choice.refusal else ""),
            "refusal": choice.refusal or None,
            "annotations": [],
        }
        if reasoning := "".join(choice.reasoning):
            message["reasoning_content"] = reasoning
        if choice.calls:
            message["tool_calls"] = [_tell_call(call) for call in choice.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish,
        }

    def _whole_completion(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._completion_logprobs(index, choice.logprobs),
            "finish_reason": _completion_finish(choice.finish),
        }

    def _completion_piece(self, event: Delta | Finish) -> dict[str, Any]:
        if isinstance(event, Finish):
            return {
                "index": event.choice,
                "text": "",
                "logprobs": None,
                "finish_reason": _completion_finish(event.reason),
            }
        return {
            "index": event.choice,
            "text": event.text,
            "logprobs": self._completion_logprobs(event.choice, event.logprobs),
            "finish_reason": None,
        }

    def _completion_logprobs(
        self, index: int, logprobs: Iterable[TokenLogprob] | None
    ) -> dict[str, Any] | None:
        if logprobs is None:
            return None
        tokens = list(logprobs)
        offsets = []
        for token in tokens:
            offsets.append(self._lengths.get(index, 0))
            self._lengths[index] = offsets[-1] + self._measure(index, token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_number(token.logprob) for token in tokens],
            "top_logprobs": [_top_of(token) for token in tokens],
            "text_offset": offsets,
        }

    def _measure(self, index: int, token: TokenLogprob) -> int:
        """Count the characters that a token ends: it may be a part of one, spelled with escapes."""
        if token.bytes is None:
            return len(token.token)
        decoder = self._decoders.setdefault(index, _Utf8("replace"))
        return len(decoder.decode(bytes(token.bytes)))


def tell_usage(usage: Usage) -> dict[str, Any]:
    """Write what an answer took."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens, "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": usage.reasoning_tokens,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _chat_piece(
    index: int,
    delta: dict[str, Any],
    logprobs: Iterable[TokenLogprob] | None = None,
    finish: str | None = None,
) -> dict[str, Any]:
    return {
        "index": index,
        "delta": delta,
        "logprobs": _chat_logprobs(logprobs),
        "finish_reason": finish,
    }


def _chat_logprobs(logprobs: Iterable[TokenLogprob] | None) -> dict[str, Any] | None:
    if logprobs is None:
        return None
    content = [
        {**_tell_token(token), "top_logprobs": [_tell_token(other) for other in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _tell_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": _number(token.logprob),
        "bytes": None if token.bytes is None else list(token.bytes),
    }


def _top_of(token: TokenLogprob) -> dict[str, float | None] | None:
    """Give the likeliest and the token itself, as OpenAI does; none where nothing came before."""
    if math.isnan(token.logprob):
        return None
    top = {other.token: _number(other.logprob) for other in reversed(token.top)}
    top.setdefault(token.token, _number(token.logprob))
    return top


def _number(logprob: float) -> float | None:
    # Neither what is no number nor what is without end is JSON.
    return max(logprob, LEAST_LOGPROB) if logprob < math.inf else None


def _tell_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _completion_finish(reason: str) -> str:
    """Completions know no tools."""
    return "stop" if reason == "tool_calls" else reason
