"""Format events as OpenAI's JSON: one object for a complete answer, or a chunk per event."""

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
"""Placeholder for a chunk's text; occurs in no model's name."""
MIN_LOGPROB = -9999.0
"""OpenAI's value for minus infinity, which JSON cannot represent."""


@dataclass(slots=True)
class Choice:
    """One complete choice."""

    pieces: list[str] = field(default_factory=list)
    refusal: str = ""
    reasoning: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    calls: list[ToolCall] = field(default_factory=list)
    finish: str = ""

    @property
    def text(self) -> str:
        """The choice's text."""
        return "".join(self.pieces)


async def collect_answer(
    events: AsyncIterator[Event], on_event: Callable[[Event], None] = lambda event: None
) -> tuple[dict[int, Choice], Usage]:
    """Collect the events of a complete answer.

    Args:
        events: The events of one call.
        on_event: Called with each event.

    Returns:
        The choices by index, and the token counts.

    Raises:
        ServeError: 502 if the answer is incomplete.
    """
    choices: dict[int, Choice] = {}
    usage: Usage | None = None
    async for event in events:
        on_event(event)
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
            "The backend's answer ended before it was complete. Try again.",
            status=502,
            kind="server_error",
            code="incomplete_answer",
        )
    return choices, usage


class AnswerFormatter:
    """Formats the answer of one call as JSON."""

    def __init__(self, call: Call, model: str) -> None:
        """Prepare the fields that all chunks share.

        Args:
            call: The answered call.
            model: The model name to report.
        """
        self._call = call
        self._is_chat = call.kind == "chat"
        self._head = {"id": call.id, "created": int(time.time()), "model": model}
        # Choices of a chat whose first chunk, with the role, was sent.
        self._opened: set[int] = set()
        opening = {
            **self._head,
            "object": _OBJECTS[call.kind, True],
            "system_fingerprint": FINGERPRINT,
        }
        # The beginning of every chunk, encoded once.
        self._chunk_start = f"{write_json(opening)[:-1]},"
        # Per choice: the encoded bytes before and after the text of a text-only chunk.
        self._text_frames: dict[int, tuple[bytes, bytes]] = {}
        # Per choice of a completion: characters so far, for text_offset.
        self._lengths: dict[int, int] = {}
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}
        options = call.body.get("stream_options") or {}
        self.with_usage = bool(options.get("include_usage"))

    def format_answer(self, choices: dict[int, Choice], usage: Usage) -> dict[str, Any]:
        """Format a complete answer.

        Args:
            choices: The choices by index.
            usage: The token counts.

        Returns:
            The response body.
        """
        format_choice = self._chat_choice if self._is_chat else self._completion_choice
        body = {
            **self._head,
            "object": _OBJECTS[self._call.kind, False],
            "system_fingerprint": FINGERPRINT,
            "choices": [format_choice(index, choice) for index, choice in sorted(choices.items())],
        }
        return body | {"usage": format_usage(usage)} if usage.is_reported else body

    def format_chunks(self, event: Event) -> list[bytes]:
        """Format an event as chunks of a stream.

        Args:
            event: The next event.

        Returns:
            Chunks as server-sent events; none for usage that was not requested or not reported.
        """
        if isinstance(event, Usage):
            is_sent = self.with_usage and event.is_reported
            return [self._chunk([], format_usage(event))] if is_sent else []
        if type(event) is Delta and self._is_text_only(event):
            return [self._text_chunk(event)]
        usage = None
        if self.with_usage and isinstance(event, Delta) and event.usage is not None:
            usage = format_usage(event.usage)
        if not self._is_chat:
            return [self._chunk([self._completion_chunk(event)], usage)]
        chunks = []
        if event.choice not in self._opened:
            self._opened.add(event.choice)
            opening = {"role": "assistant", "content": "", "refusal": None}
            chunks.append(self._chunk([_chat_chunk(event.choice, opening)]))
        if isinstance(event, Finish):
            chunks.append(self._chunk([_chat_chunk(event.choice, {}, finish=event.reason)]))
            return chunks
        delta: dict[str, Any] = {}
        if event.reasoning:
            delta["reasoning_content"] = event.reasoning
        if event.refusal:
            delta["refusal"] = event.refusal
        if event.text or not (delta or event.tool_calls):
            delta["content"] = event.text
        if event.tool_calls:
            delta["tool_calls"] = [
                {"index": call.index, **_format_call(call)} for call in event.tool_calls
            ]
        chunks.append(self._chunk([_chat_chunk(event.choice, delta, event.logprobs)], usage))
        return chunks

    def _is_text_only(self, event: Delta) -> bool:
        has_more = event.tool_calls or event.refusal or event.reasoning
        is_text = event.logprobs is None and not has_more and not self.with_usage
        return is_text and (event.choice in self._opened or not self._is_chat)

    def _text_chunk(self, event: Delta) -> bytes:
        """Format a chunk that differs from its choice's other text-only chunks in the text only."""
        frame = self._text_frames.get(event.choice)
        if frame is None:
            chunk = (
                _chat_chunk(event.choice, {"content": _TEXT})
                if self._is_chat
                else self._completion_chunk(replace(event, text=_TEXT))
            )
            before, _, after = self._chunk([chunk]).partition(write_json(_TEXT).encode())
            frame = self._text_frames[event.choice] = (before, after)
        return write_json(event.text).encode("utf-8", "replace").join(frame)

    def _chunk(self, choices: list[Any], usage: dict[str, Any] | None = None) -> bytes:
        rest: dict[str, Any] = {"choices": choices}
        if self.with_usage:
            rest["usage"] = usage
        return write_event(self._chunk_start + write_json(rest)[1:])

    def _chat_choice(self, index: int, choice: Choice) -> dict[str, Any]:
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
            message["tool_calls"] = [_format_call(call) for call in choice.calls]
        return {
            "index": index,
            "message": message,
            "logprobs": _chat_logprobs(choice.logprobs),
            "finish_reason": choice.finish,
        }

    def _completion_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        return {
            "index": index,
            "text": choice.text,
            "logprobs": self._completion_logprobs(index, choice.logprobs),
            "finish_reason": _completion_finish(choice.finish),
        }

    def _completion_chunk(self, event: Delta | Finish) -> dict[str, Any]:
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
            self._lengths[index] = offsets[-1] + self._count_characters(index, token)
        return {
            "tokens": [token.token for token in tokens],
            "token_logprobs": [_format_logprob(token.logprob) for token in tokens],
            "top_logprobs": [_format_top(token) for token in tokens],
            "text_offset": offsets,
        }

    def _count_characters(self, index: int, token: TokenLogprob) -> int:
        """Count the characters that a token completes; it may end within a character."""
        if token.bytes is None:
            return len(token.token)
        decoder = self._decoders.setdefault(index, _Utf8("replace"))
        return len(decoder.decode(bytes(token.bytes)))


def format_usage(usage: Usage) -> dict[str, Any]:
    """Format token counts as OpenAI does."""
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


def _chat_chunk(
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
        {**_format_token(token), "top_logprobs": [_format_token(other) for other in token.top]}
        for token in logprobs
    ]
    return {"content": content, "refusal": None}


def _format_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token,
        "logprob": _format_logprob(token.logprob),
        "bytes": None if token.bytes is None else list(token.bytes),
    }


def _format_top(token: TokenLogprob) -> dict[str, float | None] | None:
    """Format the top tokens and the token itself, as OpenAI does; None for the first token."""
    if math.isnan(token.logprob):
        return None
    top = {other.token: _format_logprob(other.logprob) for other in reversed(token.top)}
    top.setdefault(token.token, _format_logprob(token.logprob))
    return top


def _format_logprob(logprob: float) -> float | None:
    # JSON has neither NaN nor infinities; NaN compares as false.
    return max(logprob, MIN_LOGPROB) if logprob < math.inf else None


def _format_call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id,
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _completion_finish(reason: str) -> str:
    """Map the finish reason: completions have no tool calls."""
    return "stop" if reason == "tool_calls" else reason
