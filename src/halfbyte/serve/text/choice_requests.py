"""Convert a validated call into one token request per choice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from halfbyte.errors import ServeError
from halfbyte.serve.backend import Call
from halfbyte.serve.config import AnswerLimits
from halfbyte.serve.engine.contract import EngineInfo, Grammar, GrammarKind, TokenRequest
from halfbyte.serve.text.prompts import Prompts
from halfbyte.serve.text.tool_calls import (
    FORCED,
    CallFormat,
    ToolCallFilter,
    detect_call_format,
    make_call_schema,
)

DEFAULT_CHAT_TOKENS = 1024
"""Length limit of a chat's answer if the client sets none."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default for /v1/completions."""

CHARACTERS_PER_TOKEN = 4
"""Estimate for prompts whose number of tokens is not known."""

NUM_SEEDS = 2**63
"""Clients' seeds, which may be negative, are taken modulo this."""

_UNSUPPORTED = {
    "audio": "it writes text only",
    "function_call": "it was replaced by tool_choice",
    "functions": "it was replaced by tools",
    "moderation": "this server has no moderation",
    "prediction": "it has no predicted outputs",
    "prompt_cache_options": "its cache has no options",
    "prompt_cache_retention": "its cache is limited only by memory",
    "suffix": "it can only continue a prompt",
    "verbosity": "it was not trained for it",
    "web_search_options": "it cannot search the web",
}
_SUPPORTED_VALUES: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""The only supported values of some fields: those that request nothing special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRequest:
    """One choice: the request to the engine, and how to process its tokens."""

    choice: int
    prompt: int
    """Index of its prompt; several choices may share one."""
    request: TokenRequest
    echo: str | None
    """The prompt's text if it is to be echoed, else None."""
    stops: tuple[str, ...]
    call_format: CallFormat | None
    """How the model writes tool calls; None if none are expected."""
    tools: Mapping[str, Mapping[str, Any]]
    """Names of the allowed tools, with the schemas of their parameters."""
    max_calls: int | None

    def make_call_filter(self) -> ToolCallFilter | None:
        """Make the filter that finds this choice's tool calls; None if none are expected."""
        if self.call_format is None:
            return None
        return ToolCallFilter(self.call_format, self.tools, max_calls=self.max_calls)


def read_call(
    call: Call, prompts: Prompts, info: EngineInfo, limits: AnswerLimits, *, adapter: str | None
) -> list[ChoiceRequest]:
    """Convert a call into requests to the engine.

    Args:
        call: The call; its fields are validated.
        prompts: The model's tokenizer and chat template.
        info: The engine's limits.
        limits: The server's limits on answers.
        adapter: Name of the adapter to use; None for the base model.

    Returns:
        One request per choice, in order.

    Raises:
        ServeError: 400 if the call requests something unsupported; names the field.
    """
    body = call.body
    _check_supported(body, prompts)
    tools = _read_tools(body, prompts)
    grammar = _read_grammar(body)
    if tools.forced:
        schema = make_call_schema(tools.forced, max_calls=tools.max_calls)
        grammar = Grammar(kind="json_schema", text=schema)
    elif grammar is not None and tools.call_format is not None:
        raise ServeError(
            "response_format and tools cannot be used together: the format would prevent the model "
            "from calling tools. Remove one of them, or set tool_choice to 'none'.",
            code="unsupported_parameter",
            param="response_format",
        )
    choices: list[ChoiceRequest] = []
    for number, (ids, text) in enumerate(_read_prompts(call, prompts, info, tools.shown)):
        request = _make_request(call, ids, info, limits, grammar, adapter)
        for copy in range(body.get("n", 1)):
            choices.append(
                ChoiceRequest(
                    choice=len(choices),
                    prompt=number,
                    request=_reseed(request, copy),
                    echo=text if body.get("echo") else None,
                    stops=_read_stops(body),
                    call_format=tools.call_format,
                    tools=tools.schemas,
                    max_calls=tools.max_calls,
                )
            )
    return choices


def _check_supported(body: Mapping[str, Any], prompts: Prompts) -> None:
    """Reject unsupported fields by name instead of ignoring them silently."""
    for name, reason in _UNSUPPORTED.items():
        if name in body:
            raise _unsupported(name, reason)
    for name, supported in _SUPPORTED_VALUES.items():
        if name in body and body[name] not in supported:
            allowed = " or ".join(map(json.dumps, supported))
            raise _unsupported(name, f"the value is {json.dumps(body[name])}, not {allowed}")
    if body.get("best_of", 1) > body.get("n", 1):
        raise _unsupported("best_of", "it returns all choices that it generates; set n instead")
    if "reasoning_effort" in body and "reasoning_effort" not in prompts.template(with_tools=False):
        raise _unsupported("reasoning_effort", "its chat template does not use it")


def _unsupported(name: str, reason: str) -> ServeError:
    return ServeError(
        f"'{name}' is not supported by this model: {reason}. Remove it.",
        code="unsupported_parameter",
        param=name,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """The tools of a request."""

    shown: Sequence[Mapping[str, Any]] = ()
    """Tools described in the prompt."""
    call_format: CallFormat | None = None
    """How the model writes calls; None if none are expected."""
    forced: Sequence[Mapping[str, Any]] = ()
    """Tools of which one must be called; empty if calls are optional."""
    max_calls: int | None = None
    """Maximum number of calls; None for no limit."""

    @property
    def schemas(self) -> dict[str, Mapping[str, Any]]:
        """Schemas of the tools' parameters, by name."""
        functions = [tool["function"] for tool in self.shown]
        return {function["name"]: function.get("parameters") or {} for function in functions}


def _read_tools(body: Mapping[str, Any], prompts: Prompts) -> _Tools:
    tools: Sequence[Mapping[str, Any]] = body.get("tools") or ()
    choice = body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return _Tools()
    if not prompts.supports_tools():
        raise ServeError(
            "The model's chat template does not support tools. Remove them, use another model, or "
            "start the server with --chat-template.",
            code="unsupported_parameter",
            param="tools",
        )
    max_calls = 1 if body.get("parallel_tool_calls") is False else None
    if choice == "auto":
        call_format = detect_call_format(prompts.template(with_tools=True))
        return _Tools(shown=tools, call_format=call_format, max_calls=max_calls)
    if choice == "required":
        return _Tools(shown=tools, call_format=FORCED, forced=tools, max_calls=max_calls)
    name = choice["function"]["name"]
    named = [tool for tool in tools if tool["function"]["name"] == name]
    return _Tools(shown=tools, call_format=FORCED, forced=named, max_calls=1)


def _read_grammar(body: Mapping[str, Any]) -> Grammar | None:
    response_format = body.get("response_format") or {"type": "text"}
    structured = body.get("structured_outputs") or {}
    if structured and response_format["type"] != "text":
        raise ServeError(
            "response_format and structured_outputs cannot be used together. Remove one of them.",
            code="invalid_value",
            param="structured_outputs",
        )
    if response_format["type"] == "json_object":
        return Grammar(kind="json_object")
    if response_format["type"] == "json_schema":
        schema = response_format["json_schema"].get("schema") or {}
        return Grammar(kind="json_schema", text=json.dumps(schema))
    for name, value in structured.items():
        kinds: dict[str, GrammarKind] = {"json": "json_schema", "grammar": "lark"}
        kind: Any = kinds.get(name, name)
        text = value if isinstance(value, str) else json.dumps(value)
        return Grammar(kind=kind, text="" if kind == "json_object" else text)
    return None


def _read_prompts(
    call: Call, prompts: Prompts, info: EngineInfo, tools: Sequence[Mapping[str, Any]]
) -> list[tuple[list[int], str]]:
    """Tokenize the prompts; return token ids and, for ``echo``, the text of each."""
    body = call.body
    if call.kind == "chat":
        keywords = dict(body.get("chat_template_kwargs") or {})
        if "reasoning_effort" in body:
            keywords["reasoning_effort"] = body["reasoning_effort"]
        messages, context = body["messages"], info.context
        ids = prompts.encode_chat(messages, tools=tools, keywords=keywords, context=context)
        return [(ids, "")]
    found = []
    for index, prompt in enumerate(split_prompts(body.get("prompt"))):
        if isinstance(prompt, str):
            ids, text = prompts.encode_text(prompt, context=info.context), prompt
        else:
            ids = list(prompt)
            invalid = next((token for token in ids if not 0 <= token < info.vocabulary), None)
            if invalid is not None:
                raise ServeError(
                    f"Prompt {index} contains the token id {invalid}, which is outside the "
                    f"model's vocabulary of 0 to {info.vocabulary - 1}.",
                    code="invalid_value",
                    param="prompt",
                )
            text = str(prompts.tokenizer.decode(ids)) if body.get("echo") else ""
        found.append((ids or [prompts.first_token()], text))
    return found


def split_prompts(prompt: Any) -> list[Any]:
    """Split a completion's prompt field into single prompts.

    Args:
        prompt: A text, token ids, a list of either, or None for an empty prompt.

    Returns:
        One text or list of token ids per prompt.
    """
    if prompt is None:
        return [""]
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt) or [""]


def count_choices(call: Call) -> int:
    """Count the requested choices: the number of prompts times n."""
    return len(split_prompts(call.body.get("prompt"))) * int(call.body.get("n") or 1)


def count_characters(body: Mapping[str, Any]) -> int:
    """Estimate the number of characters to tokenize, without rendering the chat template."""
    prompt = body.get("prompt")
    if prompt is not None:
        return len(prompt) if isinstance(prompt, str) else sum(map(len, map(str, prompt)))
    messages = body.get("messages", ())
    parts = [message.get(name) for message in messages for name in ("content", "tool_calls")]
    return sum(len(str(part)) for part in (*parts, body.get("tools")) if part)


def estimate_prompt_tokens(body: Mapping[str, Any]) -> int:
    """Estimate the number of a prompt's tokens, for backends that do not report it."""
    return count_characters(body) // CHARACTERS_PER_TOKEN


def _make_request(
    call: Call,
    ids: list[int],
    info: EngineInfo,
    limits: AnswerLimits,
    grammar: Grammar | None,
    adapter: str | None,
) -> TokenRequest:
    body = call.body
    temperature, top_p = body.get("temperature", 1.0), body.get("top_p", 1.0)
    if call.kind == "chat":
        top_logprobs = body.get("top_logprobs", 0) if body.get("logprobs") else None
    else:
        top_logprobs = body.get("logprobs")
    return TokenRequest(
        prompt=tuple(ids),
        max_new_tokens=_read_max_tokens(call, len(ids), info, limits),
        # top_p = 0 means greedy decoding.
        temperature=float(temperature) if top_p > 0 else 0.0,
        top_p=float(top_p) or 1.0,
        top_k=max(0, body.get("top_k", 0)),
        min_p=float(body.get("min_p", 0.0)),
        seed=None if (seed := body.get("seed")) is None else seed % NUM_SEEDS,
        frequency_penalty=float(body.get("frequency_penalty", 0.0)),
        presence_penalty=float(body.get("presence_penalty", 0.0)),
        repetition_penalty=float(body.get("repetition_penalty", 1.0)),
        logit_bias=_read_bias(body, info),
        stop_tokens=frozenset(body.get("stop_token_ids") or ()),
        ignore_end=bool(body.get("ignore_eos")),
        top_logprobs=top_logprobs,
        prompt_logprobs=top_logprobs if body.get("echo") else None,
        grammar=grammar,
        adapter=adapter,
        key=call.key,
        deadline=call.deadline,
    )


def read_limit(call: Call) -> tuple[str, int | None]:
    """Return the name and value of the call's field that limits the answer's tokens."""
    param = "max_completion_tokens" if "max_completion_tokens" in call.body else "max_tokens"
    return param, call.body.get(param)


def add_limit(call: Call, limits: AnswerLimits) -> dict[str, int]:
    """Return the limit to add to a call for another server, as the embedded engine would apply it.

    Args:
        call: The call.
        limits: The server's limits on answers.

    Returns:
        The field to add; empty if the call sets a limit or no limit applies.
    """
    if read_limit(call)[1] is not None:
        return {}
    default = limits.default_max_tokens
    if call.kind != "chat":
        default = DEFAULT_COMPLETION_TOKENS if limits.max_tokens else None
    found = [count for count in (default, limits.max_tokens) if count is not None]
    return {"max_tokens": min(found)} if found else {}


def _read_max_tokens(call: Call, prompt: int, info: EngineInfo, limits: AnswerLimits) -> int:
    """Return the limit of the answer's tokens, for a prompt of so many tokens."""
    max_tokens = read_limit(call)[1]
    room = info.context - prompt
    if max_tokens is None:
        max_tokens = DEFAULT_COMPLETION_TOKENS
        if call.kind == "chat":
            max_tokens = limits.default_max_tokens or DEFAULT_CHAT_TOKENS
        fits = info.cache_bytes // info.bytes_per_token - prompt if info.bytes_per_token else room
        max_tokens = max(1, min(max_tokens, room, fits, limits.max_tokens or room))
    if max_tokens > room:
        raise ServeError(
            f"This model's maximum context length is {info.context} tokens. The prompt has "
            f"{prompt} and the answer may have {max_tokens}, {prompt + max_tokens} together. "
            "Shorten the prompt or request fewer tokens.",
            code="context_length_exceeded",
            param="messages" if call.kind == "chat" else "prompt",
        )
    return max_tokens


def _read_bias(body: Mapping[str, Any], info: EngineInfo) -> dict[int, float]:
    bias = {int(token): float(value) for token, value in (body.get("logit_bias") or {}).items()}
    if invalid := [token for token in bias if token >= info.vocabulary]:
        raise ServeError(
            f"logit_bias contains the token id {invalid[0]}, which is outside the model's "
            f"vocabulary of 0 to {info.vocabulary - 1}.",
            code="invalid_value",
            param="logit_bias",
        )
    return bias


def _read_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _reseed(request: TokenRequest, copy: int) -> TokenRequest:
    """Give each further choice of a prompt a different seed; otherwise all would be equal."""
    if request.seed is None or not copy:
        return request
    return replace(request, seed=(request.seed + copy) % NUM_SEEDS)
