"""Pydantic schemas of requests: OpenAI's fields and vLLM's extensions.

Types are strict and unknown fields are rejected by name. A field of OpenAI's that a model does not
support is valid here: its backend rejects it, or another backend supports it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, Tag, model_validator

from halfbyte.serve.api.messages import MAX_ITEMS, Body, Message, Object, choose_by

MAX_STOPS = 16
MAX_LOGPROBS = 20
INT64 = 2**63

Name = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
Seed = Annotated[int, Field(ge=-INT64, lt=INT64)]
Tokens = Annotated[int, Field(ge=1, lt=2**31)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# fail_fast: only one error is shown, and to collect a million of them takes seconds.
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = dict[
    Annotated[str, StringConstraints(pattern=r"^\d{1,9}$")],
    Annotated[float, Field(ge=-100, le=100)],
]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]

# Tools and formats


class FunctionObject(Body):
    """Name, description and parameters of a function."""

    name: Name
    description: str | None = None
    parameters: Object | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that the model may call."""

    type: Literal["function"]
    function: FunctionObject


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The tool that the model must call."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A named JSON schema."""

    name: Name
    description: str | None = None
    schema_: Object | None = Field(default=None, alias="schema")
    strict: bool | None = None


class TextFormat(Body):
    """An answer in any format."""

    type: Literal["text"]


class JsonFormat(Body):
    """An answer that is any JSON object."""

    type: Literal["json_object"]


class SchemaFormat(Body):
    """An answer that matches a JSON schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


Format = Annotated[
    Annotated[TextFormat, Tag("<text>")]
    | Annotated[JsonFormat, Tag("<object>")]
    | Annotated[SchemaFormat, Tag("<schema>")],
    choose_by("type", {"text": "<text>", "json_object": "<object>", "json_schema": "<schema>"}),
]


class StructuredOutputs(Body):
    """A constraint on the answer, in vLLM's format; exactly one field must be set."""

    json_: Object | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: Literal[True] | None = None

    @model_validator(mode="after")
    def _check(self) -> StructuredOutputs:
        if len(self.model_fields_set) != 1:
            raise ValueError("one of json, regex, choice, grammar and json_object must be given")
        return self


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None
    continuous_usage_stats: bool | None = None
    """An extension of vLLM's: with ``include_usage``, every chunk has the usage so far."""


# Requests


class Request(Body):
    """Fields common to chats and completions."""

    model: str
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Bias | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    user: str | None = None

    # vLLM's extensions
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    structured_outputs: StructuredOutputs | None = None

    @model_validator(mode="after")
    def _check_stream_options(self) -> Request:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options requires stream to be true")
        return self


class ChatRequest(Request):
    """POST /v1/chat/completions."""

    messages: Messages
    max_tokens: Tokens | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    response_format: Format | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    chat_template_kwargs: Object | None = None

    # OpenAI's fields that a backend may reject
    audio: Object | None = None
    function_call: Any = None
    functions: list[Object] | None = None
    modalities: list[Literal["text", "audio"]] | None = None
    moderation: Object | None = None
    prediction: Object | None = None
    prompt_cache_options: Object | None = None
    prompt_cache_retention: str | None = None
    reasoning_effort: str | None = None
    service_tier: str | None = None
    store: bool | None = None
    verbosity: str | None = None
    web_search_options: Object | None = None

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens must not both be given")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs requires logprobs to be true")
        names = [tool.function.name for tool in self.tools or ()]
        if self.tool_choice not in (None, "none") and not names:
            raise ValueError("tool_choice requires tools")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names '{self.tool_choice.function.name}', not in tools")
        return self


class CompletionRequest(Request):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[str], Field(min_length=1, fail_fast=True)]
        | TokenIds
        | Annotated[list[TokenIds], Field(min_length=1, fail_fast=True)]
        | None
    )
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    best_of: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    suffix: str | None = None


class TokenizeRequest(Body):
    """POST /tokenize."""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    tools: list[Tool] | None = None
    chat_template_kwargs: Object | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("either prompt or messages must be given")
        return self


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]


class AdapterRequest(Body):
    """POST /v1/load_lora_adapter and /v1/unload_lora_adapter."""

    lora_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$")]
