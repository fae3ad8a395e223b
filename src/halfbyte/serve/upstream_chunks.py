"""Parses the stream of an OpenAI-compatible server into events, and builds upstream errors."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from halfbyte.environment import UPSTREAM_KEY
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
MAX_TOKENS = 2**53
"""Token counts from here on are invalid: JSON readers cannot represent them exactly."""
_FINISHES: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


_INVALID_CHUNK_ERRORS = (
    ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


class ChunkReader:
    """Turns the chunks of one answer into events."""

    def __init__(self, kind: Kind, host: str, num_choices: int) -> None:
        """Start a new answer.

        Args:
            kind: Kind of the call.
            host: The server's name, for error messages.
            num_choices: Number of choices that the answer must have.
        """
        self._kind = kind
        self._host = host
        self._num_choices = num_choices
        self._finished: set[int] = set()
        self._calls: dict[int, dict[int, dict[str, str]]] = {}
        self._num_deltas = 0
        self._usage: Usage | None = None
        self.done = False
        """Whether the server has sent ``[DONE]``."""

    def read(self, data: str) -> list[Event]:
        """Parse one chunk.

        Args:
            data: Data of a server-sent event.

        Returns:
            The events.

        Raises:
            ServeError: 502: the chunk is invalid, or contains an error.
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
        except _INVALID_CHUNK_ERRORS as error:
            failure = invalid_response(self._host, f"a chunk cannot be parsed: {data[:100]!r}")
            raise failure from error
        return events

    def finish(self) -> Usage:
        """Finish the answer.

        Returns:
            The usage; if the server sent none, the number of deltas stands for that of tokens.

        Raises:
            ServeError: 502: the answer is incomplete.
        """
        if len(self._finished) < self._num_choices:
            failure = invalid_response(
                self._host,
                f"it is incomplete: {len(self._finished)} of {self._num_choices} choices were "
                "finished",
            )
            raise failure
        return self._usage or Usage(
            prompt_tokens=0, completion_tokens=self._num_deltas, is_reported=False
        )

    def _read_choice(self, choice: Mapping[str, Any]) -> list[Event]:
        index = int(choice.get("index") or 0)
        events: list[Event] = []
        if self._kind == "chat":
            delta = choice.get("delta") or {}
            parts = delta.get("tool_calls") or ()
            for part in parts:
                self._add_call(index, part)
            event = Delta(
                choice=index,
                text=_text(delta, "content"),
                refusal=_text(delta, "refusal"),
                # The second one is vLLM's newer name.
                reasoning=_text(delta, "reasoning_content") or _text(delta, "reasoning"),
                logprobs=_read_chat_logprobs(choice),
            )
        else:
            parts = ()
            event = Delta(
                choice=index,
                text=_text(choice, "text"),
                logprobs=_read_completion_logprobs(choice),
            )
        # Parts of a tool call give an empty event, which shows that the model is generating.
        if event.text or event.refusal or event.reasoning or event.logprobs or parts:
            self._num_deltas += 1
            events.append(event)
        reason = choice.get("finish_reason")
        if reason is not None and index not in self._finished:
            self._finished.add(index)
            if calls := self._calls.pop(index, {}):
                events.append(Delta(choice=index, tool_calls=_join_calls(calls)))
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
    """Parse JSON from another server.

    Args:
        text: JSON; for anything else a ValueError or a RecursionError is raised.

    Returns:
        The value. Unpaired surrogates, which UTF-8 cannot encode, are replaced by question marks.
    """
    value = json.loads(text)
    if "\\ud" not in text.lower():
        return value
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def invalid_response(host: str, reason: str) -> ServeError:
    """Build the error for an invalid or incomplete response."""
    return ServeError(
        f"Invalid response from the model server at {host}: {reason.rstrip('.')}. Try again, or "
        "check that server's log.",
        status=502,
        kind="server_error",
        code="upstream_broken",
    )


def unreachable(host: str, reason: str) -> ServeError:
    """Build the error for a server that cannot be reached."""
    return ServeError(
        f"Cannot reach the model server at {host}: {reason.rstrip('.')}. Check that it is running, "
        "or try again later.",
        status=503,
        kind="server_error",
        code="upstream_unreachable",
        retry_after=5.0,
    )


def upstream_error(
    status: int, body: Any, host: str, *, retry_after: float | None = None
) -> ServeError:
    """Translate another server's error response into an error of this server.

    Args:
        status: Its HTTP status.
        body: Its parsed JSON, of any form.
        host: Its name.
        retry_after: Its Retry-After in seconds, if it sent one.

    Returns:
        The error. Errors of the request keep their status. A rejected API key becomes a 502: it is
        this server's key, not the client's.
    """
    details = body.get("error") if isinstance(body, Mapping) else None
    details = details if isinstance(details, Mapping) else {"message": details or body}
    message = str(details.get("message") or f"status {status}")[:1000]
    param, code = details.get("param"), details.get("code")
    if status in (401, 403):
        return ServeError(
            f"The model server at {host} rejected the API key of this server. Check "
            f"{UPSTREAM_KEY.name}.",
            status=502,
            kind="server_error",
            code="upstream_key_refused",
        )
    if status in (400, 404, 409, 413, 422, 429):
        return ServeError(
            message,
            status=status,
            kind=str(details.get("type") or "invalid_request_error"),
            code=None if code is None else str(code),
            param=None if param is None else str(param),
            retry_after=retry_after,
        )
    return ServeError(
        f"The model server at {host} failed: {message}",
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


def _join_calls(calls: Mapping[int, Mapping[str, str]]) -> tuple[ToolCall, ...]:
    return tuple(
        ToolCall(
            index=index,
            id=call["id"] or f"call_{index}",
            name=call["name"],
            arguments=call["arguments"],
        )
        for index, (_, call) in enumerate(sorted(calls.items()))
    )


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    details = usage.get("prompt_tokens_details") or {}
    completion = usage.get("completion_tokens_details") or {}
    return Usage(
        prompt_tokens=_count(usage.get("prompt_tokens")),
        completion_tokens=_count(usage.get("completion_tokens")),
        cached_tokens=_count(details.get("cached_tokens")),
        reasoning_tokens=_count(completion.get("reasoning_tokens")),
    )


def _count(value: Any) -> int:
    count = int(value or 0)
    if not 0 <= count < MAX_TOKENS:
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
                TokenLogprob(token=str(other), logprob=_number(logprob), bytes=None)
                for other, logprob in sorted(
                    (top or {}).items(), key=lambda item: _number(item[1]), reverse=True
                )
            ),
        )
        for token, value, top in zip(tokens, values, tops, strict=True)
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
