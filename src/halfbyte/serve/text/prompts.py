"""Tokenize conversations, by the model's chat template, and plain prompts."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from halfbyte.errors import ServeError

LONG_PROMPT_CHARACTERS = 20_000
"""Longer prompts are tokenized in a thread and without the GIL, so that they block neither the
event loop nor the engine. For short ones that would take longer than tokenizing them."""

SAMPLE_CHARACTERS = 8
"""Characters per token of context that are tokenized first, if a prompt is more than twice as
long. Ordinary text has three to five per token, so this much of it does not fit."""
SAMPLE_MARGIN = 1.5
"""A prompt is refused if its first part alone has this many times the context's tokens. What
follows a text can change its last tokens, but not merge a third of them."""

_TEMPLATE_ERRORS = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


class Prompts:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, *, template: str | None = None) -> None:
        """Take a model's tokenizer and chat template.

        Args:
            tokenizer: The model's tokenizer, with or without a chat template.
            template: Jinja source that replaces the model's own template.
        """
        self.tokenizer = tokenizer
        self._template: str | dict[str, str] | None = template or getattr(
            tokenizer, "chat_template", None
        )
        self._encoder = _find_encoder(tokenizer)
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_names = {"messages", "tools", *parameters}
        """Parameters of the tokenizer, which chat_template_kwargs must not override."""

    def template(self, *, with_tools: bool) -> str:
        """Return the chat template.

        Args:
            with_tools: Whether the request contains tools, for which a model may have a separate
                template.

        Returns:
            Jinja source.

        Raises:
            ServeError: The model has no chat template.
        """
        template = self._template
        if isinstance(template, dict):
            name = "tool_use" if with_tools else "default"
            template = template.get(name) or template.get("default")
        if not template:
            raise ServeError(
                "The model has no chat template, so it cannot answer chats. Use /v1/completions, "
                "or start the server with --chat-template.",
                code="no_chat_template",
                param="messages",
            )
        return template

    def supports_tools(self) -> bool:
        """Return whether the chat template uses tools."""
        return self._template is not None and "tools" in self.template(with_tools=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        keywords: Mapping[str, Any] | None = None,
        context: int | None = None,
    ) -> list[int]:
        """Tokenize a conversation.

        Args:
            messages: Validated messages in OpenAI's format.
            tools: Tools in OpenAI's format.
            keywords: Additional variables for the template, such as ``enable_thinking``.
            context: As in :meth:`encode_text`.

        Returns:
            Token ids, up to and including the generation prompt.

        Raises:
            ServeError: The model has no chat template, the template rejects the messages, or they
                do not fit into the context.
        """
        template = self.template(with_tools=bool(tools))
        if reserved := sorted(set(keywords or ()) & self._reserved_names):
            # Otherwise a client could pass its own template.
            raise ServeError(
                f"chat_template_kwargs must not contain '{reserved[0]}': the name is reserved. "
                "Remove it.",
                code="invalid_value",
                param=f"chat_template_kwargs.{reserved[0]}",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [_normalize_message(index, message) for index, message in enumerate(messages)],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **(keywords or {}),
            )
            return self.encode_text(text, add_special=False, context=context, param="messages")
        except ServeError:
            raise
        except _TEMPLATE_ERRORS as error:
            # Templates raise errors for messages that they do not support. The rendered text may
            # also fail to encode: a lone surrogate in a tool call's arguments.
            raise ServeError(
                f"The model's chat template does not accept these messages: {str(error)[:300]}.",
                code="chat_template_error",
                param="messages",
            ) from error

    def encode_text(
        self,
        text: str,
        *,
        add_special: bool = True,
        context: int | None = None,
        param: str = "prompt",
    ) -> list[int]:
        """Tokenize a text.

        Args:
            text: The text.
            add_special: Add the tokenizer's special tokens, such as BOS.
            context: The model's context length. A text far longer is refused after tokenizing its
                first part, as tokenizing megabytes takes seconds; the caller checks the others.
            param: The request's field with the text.

        Returns:
            Token ids.

        Raises:
            ServeError: The first part of the text does not fit into the context.
        """
        if context is not None and len(text) > 2 * SAMPLE_CHARACTERS * context:
            sample = text[: SAMPLE_CHARACTERS * context]
            found = len(self.encode_text(sample, add_special=False))
            if found > SAMPLE_MARGIN * context:
                raise ServeError(
                    f"This model's maximum context length is {context} tokens. The prompt has "
                    f"{len(text)} characters; the first {len(sample)} alone have {found} tokens. "
                    "Shorten the prompt.",
                    code="context_length_exceeded",
                    param=param,
                )
        if self._encoder is not None and len(text) <= LONG_PROMPT_CHARACTERS:
            return list(self._encoder.encode(text, add_special_tokens=add_special).ids)
        if self._encoder is not None:
            encodings = self._encoder.encode_batch_fast([text], add_special_tokens=add_special)
            return list(encodings[0].ids)
        return list(self.tokenizer(text, add_special_tokens=add_special)["input_ids"])

    def first_token(self) -> int:
        """Return the token that starts an empty prompt: BOS, else EOS, else 0."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0


def _find_encoder(tokenizer: Any) -> Any:
    """Return the Rust tokenizer if Transformers' wrapper adds nothing to it; else None.

    The wrapper tokenizes every text in a thread pool, which takes a millisecond or more while the
    model uses all cores.
    """
    # Importing it takes seconds, which a pure gateway does not need.
    from transformers import PreTrainedTokenizerFast

    base = PreTrainedTokenizerFast
    if not isinstance(tokenizer, base) or tokenizer.split_special_tokens:
        return None
    methods = ("__call__", "_encode_plus")
    if any(getattr(type(tokenizer), name) != getattr(base, name) for name in methods):
        return None
    encoder = tokenizer.backend_tokenizer
    # As the wrapper does: these settings in a checkpoint's file are meant for training.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _normalize_message(index: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a message to what chat templates expect: content as text, arguments as an object."""
    normalized = {key: value for key, value in message.items() if value is not None}
    normalized["content"] = _join_text(index, message.get("content"))
    normalized["role"] = {"developer": "system", "function": "tool"}.get(
        message["role"], message["role"]
    )
    if calls := message.get("tool_calls"):
        normalized["tool_calls"] = [_parse_arguments(call) for call in calls]
    return normalized


def _join_text(index: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part["type"] not in ("text", "refusal"):
            raise ServeError(
                f"A content part of type '{part['type']}' is not supported: this model accepts "
                "only text.",
                code="unsupported_content",
                param=f"messages.{index}.content.{number}",
            )
    return "".join(part.get("text", part.get("refusal", "")) for part in content)


def _parse_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    with contextlib.suppress(ValueError, RecursionError):
        # Templates apply `tojson` to the arguments, which would quote a string twice.
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
