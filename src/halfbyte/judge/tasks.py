"""Items to judge models on: the user's JSONL file, one question with its right answer per line.

::

    {"prompt": "The capital of France is", "answer": "Paris"}
    {"prompt": "2 + 3 =", "choices": ["4", "5", "6"], "answer": 1}
    {"messages": [{"role": "user", "content": "Say hi as JSON."}], "check": {"json": {"hi": 1}}}

Choices are ranked by log-likelihood; everything else is written greedily and checked. Further keys:
``id``, ``document`` (items that share it are not independent; where it is left out, those of the
same prompt and choices share one), ``max_new_tokens``, ``stop``; any other key can be a slice.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.judge.checks import Check, PythonCheck, parse_check

MAX_NEW_TOKENS = 64
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with its right answer."""

    name: str
    """Unique within a comparison; pairs the two models' answers."""
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    """A chat instead of a prompt; empty: none."""
    choices: tuple[str, ...] = ()
    """What may follow, spaces included; empty: the model writes."""
    right_choice: int = 0
    check: Check | None = None
    """How a written answer is judged; None with choices."""
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    """A written answer ends before the first of these."""
    document: str = ""
    """Items that share it are not independent; empty: see :func:`name_documents`."""
    slices: Mapping[str, str] = field(default_factory=dict)
    line: Mapping[str, Any] = field(default_factory=dict)
    """As the user wrote it."""

    @property
    def shown_prompt(self) -> str:
        """The question for a reader."""
        return self.prompt or "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def read_tasks(
    paths: Sequence[Path],
    *,
    slice_by: Sequence[str] = (),
    functions: Mapping[str, PythonCheck] | None = None,
) -> list[Item]:
    """Read task files.

    Args:
        paths: JSONL files; each is also a slice, by its name without the ending, or by its path
            where two have one name.
        slice_by: Keys whose values divide the items into slices.
        functions: Python functions for checks.

    Returns:
        The items, in order.

    Raises:
        ConfigError: A file or a line cannot be used; names both.
    """
    items: list[Item] = []
    for path, task in zip(paths, name_files(paths), strict=True):
        for number, line in _lines(path):
            where = f"{path}, line {number}"
            items.append(_parse_item(line, where, task, number, slice_by, functions or {}))
    names: dict[str, int] = {}
    for item in items:
        names[item.name] = names.get(item.name, 0) + 1
    double = [name for name, count in names.items() if count > 1]
    if double:
        raise ConfigError(
            f"The id '{double[0]}' stands on {names[double[0]]} lines of the task files; ids pair "
            "the two models' answers, so each may stand once."
        )
    for key in slice_by:
        if not any(key in item.line for item in items):
            raise ConfigError(f"No line of the task files has the key '{key}' to slice by.")
    return items


def name_documents(items: Iterable[Item]) -> list[Item]:
    """Give each item without a document one: its own, shared with those that ask the same.

    Args:
        items: Of any source.

    Returns:
        The items, in order. A question that is asked again says nothing new about a model, whatever
        its answer is checked for.
    """
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    alike = [(i, first.setdefault((i.shown_prompt, i.choices), i.name)) for i in items]
    return [item if item.document else replace(item, document=name) for item, name in alike]


def name_files(paths: Sequence[Path]) -> list[str]:
    """Name files by what tells them apart: the stem, or the path where another has that stem."""
    stems = [path.stem for path in paths]
    named = zip(paths, stems, strict=True)
    return [stem if stems.count(stem) == 1 else path.as_posix() for path, stem in named]


def _lines(path: Path) -> Iterable[tuple[int, dict[str, Any]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Cannot read the tasks '{path}': {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"Cannot read the tasks '{path}': byte {error.start} is not UTF-8."
        ) from error
    found = False
    # Not splitlines: that also cuts at U+2028, which may stand in a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number}: this is not JSON: {error}.") from error
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}, line {number}: an object is needed, such as "
                '{"prompt": "2 + 3 =", "answer": "5"}.'
            )
        found = True
        yield number, value
    if not found:
        raise ConfigError(f"The tasks '{path}' have no lines. Write one JSON object per line.")


def _parse_item(
    line: dict[str, Any],
    where: str,
    task: str,
    number: int,
    slice_by: Sequence[str],
    functions: Mapping[str, PythonCheck],
) -> Item:
    prompt, messages = _parse_question(line, where)
    name = str(line.get("id", f"{task}:{number}"))
    slices = {"task": task} | {key: str(line[key]) for key in slice_by if key in line}
    stop = line.get("stop", [] if messages else ["\n"])
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(word, str) and word for word in stop):
        raise ConfigError(f"{where}: stop is {line['stop']!r}; texts are needed.")
    budget = line.get("max_new_tokens", MAX_NEW_TOKENS)
    if type(budget) is not int or budget < 1:
        raise ConfigError(
            f"{where}: max_new_tokens is {budget!r}; a whole number from 1 is needed."
        )
    common: dict[str, Any] = {
        "name": name,
        "prompt": prompt,
        "messages": messages,
        "max_new_tokens": budget,
        "stop": tuple(stop),
        "document": "" if line.get("document") is None else str(line["document"]),
        "slices": slices,
        "line": line,
    }
    if "choices" in line:
        choices, right = _parse_choices(line, where)
        return Item(**common, choices=choices, right_choice=right)
    if ("check" in line) == ("answer" in line):
        raise ConfigError(
            f"{where}: exactly one of 'answer' and 'check' is needed to know what is right."
        )
    check = line["check"] if "check" in line else {"equals": line["answer"]}
    return Item(**common, check=parse_check(check, where, functions))


def _parse_question(line: Mapping[str, Any], where: str) -> tuple[str, tuple[Any, ...]]:
    prompt, messages = line.get("prompt"), line.get("messages")
    if isinstance(prompt, str) and messages is None:
        return prompt, ()
    proper = (
        prompt is None
        and isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not proper:
        raise ConfigError(
            f"{where}: exactly one of 'prompt' (a text) and 'messages' (objects with a role of "
            f"{', '.join(ROLES)} and a content) is needed."
        )
    assert isinstance(messages, list)
    return "", tuple({"role": m["role"], "content": m["content"]} for m in messages)


def _parse_choices(line: Mapping[str, Any], where: str) -> tuple[tuple[str, ...], int]:
    choices, answer = line["choices"], line.get("answer")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(isinstance(c, str) and c for c in choices)
        or len(set(choices)) < len(choices)
    ):
        raise ConfigError(f"{where}: choices must be two or more different texts.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: the answer is {answer!r}; it must be one of the choices, or its number from "
            f"0 to {len(choices) - 1}."
        )
    return tuple(choices), answer
