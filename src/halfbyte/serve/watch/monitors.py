"""Checks of an answer's text, cheap enough to run on every answer.

The detectors are those of ``judge/``: an answer that fails here also fails in a comparison.

==============  ========================================================================
check           fails if
==============  ========================================================================
``empty``       the answer has only white space and calls no tool
``repetition``  it ends in the same few words, or characters, repeated many times
``json``        JSON was requested, or a tool is called, and the JSON is invalid
``language``    it is in another script, or clearly another language, than the question
``refusal``     it begins with a refusal
==============  ========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.judge.checks import parse_json
from halfbyte.judge.edge_cases import REFUSAL, is_looping
from halfbyte.serve.backend import Call
from halfbyte.serve.watch.language import is_other_language
from halfbyte.serve.watch.observation import AttemptRecord, prompt_text

TAIL = 240
"""Words, or characters, at the end that are examined for repetition."""
HEAD = 240
"""Characters at the start that are examined for a refusal."""
MAX_WORD_CHARACTERS = 24
"""If the average word is longer, the text has no spaces, and its characters are examined."""


def find_failures(call: Call, record: AttemptRecord, *, whole: bool = True) -> tuple[str, ...]:
    """Return the checks that an answer fails.

    Args:
        call: The request.
        record: The answer.
        whole: Whether the answer is complete; ``empty`` and ``json`` need a complete one.

    Returns:
        Names from :data:`~halfbyte.serve.quality_config.CHECKS`, in that order.
    """
    failures: list[str] = []
    body = call.body
    texts = [record.text(choice) for choice in record.choices]
    question = prompt_text(body)
    is_blank = not all(text.strip() for text in texts)
    if whole and is_blank and not record.tool_calls and wants_text(body):
        failures.append("empty")
    if any(is_repetitive(text) for text in texts):
        failures.append("repetition")
    if whole and (wants_json(body) or record.tool_calls) and not _is_json(body, record, texts):
        failures.append("json")
    if any(is_other_language(question, text) for text in texts):
        failures.append("language")
    if any(REFUSAL.search(text[:HEAD]) for text in texts):
        failures.append("refusal")
    return tuple(failures)


def is_repetitive(text: str) -> bool:
    """Return whether a text ends in a few words, or characters, repeated.

    Args:
        text: An answer, or its beginning.

    Returns:
        Whether it does; only the end of a long text is examined.
    """
    words = text[-TAIL * MAX_WORD_CHARACTERS :].split()
    if len(text) > MAX_WORD_CHARACTERS * max(1, len(words)):
        return is_looping(text[-TAIL:])
    return is_looping(words[-TAIL:])


def wants_json(body: Mapping[str, Any]) -> bool:
    """Return whether a request asks for JSON."""
    response_format = body.get("response_format")
    if not isinstance(response_format, Mapping):
        return False
    return response_format.get("type") in ("json_object", "json_schema")


def wants_text(body: Mapping[str, Any]) -> bool:
    """Return whether a request asks for text; not if it asks for the prompt's logprobs only."""
    limits = [body.get("max_tokens"), body.get("max_completion_tokens")]
    return 0 not in [limit for limit in limits if type(limit) is int]


def _is_json(body: Mapping[str, Any], record: AttemptRecord, texts: list[str]) -> bool:
    """Return whether all tool arguments, and all texts if JSON was requested, are valid JSON."""
    if not all(parse_json(tool.arguments)[0] for tool in record.tool_calls):
        return False
    return not wants_json(body) or bool(record.tool_calls) or all(parse_json(t)[0] for t in texts)
