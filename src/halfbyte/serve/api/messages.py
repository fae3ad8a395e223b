"""What a conversation may hold, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

Object = dict[str, Any]


class Body(BaseModel):
    """Strict: no conversions, no unknown fields, no infinities."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )


def choose_by(field: str, tags: Mapping[str, str]) -> Discriminator:
    """Choose an alternative by a field's value.

    Args:
        field: That tells.
        tags: Its values -> tags of the alternatives. A tag gets into the path of an error, so it is
            one that no field is called.

    Returns:
        The rule, for pydantic.
    """

    def choose(value: Any) -> str | None:
        found = value.get(field) if isinstance(value, dict) else None
        return tags.get(found) if isinstance(found, str) else None

    message = f"'{field}' should be {', '.join(tags)}"
    return Discriminator(
        choose, custom_error_type="invalid_alternative", custom_error_message=message
    )


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class RefusalPart(Body):
    """What a model said instead of an answer."""

    type: Literal["refusal"]
    refusal: str


class MediaPart(Body):
    """Anything but text; not every backend takes it."""

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
Content = str | Annotated[list[Part], Field(min_length=1)]


class SystemMessage(Body):
    """What the model is told first."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserMessage(Body):
    """What the user says."""

    role: Literal["user"]
    content: Content
    name: str | None = None


class CalledFunction(Body):
    """A call's function and arguments, as JSON."""

    name: str
    arguments: str


class MadeCall(Body):
    """A call that the model made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class AssistantMessage(Body):
    """What the model said, as an answer of this interface may be sent back."""

    role: Literal["assistant"]
    content: Content | None = None
    name: str | None = None
    refusal: str | None = None
    tool_calls: list[MadeCall] | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    reasoning_content: str | None = None


class ToolMessage(Body):
    """What a tool answered."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


class FunctionMessage(Body):
    """The same in OpenAI's older form."""

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
