"""Task items: questions with expected answers, read from the user's JSONL files.

::

    {"prompt": "The capital of France is", "answer": "Paris"}
    {"prompt": "2 + 3 =", "choices": ["4", "5", "6"], "answer": 1}
    {"messages": [{"role": "user", "content": "Say hi as JSON."}], "check": {"json": {"hi": 1}}}

Choices are ranked by log-likelihood; all other answers are generated greedily and checked.

Optional keys: ``id``, ``document`` (items that share one are not independent; by default, items
with the same prompt and choices do), ``max_new_tokens``, ``stop``. Any other key can define slices.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from halfbyte.errors import ConfigError
from halfbyte.json_lines import read_json_lines
from halfbyte.judge.checks import Check, PythonCheck, parse_check

MAX_NEW_TOKENS = 64
WANTED = 'Write one JSON object per line, such as {"prompt": "2 + 3 =", "answer": "5"}.'
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question with its expected answer."""

    name: str
    """Unique within a comparison; pairs the two models' answers."""
    prompt: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    """A chat, instead of a prompt."""
    choices: tuple[str, ...] = ()
    """Possible continuations, including spaces; empty: the answer is generated."""
    right_choice: int = 0
    check: Check | None = None
    """Grades a generated answer; None with choices."""
    max_new_tokens: int = MAX_NEW_TOKENS
    stop: tuple[str, ...] = ()
    """Stop sequences: a generated answer ends before the first of them."""
    document: str = ""
    """Items that share one are not independent; empty: see :func:`name_documents`."""
    slices: Mapping[str, str] = field(default_factory=dict)
    line: Mapping[str, Any] = field(default_factory=dict)
    """The item as the user wrote it."""

    @property
    def shown_prompt(self) -> str:
        """The question as the reports show it."""
        return self.prompt or "\n".join(f"{m['role']}: {m['content']}" for m in self.messages)


def read_tasks(
    paths: Sequence[Path],
    *,
    slice_by: Sequence[str] = (),
    functions: Mapping[str, PythonCheck] | None = None,
) -> list[Item]:
    """Read task files.

    Args:
        paths: JSONL files. Each file is also a slice, named by its stem, or by its path if two
            files have the same stem.
        slice_by: Keys whose values divide the items into slices.
        functions: Python functions for checks.

    Returns:
        The items, in order.

    Raises:
        ConfigError: A file or a line is invalid; names both.
    """
    items: list[Item] = []
    for path, task in zip(paths, name_files(paths), strict=True):
        for number, where, line in read_json_lines(
            path, ConfigError, what="the tasks", wanted=WANTED
        ):
            items.append(_parse_item(line, where, task, number, slice_by, functions or {}))
    for name, count in Counter(item.name for item in items).items():
        if count > 1:
            raise ConfigError(
                f"The id '{name}' is on {count} lines of the task files. Ids pair the two models' "
                "answers, so each must be unique."
            )
    for key in slice_by:
        if not any(key in item.line for item in items):
            raise ConfigError(
                f"Cannot slice by '{key}': no line of the task files has this key. Use one of "
                "their keys."
            )
    return items


def name_documents(items: Iterable[Item]) -> list[Item]:
    """Assign a document to each item without one; items with the same question share it.

    Args:
        items: From any source.

    Returns:
        The items, in order. A repeated question is no new evidence about a model, whatever its
        answer is checked for.
    """
    first: dict[tuple[str, tuple[str, ...]], str] = {}
    named = [(i, first.setdefault((i.shown_prompt, i.choices), i.name)) for i in items]
    return [item if item.document else replace(item, document=name) for item, name in named]


def name_files(paths: Sequence[Path]) -> list[str]:
    """Return unique names: the stem of each path, or the path if several have the same stem."""
    stems = [path.stem for path in paths]
    named = zip(paths, stems, strict=True)
    return [stem if stems.count(stem) == 1 else path.as_posix() for path, stem in named]


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
    if not isinstance(stop, list) or not all(isinstance(s, str) and s for s in stop):
        raise ConfigError(
            f"{where}: stop is {line['stop']!r}; it must be a non-empty string or a list of them."
        )
    budget = line.get("max_new_tokens", MAX_NEW_TOKENS)
    if type(budget) is not int or budget < 1:
        raise ConfigError(
            f"{where}: max_new_tokens is {budget!r}; it must be an integer of 1 or more."
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
            f"{where}: exactly one of 'answer' and 'check' is needed to grade the answer."
        )
    check = line["check"] if "check" in line else {"equals": line["answer"]}
    return Item(**common, check=parse_check(check, where, functions))


def _parse_question(line: Mapping[str, Any], where: str) -> tuple[str, tuple[Any, ...]]:
    prompt, messages = line.get("prompt"), line.get("messages")
    if isinstance(prompt, str) and messages is None:
        return prompt, ()
    is_chat = (
        prompt is None
        and isinstance(messages, list)
        and bool(messages)
        and all(
            isinstance(m, dict) and m.get("role") in ROLES and isinstance(m.get("content"), str)
            for m in messages
        )
    )
    if not is_chat:
        raise ConfigError(
            f"{where}: exactly one of 'prompt' (a string) and 'messages' (objects with a content "
            f"and a role of {', '.join(ROLES)}) is needed."
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
        raise ConfigError(f"{where}: choices must be two or more different, non-empty strings.")
    if isinstance(answer, str) and answer in choices:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ConfigError(
            f"{where}: the answer is {answer!r}; it must be one of the choices, or its index from "
            f"0 to {len(choices) - 1}."
        )
    return tuple(choices), answer
