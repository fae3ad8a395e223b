"""What an OpenAI-compatible server streams, as events; whatever is no such stream is an error."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.backend import (
    Delta,
    Event,
    Finish,
    FinishReason,
    Kind,
    TokenLogprob,
    ToolCall,
    Usage,
)

DONE = "[DONE]"
MOST_TOKENS = 2**53
"""From here on JSON's readers count no more one by one; no answer has so many."""
_FINISHES: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


_NO_CHUNK = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class ChunkReader:
    """Chunks of one answer in, events out."""

    def __init__(self, kind: Kind, host: str, num_choices: int) -> None:
        """Start.

        Args:
            kind: Of the call.
            host: Who answers, for messages.
            num_choices: That must come.
        """
        self._kind = kind
        self._host = host
        self._num_choices = num_choices
        self._finished: set[int] = set()
        self._calls: dict[int, dict[int, dict[str, str]]] = {}
        self._pieces = 0
        self._usage: Usage | None = None
        self.done = False
        """The server has said that it is."""

    def read(self, data: str) -> list[Event]:
        """Take one chunk.

        Args:
            data: Of a server-sent event.

        Returns:
            What it means.

        Raises:
            ServeError: 502: it is no chunk, or it tells an error.
        """
        if data.strip() == DONE:
            self.done = True
            return []
        try:
            chunk = read_json(data)
            if error := chunk.get("error"):
                failure = upstream_error(502, {"error": error}, self._host)
                raise failure
            events: list[Event] = []
            for choice in chunk.get("choices") or ():
                events += self._read_choice(choice)
            if usage := chunk.get("usage"):
                self._usage = _read_usage(usage)
        except _NO_CHUNK as error:
            failure = broken(self._host, f"it sent something else: {data[:100]!r}")
            raise failure from error
        return events

    def finish(self) -> Usage:
        """Close the answer.

        Returns:
            What it took; counted by its pieces where the server did not say.

        Raises:
            ServeError: 502: it broke off.
        """
        if len(self._finished) < self._num_choices:
            failure = broken(
                self._host,
                f"it broke off: {len(self._finished)} of {self._num_choices} choices were finished",
            )
            raise failure
        return self._usage or Usage(
            prompt_tokens=0, completion_tokens=self._pieces, is_reported=False
        )

    def _read_choice(self, choice: Mapping[str, Any]) -> list[Event]:
        index = int(choice.get("index") or 0)
        events: list[Event] = []
        if self._kind == "chat":
            delta = choice.get("delta") or {}
            parts = delta.get("tool_calls") or ()
            for part in parts:
                self._add_call(index, part)
            piece = Delta(
                choice=index,
                text=_text(delta, "content"),
                refusal=_text(delta, "refusal"),
                # vLLM's newer name for it is the second one.
                reasoning=_text(delta, "reasoning_content") or _text(delta, "reasoning"),
                logprobs=_read_chat_logprobs(choice),
            )
        else:
            parts = ()
            piece = Delta(
                choice=index,
                text=_text(choice, "text"),
                logprobs=_read_completion_logprobs(choice),
            )
        # Of a call nothing is given before its end, but it shows that the model goes on.
        if piece.text or piece.refusal or piece.reasoning or piece.logprobs or parts:
            self._pieces += 1
            events.append(piece)
        reason = choice.get("finish_reason")
        if reason is not None and index not in self._finished:
            self._finished.add(index)
            if calls := self._calls.pop(index, {}):
                events.append(Delta(choice=index, tool_calls=_whole_calls(calls)))
            events.append(Finish(choice=index, reason=_FINISHES.get(str(reason), "stop")))
        return events

    def _add_call(self, index: int, part: Mapping[str, Any]) -> None:
        calls = self._calls.setdefault(index, {})
        call = calls.setdefault(
            int(part.get("index") or 0), {"id": "", "name": "", "arguments": ""}
        )
        function = part.get("function") or {}
        call["id"] = call["id"] or str(part.get("id") or "")
        call["name"] = call["name"] or str(function.get("name") or "")
        call["arguments"] += function.get("arguments") or ""


def read_json(text: str) -> Any:
    """Read what another server wrote.

    Args:
        text: JSON; for anything else there is a ValueError or a RecursionError.

    Returns:
        The value. Half a character, which JSON can write and UTF-8 cannot, is a question mark.
    """
    value = json.loads(text)
    if "\\ud" not in text.lower():
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def broken(host: str, reason: str) -> ServeError:
    """Build the error of an answer that is none."""
    return ServeError(
        f"The model at {host} did not answer as OpenAI's servers do: {reason}.",
        status=502,
        kind="server_error",
        code="upstream_broken",
    )


def unreachable(host: str, reason: str) -> ServeError:
    """Build the error of a server that nobody answers at."""
    return ServeError(
        f"The model at {host} cannot be reached: {reason}.",
        status=503,
        kind="server_error",
        code="upstream_unreachable",
        retry_after=5.0,
    )


def upstream_error(
    status: int, body: Any, host: str, *, retry_after: float | None = None
) -> ServeError:
    """Turn another server's refusal into ours.

    Args:
        status: Its HTTP status.
        body: Its JSON, whatever that is.
        host: Who it was.
        retry_after: Seconds, where it said so.

    Returns:
        The error: what the request is to blame for stays so; a refused key is ours to mend, so
        the client is not told that its own is wrong.
    """
    told = body.get("error") if isinstance(body, Mapping) else None
    told = told if isinstance(told, Mapping) else {"message": told or body}
    message = str(told.get("message") or f"status {status}")[:1000]
    param, code = told.get("param"), told.get("code")
    if status in (401, 403):
        return ServeError(
            f"The model at {host} refuses the key of this server.",
            status=502,
            kind="server_error",
            code="upstream_key_refused",
        )
    if status in (400, 404, 409, 413, 422, 429):
        return ServeError(
            message,
            status=status,
            kind=str(told.get("type") or "invalid_request_error"),
            code=None if code is None else str(code),
            param=None if param is None else str(param),
            retry_after=retry_after,
        )
    return ServeError(
        f"The model at {host} failed: {message}",
        status={408: 504, 503: 503, 504: 504}.get(status, 502),
        kind="server_error",
        code="upstream_error",
        retry_after=retry_after,
    )


def _text(values: Mapping[str, Any], name: str) -> str:
    text = values.get(name) or ""
    if not isinstance(text, str):
        raise TypeError(name)
    return text


def _whole_calls(calls: Mapping[int, Mapping[str, str]]) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(
            index=place,
            id=call["id"] or f"call_{place}",
            name=call["name"],
            arguments=call["arguments"],
        )
        for place, (_, call) in enumerate(sorted(calls.items()))
    )


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    written = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")),
        reasoning_tokens=_count(written.get("reasoning_tokens")),
    )


def _count(value: Any) -> int:
    count = int(value or 0)
    if not 0 <= count < MOST_TOKENS:
        raise ValueError(f"{count} tokens")
    return count


def _read_chat_logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...] | None:
    content = (choice.get("logprobs") or {}).get("content")
    if content is None:
        return None
    return tuple(
        _read_token(entry, tuple(_read_token(top) for top in entry.get("top_logprobs") or ()))
        for entry in content
    )


def _read_token(entry: Mapping[str, Any], top: tuple[TokenLogprob, ...] = ()) -> TokenLogprob:
    raw = entry.get("bytes")
    return TokenLogprob(
        token=str(entry["token"]),
        logprob=_number(entry["logprob"]),
        bytes=None if raw is None else tuple(map(int, raw)),
        top=top,
    )


def _read_completion_logprobs(choice: Mapping[str, Any]) -> tuple[TokenLogprob, ...] | None:
    logprobs = choice.get("logprobs")
    if not logprobs:
        return None
    tokens, values = logprobs["tokens"], logprobs["token_logprobs"]
    tops = logprobs.get("top_logprobs") or [None] * len(tokens)
    return tuple(
        TokenLogprob(
            token=str(token),
            logprob=_number(value),
            bytes=None,
            top=tuple(
                TokenLogprob(token=str(other), logprob=_number(rate), bytes=None)
                for other, rate in sorted(
                    (top or {}).items(), key=lambda item: _number(item[1]), reverse=True
                )
            ),
        )
        for token, value, top in zip(tokens, values, tops, strict=True)
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
