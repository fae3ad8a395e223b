"""Pydantic schemas of chat messages, in OpenAI's format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Object = dict[str, Any]
MAX_ITEMS = 10_000
"""Messages of a chat, and parts of a message; OpenAI allows 2048."""


class Body(BaseModel):
    """Strict base model: no type conversions, no unknown fields, no infinities."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def choose_by(field: str, tags: Mapping[str, str]) -> Discriminator:
    """Select an alternative of a union by a field's value.

    Args:
        field: The field that decides.
        tags: Maps its values to the tags of the alternatives. A tag becomes part of the path of an
            error, so it must not be the name of a field.

    Returns:
        Pydantic's discriminator.
    """

    def choose(body: Any) -> str | None:
        value = body.get(field) if isinstance(body, dict) else None
        return tags.get(value) if isinstance(value, str) else None

    message = f"'{field}' should be {', '.join(tags)}"
    return Discriminator(
        choose, custom_error_type="invalid_alternative", custom_error_message=message
    )


class TextPart(Body):
    """A text part of a message."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """A refusal by the model, as part of a message."""

    type: Literal["refusal"]
    refusal: str


class MediaPart(Body):
    """An image, audio or file; not every backend accepts them."""

    type: Literal["image_url", "input_audio", "file"]
    image_url: Object | None = None
    input_audio: Object | None = None
    file: Object | None = None


Part = Annotated[
    Annotated[TextPart, Tag("<text>")]
    | Annotated[RefusalPart, Tag("<refusal>")]
    | Annotated[MediaPart, Tag("<media>")],
    choose_by(
        "type",
        {
            "text": "<text>",
            "refusal": "<refusal>",
            "image_url": "<media>",
            "input_audio": "<media>",
            "file": "<media>",
        },
    ),
]
Content = str | Annotated[list[Part], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]


class SystemMessage(Body):
    """A system or developer message."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """A user message."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class FunctionCall(Body):
    """Name and JSON arguments of a called function."""

    name: str
    arguments: str


class MessageToolCall(Body):
    """A tool call made by the model."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Body):
    """A message of the model, with all fields of a response so that it can be sent back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None


class ToolMessage(Body):
    """A tool's result."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(Body):
    """A function's result, in OpenAI's older format."""

    role: Literal["function"]
    content: str | None
    name: str


Message = Annotated[
    Annotated[SystemMessage, Tag("<system>")]
    | Annotated[UserMessage, Tag("<user>")]
    | Annotated[AssistantMessage, Tag("<assistant>")]
    | Annotated[ToolMessage, Tag("<tool>")]
    | Annotated[FunctionMessage, Tag("<function>")],
    choose_by(
        "role",
        {
            "system": "<system>",
            "developer": "<system>",
            "user": "<user>",
            "assistant": "<assistant>",
            "tool": "<tool>",
            "function": "<function>",
        },
    ),
]
