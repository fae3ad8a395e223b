"""Parse tool calls from generated text, in the formats of open models.

hermes (Qwen, Hermes)
    ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, any number of times; between the same
    markers also Qwen3-Coder's ``<function=…><parameter=…>``
mistral
    ``[TOOL_CALLS][{"name": …, "arguments": {…}}]`` or ``[TOOL_CALLS]name[ARGS]{…}``
llama
    ``{"name": …, "parameters": {…}}`` as the whole answer, optionally after ``<|python_tag|>``
forced
    only a JSON list of calls, enforced by a grammar

Text that looks like a call but does not parse, or does not name a tool of the request, is returned
as content, so that no output is lost.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.serve.backend import ToolCall
from halfbyte.serve.text.stops import count_partial_match

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]{1,64})\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


Schema = Mapping[str, Any]
_NO_TOOLS: Mapping[str, Schema] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallFormat:
    """How a family of models writes tool calls."""

    name: str
    opening: str = ""
    """Marker before a call; empty if there is none."""
    closing: str = ""
    """Marker after a call; if empty, a call extends to the end of the answer."""
    bare: bool = False
    """Whether JSON at the very start of an answer is a call."""


HERMES = CallFormat(name="hermes", opening="<tool_call>", closing="</tool_call>")
MISTRAL = CallFormat(name="mistral", opening="[TOOL_CALLS]")
LLAMA = CallFormat(name="llama", opening="<|python_tag|>", bare=True)
FORCED = CallFormat(name="forced", bare=True)


def detect_call_format(template: str) -> CallFormat:
    """Detect from a chat template how its model writes tool calls.

    Args:
        template: Jinja source.

    Returns:
        The format; Llama's, which accepts bare JSON, if the template contains no other's marker.
    """
    for call_format in (HERMES, MISTRAL):
        if call_format.opening in template:
            return call_format
    return LLAMA


class ToolCallFilter:
    """Separates streamed text into content and tool calls."""

    def __init__(
        self, call_format: CallFormat, tools: Mapping[str, Schema], *, max_calls: int | None = None
    ) -> None:
        """Set the expected calls.

        Args:
            call_format: How the model writes calls.
            tools: Names of the allowed tools, with the schemas of their parameters.
            max_calls: Maximum number of calls; None for no limit.
        """
        self._format = call_format
        self._tools = tools
        self._max_calls = max_calls
        self._buffer = ""
        self._is_in_call = False
        self._has_started = False
        self.num_calls = 0

    @property
    def is_full(self) -> bool:
        """Whether the maximum number of calls is reached; all further text is dropped."""
        return self._max_calls is not None and self.num_calls >= self._max_calls

    def feed(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Process the next text.

        Args:
            text: The text.

        Returns:
            The text that is certain to be content, and the calls that are complete.
        """
        self._buffer += text
        content: list[str] = []
        calls: list[ToolCall] = []
        while not self.is_full and self._step(content, calls):
            pass
        return "".join(content), tuple(calls)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Return the rest: calls without a closing marker, or content."""
        rest, self._buffer = self._buffer, ""
        if not self._is_in_call or self.is_full:
            return ("" if self.is_full or (self.num_calls and not rest.strip()) else rest), ()
        calls = self._parse(rest.removeprefix(self._format.opening))
        return ("", calls) if calls else (rest, ())

    def _step(self, content: list[str], calls: list[ToolCall]) -> bool:
        """Process the buffer up to the next marker; return False if more text is needed."""
        if self._is_in_call:
            return self._end_call(content, calls)
        if self._format.bare and not self._has_started:
            start = self._buffer.lstrip()
            if not start:
                return False
            self._has_started = True
            self._is_in_call = start.startswith(("{", "["))
            if self._is_in_call:
                return True
        opening = self._format.opening
        end = self._buffer.find(opening) if opening else -1
        # Whitespace before a call is dropped, so it is held back until more text follows.
        if end >= 0:
            before, self._buffer = self._buffer[:end].rstrip(), self._buffer[end:]
            self._is_in_call = True
        else:
            held = count_partial_match(self._buffer, (opening,)) if opening else 0
            before = self._buffer[: len(self._buffer) - held].rstrip()
            self._buffer = self._buffer[len(before) :]
        content.append(before)
        return end >= 0

    def _end_call(self, content: list[str], calls: list[ToolCall]) -> bool:
        """Parse the call at the start of the buffer; return False if it is incomplete."""
        opening, closing = self._format.opening, self._format.closing
        end = self._buffer.find(closing) if closing else -1
        if end < 0:
            return False
        text = self._buffer[: end + len(closing)]
        self._buffer = self._buffer[len(text) :]
        self._is_in_call = False
        found = self._parse(text.removeprefix(opening).removesuffix(closing))
        calls.extend(found)
        if not found:
            content.append(text)
        return True

    def _parse(self, text: str) -> tuple[ToolCall, ...]:
        found = parse_calls(text, self._tools)
        if not found or any(name not in self._tools for name, _ in found):
            return ()
        if self._max_calls is not None:
            found = found[: self._max_calls - self.num_calls]
        first = self.num_calls
        self.num_calls += len(found)
        return tuple(
            ToolCall(index=first + i, id=make_call_id(self._format), name=name, arguments=arguments)
            for i, (name, arguments) in enumerate(found)
        )


def parse_calls(text: str, tools: Mapping[str, Schema] = _NO_TOOLS) -> list[tuple[str, str]]:
    """Parse the text between a format's markers.

    Args:
        text: JSON of a call, of a list of calls, of several calls in sequence, ``name{…}``, or
            Qwen3-Coder's tags.
        tools: Schemas of the tools' parameters, by name; needed for tags, which do not
            distinguish strings from numbers.

    Returns:
        Name and JSON arguments of each call; empty if any part of the text is not a call.
    """
    if functions := _FUNCTION.findall(text):
        return [(n.strip(), _parse_tags(b, tools.get(n.strip(), {}))) for n, b in functions]
    decoder = json.JSONDecoder()
    calls: list[tuple[str, str]] = []
    rest = text.strip()
    while rest:
        named = _NAMED.match(rest)
        try:
            value, end = decoder.raw_decode(rest, named.end() if named else 0)
        except (ValueError, RecursionError):
            return []
        if named:
            value = {"name": named[1], "arguments": value}
        for entry in value if isinstance(value, list) else [value]:
            call = _parse_entry(entry)
            if call is None:
                return []
            calls.append(call)
        rest = rest[end:].lstrip(" \r\n\t;,")
    return calls


def _parse_entry(entry: Any) -> tuple[str, str] | None:
    if not isinstance(entry, Mapping):
        return None
    inner = entry.get("function")
    if isinstance(inner, Mapping):
        entry = inner
    name = entry.get("name")
    arguments = entry.get("arguments", entry.get("parameters", {}))
    if not isinstance(name, str):
        return None
    if isinstance(arguments, str):
        return name, arguments
    if not isinstance(arguments, Mapping):
        return None
    return name, _dump_json(arguments)


def _parse_tags(body: str, schema: Schema) -> str:
    arguments: dict[str, Any] = {}
    properties = schema.get("properties")
    for tag, text in _PARAMETER.findall(body):
        name = tag.strip()
        parameter = properties.get(name) if isinstance(properties, Mapping) else None
        arguments[name] = text
        if not isinstance(parameter, Mapping) or parameter.get("type") != "string":
            with contextlib.suppress(ValueError, RecursionError):
                arguments[name] = json.loads(text)
    return _dump_json(arguments)


def _dump_json(arguments: Mapping[str, Any]) -> str:
    # A model may write a lone surrogate, which cannot be encoded as UTF-8.
    return json.dumps(arguments, ensure_ascii=False).encode("utf-8", "replace").decode()


def make_call_id(call_format: CallFormat) -> str:
    """Make a call's id; Mistral's chat templates accept only nine letters and digits."""
    if call_format is MISTRAL:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def make_call_schema(tools: Sequence[Mapping[str, Any]], *, max_calls: int | None) -> str:
    """Make the JSON schema of an answer that is a list of calls.

    Args:
        tools: The allowed tools, in OpenAI's format.
        max_calls: Maximum number of calls; None for no limit.

    Returns:
        The schema as JSON.
    """
    entries = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool["function"]["name"]},
                "arguments": tool["function"].get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": entries}}
    # An option of llguidance: without it a weak model may fill its answer with spaces.
    schema["x-guidance"] = {"whitespace_flexible": False}
    if max_calls is not None:
        schema["maxItems"] = max_calls
    return json.dumps(schema)
