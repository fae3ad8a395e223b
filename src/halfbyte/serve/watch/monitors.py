"""Is something wrong with an answer, by its text alone? Cheap enough for every one.

The detectors are those of ``judge/``, so that an answer that fails here also fails in a comparison.

==============  ========================================================================
check           fails where
==============  ========================================================================
``empty``       there is nothing but space, and no tool is called
``repetition``  it ends in the same few words, or characters, again and again
``json``        JSON was asked for, or a tool is called, and what came cannot be read
``language``    it is in another script, or clearly another language, than the question
``refusal``     its beginning declines
==============  ========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from halfbyte.judge.checks import parse_json
from halfbyte.judge.edge_cases import REFUSAL, is_looping
from halfbyte.serve.backend import Call
from halfbyte.serve.watch.language import switches
from halfbyte.serve.watch.observation import Seen, prompt_text

TAIL = 240
"""Words, or characters, at the end that are looked at for repetition."""
HEAD = 240
"""Characters at the start that tell a refusal."""
LETTERS_PER_WORD = 24
"""A text with longer words than this is written without spaces: its characters are looked at."""


def find_failures(call: Call, seen: Seen, *, whole: bool = True) -> tuple[str, ...]:
    """Tell which checks an answer fails.

    Args:
        call: What was asked.
        seen: What came.
        whole: Whether the answer is complete; a beginning is not empty, and no JSON yet.

    Returns:
        Names of :data:`~halfbyte.serve.quality_config.CHECKS`, in that order.
    """
    failures: dict[str, None] = {}
    body = call.body
    texts = [seen.text(choice) for choice in seen.choices]
    asked = prompt_text(body)
    if whole and not seen.tool_calls and wants_text(body):
        failures |= dict.fromkeys(["empty"] if not all(t.strip() for t in texts) else [])
    if any(is_repetitive(text) for text in texts):
        failures["repetition"] = None
    if whole and (wants_json(body) or seen.tool_calls) and not _is_json(body, seen, texts):
        failures["json"] = None
    if any(switches(asked, text) for text in texts):
        failures["language"] = None
    if any(REFUSAL.search(text[:HEAD]) for text in texts):
        failures["refusal"] = None
    return tuple(failures)


def is_repetitive(text: str) -> bool:
    """Tell whether a text ends in a few words, or characters, repeated.

    Args:
        text: An answer, or its beginning.

    Returns:
        Whether it does; of a long text only the end counts.
    """
    words = text[-TAIL * LETTERS_PER_WORD :].split()
    if len(text) > LETTERS_PER_WORD * max(1, len(words)):
        return is_looping(text[-TAIL:])
    return is_looping(words[-TAIL:])


def wants_json(body: Mapping[str, Any]) -> bool:
    """Tell whether a request asks for JSON."""
    form = body.get("response_format")
    return isinstance(form, Mapping) and form.get("type") in ("json_object", "json_schema")


def wants_text(body: Mapping[str, Any]) -> bool:
    """Tell whether a request asks for any text: one for a prompt's logprobs alone does not."""
    limits = [body.get("max_tokens"), body.get("max_completion_tokens")]
    return 0 not in [limit for limit in limits if type(limit) is int]


def _is_json(body: Mapping[str, Any], seen: Seen, texts: list[str]) -> bool:
    """Whether the arguments of every tool, and where JSON was asked for every text, are JSON."""
    if not all(parse_json(tool.arguments)[0] for tool in seen.tool_calls):
        return False
    return not wants_json(body) or bool(seen.tool_calls) or all(parse_json(t)[0] for t in texts)
