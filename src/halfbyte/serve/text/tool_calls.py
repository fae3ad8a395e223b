"""Tool calls out of what a model writes, in the forms that open models were trained to write.

hermes (Qwen, Hermes)
    ``<tool_call>{"name": …, "arguments": {…}}</tool_call>``, again and again; within the same marks
    Qwen3-Coder's ``<function=…><parameter=…>``
mistral
    ``[TOOL_CALLS][{"name": …, "arguments": {…}}]`` or ``[TOOL_CALLS]name[ARGS]{…}``
llama
    ``{"name": …, "parameters": {…}}`` as the whole answer, perhaps after ``<|python_tag|>``
forced
    a JSON list of calls and nothing else, where a grammar holds the model to it

What looks like a call and names no tool of the request, or does not parse, is given as text:
nothing that a model wrote is lost.
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
from halfbyte.serve.text.stops import longest_start

_FUNCTION = re.compile(r"<function=([^>\n]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\n]+)>\n?(.*?)\n?</parameter>", re.DOTALL)
_NAMED = re.compile(r"\s*([\w.-]{1,64})\s*(?:\[CALL_ID\]\w*)?(?:\[ARGS\])?\s*(?=\{)")


Schema = Mapping[str, Any]
_NO_TOOLS: Mapping[str, Schema] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class CallForm:
    """How a family of models writes its calls."""

    name: str
    opening: str = ""
    """What comes before a call; empty: nothing does."""
    closing: str = ""
    """What comes after; empty: a call lasts to the end of the answer."""
    bare: bool = False
    """JSON at the very start of an answer is a call."""


HERMES = CallForm(name="hermes", opening="<tool_call>", closing="</tool_call>")
MISTRAL = CallForm(name="mistral", opening="[TOOL_CALLS]")
LLAMA = CallForm(name="llama", opening="<|python_tag|>", bare=True)
FORCED = CallForm(name="forced", bare=True)


def find_form(template: str) -> CallForm:
    """Tell by a chat template how its model writes calls.

    Args:
        template: Jinja source.

    Returns:
        The form; Llama's, which takes bare JSON, where the template shows none.
    """
    for form in (HERMES, MISTRAL):
        if form.opening in template:
            return form
    return LLAMA


class ToolCallFilter:
    """Text in; content and calls out."""

    def __init__(
        self, form: CallForm, tools: Mapping[str, Schema], *, most: int | None = None
    ) -> None:
        """Start.

        Args:
            form: How the model writes calls.
            tools: Names that may be called, with the schemas of their parameters.
            most: Calls that may come; None: any number.
        """
        self._form = form
        self._tools = tools
        self._most = most
        self._held = ""
        self._inside = False
        self._started = False
        self.num_calls = 0

    @property
    def full(self) -> bool:
        """As many calls have come as may; the rest of the answer is not wanted."""
        return self._most is not None and self.num_calls >= self._most

    def feed(self, text: str) -> tuple[str, tuple[ToolCall, ...]]:
        """Take text.

        Args:
            text: What comes next.

        Returns:
            What is certain to be content, and the calls that are complete.
        """
        self._held += text
        content: list[str] = []
        calls: list[ToolCall] = []
        while not self.full and self._step(content, calls):
            pass
        return "".join(content), tuple(calls)

    def finish(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Give what is left: a call without its closing mark, or text."""
        held, self._held = self._held, ""
        if not self._inside or self.full:
            return ("" if self.full or (self.num_calls and not held.strip()) else held), ()
        calls = self._read(held.removeprefix(self._form.opening))
        return ("", calls) if calls else (held, ())

    def _step(self, content: list[str], calls: list[ToolCall]) -> bool:
        """Move on by one mark; False where more text is needed."""
        form = self._form
        if self._inside:
            end = self._held.find(form.closing) if form.closing else -1
            if end < 0:
                return False
            whole = self._held[: end + len(form.closing)]
            self._held = self._held[len(whole) :]
            self._inside = False
            found = self._read(whole.removeprefix(form.opening).removesuffix(form.closing))
            calls.extend(found)
            if not found:
                content.append(whole)
            return True
        if form.bare and not self._started:
            start = self._held.lstrip()
            if not start:
                return False
            self._started = True
            self._inside = start.startswith(("{", "["))
            if self._inside:
                return True
        place = self._held.find(form.opening) if form.opening else -1
        # White space before a call means nothing, so it waits for what comes after it.
        if place >= 0:
            before, self._held, self._inside = self._held[:place].rstrip(), self._held[place:], True
        else:
            keep = longest_start(self._held, (form.opening,)) if form.opening else 0
            before = self._held[: len(self._held) - keep].rstrip()
            self._held = self._held[len(before) :]
        content.append(before)
        return place >= 0

    def _read(self, text: str) -> tuple[ToolCall, ...]:
        found = read_calls(text, self._tools)
        if not found or any(name not in self._tools for name, _ in found):
            return ()
        if self._most is not None:
            found = found[: self._most - self.num_calls]
        first = self.num_calls
        self.num_calls += len(found)
        return tuple(
            ToolCall(index=first + i, id=make_call_id(self._form), name=name, arguments=arguments)
            for i, (name, arguments) in enumerate(found)
        )


def read_calls(text: str, tools: Mapping[str, Schema] = _NO_TOOLS) -> list[tuple[str, str]]:
    """Read the calls between a form's marks.

    Args:
        text: JSON of a call, of a list of calls, of several one after the other, ``name{…}``, or
            Qwen3-Coder's tags.
        tools: The schemas of their parameters, for tags, which do not tell a text from a number.

    Returns:
        Names and arguments as JSON; nothing where a part of the text is no call.
    """
    if functions := _FUNCTION.findall(text):
        return [(n.strip(), _tagged_arguments(b, tools.get(n.strip(), {}))) for n, b in functions]
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
            call = _read_entry(entry)
            if call is None:
                return []
            calls.append(call)
        rest = rest[end:].lstrip(" \r\n\t;,")
    return calls


def _read_entry(entry: Any) -> tuple[str, str] | None:
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
    return name, _write(arguments)


def _tagged_arguments(body: str, schema: Schema) -> str:
    arguments: dict[str, Any] = {}
    properties = schema.get("properties")
    for tag, text in _PARAMETER.findall(body):
        name = tag.strip()
        wanted = properties.get(name) if isinstance(properties, Mapping) else None
        arguments[name] = text
        if not isinstance(wanted, Mapping) or wanted.get("type") != "string":
            with contextlib.suppress(ValueError, RecursionError):
                arguments[name] = json.loads(text)
    return _write(arguments)


def _write(arguments: Mapping[str, Any]) -> str:
    # A model may write half a character, which no client could read.
    return json.dumps(arguments, ensure_ascii=False).encode("utf-8", "replace").decode()


def make_call_id(form: CallForm) -> str:
    """Make an id; Mistral's chat templates take none but nine letters and digits."""
    if form is MISTRAL:
        return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))
    return f"call_{secrets.token_hex(12)}"


def forced_schema(tools: Sequence[Mapping[str, Any]], *, most: int | None) -> str:
    """Write the JSON schema of an answer that consists of calls.

    Args:
        tools: In OpenAI's form.
        most: Calls at most; None: any number.

    Returns:
        The schema, as JSON, of a list of calls.
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
    # llguidance's: nobody sees this JSON, and a weak model may fill its answer with spaces.
    schema["x-guidance"] = {"whitespace_flexible": False}
    if most is not None:
        schema["maxItems"] = most
    return json.dumps(schema)
