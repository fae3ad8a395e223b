"""A conversation or a text as the token ids that the model goes on from."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError

from halfbyte.errors import ServeError

_NOT_TAKEN = (
    TemplateError, TypeError, ValueError, LookupError, AttributeError, RecursionError,
)  # fmt: skip


class Prompts:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, *, template: str | None = None) -> None:
        """Take the model's.

        Args:
            tokenizer: With or without a chat template.
            template: Jinja source that takes the place of the model's own.
        """
        self.tokenizer = tokenizer
        own = getattr(tokenizer, "chat_template", None)
        self._own: str | dict[str, str] | None = template or own
        self._encoder = _find_encoder(tokenizer)
        parameters = inspect.signature(tokenizer.apply_chat_template).parameters
        self._taken = {"messages", "tools", *parameters}
        """Names that are not the template's to know."""

    def template(self, *, with_tools: bool) -> str:
        """Give the template's source.

        Args:
            with_tools: Whether tools are given with the conversation.

        Returns:
            Jinja source. A model may have one of its own for tools.

        Raises:
            ServeError: The model has none.
        """
        own = self._own
        if isinstance(own, dict):
            own = own.get("tool_use" if with_tools else "default") or own.get("default")
        if not own:
            raise ServeError(
                "The model has no chat template: it was not trained to chat. Use /v1/completions, "
                "or start the server with --chat-template.",
                code="no_chat_template",
                param="messages",
            )
        return own

    def takes_tools(self) -> bool:
        """Tell whether the chat template knows what to do with tools."""
        return self._own is not None and "tools" in self.template(with_tools=True)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        keywords: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Turn a conversation into token ids.

        Args:
            messages: In OpenAI's form, checked.
            tools: In OpenAI's form.
            keywords: More variables for the template, such as ``enable_thinking``.

        Returns:
            Token ids, up to where the answer begins.

        Raises:
            ServeError: The model has no template, or the template does not take these messages.
        """
        template = self.template(with_tools=bool(tools))
        if taken := sorted(set(keywords or ()) & self._taken):
            # Or a client could bring a template of its own.
            raise ServeError(
                f"chat_template_kwargs may not hold '{taken[0]}': it is not the template's.",
                code="invalid_value",
                param=f"chat_template_kwargs.{taken[0]}",
            )
        try:
            text = self.tokenizer.apply_chat_template(
                [_plain_message(place, message) for place, message in enumerate(messages)],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **(keywords or {}),
            )
            return self.encode_text(text, add_special=False)
        except ServeError:
            raise
        except _NOT_TAKEN as error:
            # A template is a program of the model's maker; it says what it does not take. What it
            # made of the messages may be no text: half a character of a tool call's arguments.
            raise ServeError(
                f"The model's chat template does not take these messages: {str(error)[:300]}.",
                code="chat_template_error",
                param="messages",
            ) from error

    def encode_text(self, text: str, *, add_special: bool = True) -> list[int]:
        """Turn a text into token ids.

        Args:
            text: Any.
            add_special: Begin with what the model expects at the beginning of a text.

        Returns:
            Token ids.
        """
        if self._encoder is not None:
            return list(self._encoder.encode(text, add_special_tokens=add_special).ids)
        return list(self.tokenizer(text, add_special_tokens=add_special)["input_ids"])

    def first_token(self) -> int:
        """Give the token that stands for an empty text."""
        for name in ("bos_token_id", "eos_token_id"):
            if (token := getattr(self.tokenizer, name, None)) is not None:
                return int(token)
        return 0


def _find_encoder(tokenizer: Any) -> Any:
    """Give the Rust tokenizer itself where Transformers adds nothing to it; else None.

    Its wrapper hands every single text to a pool of threads, and waits for them: a millisecond and
    more where the model has all cores.
    """
    # A gateway before other servers does without its seconds.
    from transformers import PreTrainedTokenizerFast

    own = PreTrainedTokenizerFast
    if not isinstance(tokenizer, own) or tokenizer.split_special_tokens:
        return None
    methods = ("__call__", "_encode_plus")
    if any(getattr(type(tokenizer), name) != getattr(own, name) for name in methods):
        return None
    encoder = tokenizer.backend_tokenizer
    # As the wrapper does: what a checkpoint's file says of either is meant for training.
    encoder.no_truncation()
    encoder.no_padding()
    return encoder


def _plain_message(place: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Write a message as chat templates expect it: text as text, arguments as an object."""
    plain = {key: value for key, value in message.items() if value is not None}
    plain["content"] = _plain_text(place, message.get("content"))
    plain["role"] = {"developer": "system", "function": "tool"}.get(
        message["role"], message["role"]
    )
    if calls := message.get("tool_calls"):
        plain["tool_calls"] = [_plain_call(call) for call in calls]
    return plain


def _plain_text(place: int, content: Any) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        if part["type"] not in ("text", "refusal"):
            raise ServeError(
                f"A content part of type '{part['type']}' cannot be served: this model reads text "
                "only.",
                code="unsupported_content",
                param=f"messages.{place}.content.{number}",
            )
    return "".join(part.get("text", part.get("refusal", "")) for part in content)


def _plain_call(call: Mapping[str, Any]) -> dict[str, Any]:
    function = dict(call["function"])
    with contextlib.suppress(ValueError, RecursionError):
        # Templates write arguments by `tojson`, which would quote a string once more.
        function["arguments"] = json.loads(function["arguments"])
    return {**call, "function": function}
