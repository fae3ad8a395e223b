"""A checked call as requests for token ids: one for each choice."""

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
    CallForm,
    ToolCallFilter,
    find_form,
    forced_schema,
)

DEFAULT_CHAT_TOKENS = 1024
"""Of a chat's answer; not the whole context."""
DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's for /v1/completions."""

SEEDS = 2**63
"""Seeds that there are; clients may give negative ones."""

_REFUSED = {
    "audio": "it writes text only",
    "function_call": "tool_choice has taken its place",
    "functions": "tools have taken their place",
    "moderation": "nothing is moderated here",
    "prediction": "it has no predicted outputs",
    "prompt_cache_options": "its cache has no options",
    "prompt_cache_retention": "its cache keeps what it has room for",
    "suffix": "it only goes on from a prompt",
    "verbosity": "it was not trained to it",
    "web_search_options": "it does not search the web",
}
_REFUSED_VALUES: dict[str, tuple[Any, ...]] = {
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    "store": (False,),
}
"""Fields of which these values alone ask for nothing special."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceRequest:
    """One choice: what the engine is to do, and what becomes of its tokens."""

    choice: int
    prompt: int
    """Index of its prompt; several choices may share one."""
    request: TokenRequest
    echo: str | None
    """The prompt's text, where it is to be repeated."""
    stops: tuple[str, ...]
    form: CallForm | None
    """How tool calls are written; None where none may come."""
    tools: Mapping[str, Mapping[str, Any]]
    """Names that may be called, with the schemas of their parameters."""
    most_calls: int | None

    def make_call_filter(self) -> ToolCallFilter | None:
        """Make what finds this choice's tool calls."""
        if self.form is None:
            return None
        return ToolCallFilter(self.form, self.tools, most=self.most_calls)


def read_call(
    call: Call, prompts: Prompts, info: EngineInfo, limits: AnswerLimits, *, adapter: str | None
) -> list[ChoiceRequest]:
    """Turn a call into what the engine is asked.

    Args:
        call: Checked in form.
        prompts: The model's.
        info: The engine's limits.
        limits: The server's.
        adapter: Name of the adapter that answers; None: the base model.

    Returns:
        One entry per choice, in order.

    Raises:
        ServeError: 400: it asks for something that this model cannot do, by name.
    """
    body = call.body
    _refuse(body, prompts)
    tools = _read_tools(body, prompts)
    grammar = _read_grammar(body)
    if tools.forced:
        grammar = Grammar(kind="json_schema", text=forced_schema(tools.forced, most=tools.most))
    elif grammar is not None and tools.form is not None:
        raise ServeError(
            "response_format and tools cannot be had together: the format would keep the model "
            "from calling. Leave one out, or set tool_choice to 'none'.",
            code="unsupported_parameter",
            param="response_format",
        )
    asked: list[ChoiceRequest] = []
    for number, (ids, text) in enumerate(_read_prompts(call, prompts, info, tools.shown)):
        request = _make_request(call, ids, info, limits, grammar, adapter)
        for copy in range(body.get("n", 1)):
            asked.append(
                ChoiceRequest(
                    choice=len(asked),
                    prompt=number,
                    request=_reseed(request, copy),
                    echo=text if body.get("echo") else None,
                    stops=_read_stops(body),
                    form=tools.form,
                    tools={
                        tool["function"]["name"]: tool["function"].get("parameters") or {}
                        for tool in tools.shown
                    },
                    most_calls=tools.most,
                )
            )
    return asked


def _refuse(body: Mapping[str, Any], prompts: Prompts) -> None:
    """Refuse by name what this model cannot do, rather than leave it out silently."""
    for name, reason in _REFUSED.items():
        if name in body:
            raise _unsupported(name, reason)
    for name, harmless in _REFUSED_VALUES.items():
        if name in body and body[name] not in harmless:
            raise _unsupported(name, f"{json.dumps(body[name])} is more than it can do")
    if body.get("best_of", 1) > body.get("n", 1):
        raise _unsupported("best_of", "it gives all choices that it makes; set n instead")
    if "reasoning_effort" in body and "reasoning_effort" not in prompts.template(with_tools=False):
        raise _unsupported("reasoning_effort", "its chat template knows no such thing")


def _unsupported(name: str, reason: str) -> ServeError:
    return ServeError(
        f"'{name}' is not supported by this model: {reason}. Leave it out.",
        code="unsupported_parameter",
        param=name,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tools:
    """What a request says of tools."""

    shown: Sequence[Mapping[str, Any]] = ()
    """To the model, in the prompt."""
    form: CallForm | None = None
    """How calls are written; None where none may come."""
    forced: Sequence[Mapping[str, Any]] = ()
    """One of these must be called; empty: none must."""
    most: int | None = None
    """Calls that may come; None: any number."""


def _read_tools(body: Mapping[str, Any], prompts: Prompts) -> _Tools:
    tools: Sequence[Mapping[str, Any]] = body.get("tools") or ()
    choice = body.get("tool_choice", "auto")
    if not tools or choice == "none":
        return _Tools()
    if not prompts.takes_tools():
        raise ServeError(
            "The model's chat template knows no tools. Leave them out, use another model, or start "
            "the server with --chat-template.",
            code="unsupported_parameter",
            param="tools",
        )
    most = 1 if body.get("parallel_tool_calls") is False else None
    if choice == "auto":
        form = find_form(prompts.template(with_tools=True))
        return _Tools(shown=tools, form=form, most=most)
    if choice == "required":
        return _Tools(shown=tools, form=FORCED, forced=tools, most=most)
    name = choice["function"]["name"]
    named = [tool for tool in tools if tool["function"]["name"] == name]
    return _Tools(shown=tools, form=FORCED, forced=named, most=1)


def _read_grammar(body: Mapping[str, Any]) -> Grammar | None:
    wanted = body.get("response_format") or {"type": "text"}
    structured = body.get("structured_outputs") or {}
    if structured and wanted["type"] != "text":
        raise ServeError(
            "response_format and structured_outputs say the same thing twice. Leave one out.",
            code="invalid_value",
            param="structured_outputs",
        )
    if wanted["type"] == "json_object":
        return Grammar(kind="json_object")
    if wanted["type"] == "json_schema":
        schema = wanted["json_schema"].get("schema") or {}
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
    """Give each prompt's token ids, and its text where it is to be repeated."""
    body = call.body
    if call.kind == "chat":
        keywords = dict(body.get("chat_template_kwargs") or {})
        if "reasoning_effort" in body:
            keywords["reasoning_effort"] = body["reasoning_effort"]
        return [(prompts.encode_chat(body["messages"], tools=tools, keywords=keywords), "")]
    found = []
    for place, prompt in enumerate(split_prompts(body.get("prompt"))):
        if isinstance(prompt, str):
            ids, text = prompts.encode_text(prompt), prompt
        else:
            ids = list(prompt)
            bad = next((token for token in ids if not 0 <= token < info.vocabulary), None)
            if bad is not None:
                raise ServeError(
                    f"Prompt {place} holds the token id {bad}; the model's ids go from 0 to "
                    f"{info.vocabulary - 1}.",
                    code="invalid_value",
                    param="prompt",
                )
            text = str(prompts.tokenizer.decode(ids)) if body.get("echo") else ""
        found.append((ids or [prompts.first_token()], text))
    return found


def split_prompts(prompt: Any) -> list[Any]:
    """Give the prompts of a completion one by one.

    Args:
        prompt: A text, token ids, a list of either, or None for an empty one.

    Returns:
        Texts or lists of ids.
    """
    if prompt is None:
        return [""]
    if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
        return [prompt]
    return list(prompt) or [""]


def count_choices(call: Call) -> int:
    """Count the choices that a call asks for: so many for each of its prompts."""
    return len(split_prompts(call.body.get("prompt"))) * int(call.body.get("n") or 1)


def count_characters(body: Mapping[str, Any]) -> int:
    """Count the characters that there are to tokenize, at once and roughly."""
    prompt = body.get("prompt")
    if prompt is not None:
        return len(prompt) if isinstance(prompt, str) else sum(map(len, map(str, prompt)))
    return sum(len(str(message.get("content"))) for message in body.get("messages", ()))


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
        # No share of the likeliest tokens at all: the likeliest one.
        temperature=float(temperature) if top_p > 0 else 0.0,
        top_p=float(top_p) or 1.0,
        top_k=max(0, body.get("top_k", 0)),
        min_p=float(body.get("min_p", 0.0)),
        seed=None if (seed := body.get("seed")) is None else seed % SEEDS,
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
    """Give the field in which a call limits its answer, and the tokens that it allows."""
    param = "max_completion_tokens" if "max_completion_tokens" in call.body else "max_tokens"
    return param, call.body.get(param)


def add_limit(call: Call, limits: AnswerLimits) -> dict[str, int]:
    """Say to another server what a model here would keep to by itself.

    Args:
        call: What is asked.
        limits: The server's.

    Returns:
        The field to add; none where the call has it, or nothing is limited.
    """
    if read_limit(call)[1] is not None:
        return {}
    usual = DEFAULT_COMPLETION_TOKENS if limits.max_tokens else None
    tokens = [limits.default_tokens if call.kind == "chat" else usual, limits.max_tokens]
    found = [count for count in tokens if count is not None]
    return {"max_tokens": min(found)} if found else {}


def _read_max_tokens(call: Call, prompt: int, info: EngineInfo, limits: AnswerLimits) -> int:
    wanted = read_limit(call)[1]
    room = info.context - prompt
    if wanted is None:
        usual = limits.default_tokens or DEFAULT_CHAT_TOKENS
        wanted = usual if call.kind == "chat" else DEFAULT_COMPLETION_TOKENS
        fits = info.cache_bytes // info.bytes_per_token - prompt if info.bytes_per_token else room
        wanted = max(1, min(wanted, room, fits, limits.max_tokens or room))
    if wanted > room:
        raise ServeError(
            f"This model's maximum context length is {info.context} tokens. The prompt has "
            f"{prompt} and the answer may have {wanted}, {prompt + wanted} together. Shorten the "
            f"prompt or ask for fewer tokens.",
            code="context_length_exceeded",
            param="messages" if call.kind == "chat" else "prompt",
        )
    return wanted


def _read_bias(body: Mapping[str, Any], info: EngineInfo) -> dict[int, float]:
    bias = {int(token): float(value) for token, value in (body.get("logit_bias") or {}).items()}
    if wrong := [token for token in bias if token >= info.vocabulary]:
        raise ServeError(
            f"logit_bias names the token id {wrong[0]}; the model's ids go from 0 to "
            f"{info.vocabulary - 1}.",
            code="invalid_value",
            param="logit_bias",
        )
    return bias


def _read_stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def _reseed(request: TokenRequest, copy: int) -> TokenRequest:
    """Give each further choice of one prompt a seed of its own, or all would be the same."""
    if request.seed is None or not copy:
        return request
    return replace(request, seed=(request.seed + copy) % SEEDS)
