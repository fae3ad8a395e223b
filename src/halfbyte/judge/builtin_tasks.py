"""Built-in tasks: items generated from templates and a seed, as many as needed.

Five kinds, all original text: arithmetic, copying, writing JSON, simple facts, reading code. They
are easy on purpose: a loss can only be measured on items that the base gets right, and small models
must get many right. They test whether a model still works, not how well it does your own tasks.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from halfbyte.data import builtin_facts
from halfbyte.judge.checks import Check
from halfbyte.judge.tasks import Item

ITEMS_PER_TASK = 60

Draw = tuple[str, str, Check | tuple[Sequence[str], int]]
"""Slice, question, and expected answer: a check, or choices with the index of the right one."""

WORDS = """
    amber basil cedar delta ember falcon garnet harbor indigo jasper kettle lantern meadow nickel
    olive pebble quartz river saddle timber umber violet walnut yellow zephyr anchor bridge candle
    dragon engine forest guitar hammer island jacket kitten ladder magnet needle orchid pepper
    rocket silver tunnel velvet window
""".split()  # noqa: SIM905
NAMES = ("Ada", "Bo", "Carl", "Dana", "Emil", "Fay", "Gus", "Hana", "Ivan", "June", "Kofi", "Lena")


def builtin_tasks(per_task: int = ITEMS_PER_TASK, *, seed: int = 0) -> list[Item]:
    """Generate the built-in items.

    Args:
        per_task: Number of items of each of the five kinds.
        seed: Selects the items; the number of different facts is fixed.

    Returns:
        The items; there may be fewer facts than requested.
    """
    items = []
    for task, draw in _MAKERS.items():
        # random.Random seeds a string by its digest; hash() would change from run to run.
        rng = random.Random(f"{task} {seed}")
        seen: set[str] = set()
        attempts = 0
        while len(seen) < per_task and attempts < 20 * per_task:
            attempts += 1
            part, question, right = draw(rng)
            if question in seen:
                continue
            seen.add(question)
            items.append(_make_item(task, part, question, right, len(seen), seed))
    return items


def _make_item(
    task: str,
    part: str,
    question: str,
    right: Check | tuple[Sequence[str], int],
    number: int,
    seed: int,
) -> Item:
    name = f"{task}:{seed}:{number}"
    common: dict[str, Any] = {
        "name": name,
        "prompt": _FEW_SHOT[task] + question,
        "stop": ("\n",),
        "max_new_tokens": 40,
        # No slices by kind of fact: there are many kinds, each with too few items for a test.
        "slices": {"task": task} | ({} if task == "facts" else {"part": f"{task}, {part}"}),
    }
    if isinstance(right, Check):
        return Item(**common, check=right)
    choices, index = right
    return Item(**common, choices=tuple(choices), right_choice=index)


def _draw_arithmetic(rng: random.Random) -> Draw:
    kind = rng.choice(("sum", "difference", "product", "comparison"))
    if kind == "comparison":
        a, b = rng.sample(range(2, 1000), 2)
        larger = 0 if a > b else 1
        return kind, f"Q: Which is larger, {a} or {b}?\nA:", ((f" {a}", f" {b}"), larger)
    if kind == "sum":
        a, b = rng.randint(2, 99), rng.randint(2, 99)
        sign, result = "+", a + b
    elif kind == "difference":
        b, result = rng.randint(2, 60), rng.randint(1, 60)
        a, sign = b + result, "-"
    else:
        a, b = rng.randint(2, 12), rng.randint(2, 12)
        sign, result = "*", a * b
    return kind, f"Q: {a} {sign} {b} =\nA:", Check(kind="equals", value=str(result))


def _draw_copying(rng: random.Random) -> Draw:
    kind = rng.choice(("words", "digits", "reversed pair"))
    if kind == "words":
        text = " ".join(rng.sample(WORDS, rng.randint(3, 6)))
        return kind, f"Input: {text}\nCopy:", Check(kind="equals", value=text)
    if kind == "digits":
        text = " ".join(str(rng.randint(0, 9)) for _ in range(rng.randint(5, 9)))
        return kind, f"Input: {text}\nCopy:", Check(kind="equals", value=text)
    a, b = rng.sample(WORDS, 2)
    return kind, f"Input: {a} {b}\nSwap:", Check(kind="equals", value=f"{b} {a}")


def _draw_json(rng: random.Random) -> Draw:
    name, count = rng.choice(NAMES), rng.randint(1, 99)
    thing = rng.choice(WORDS)
    kind = rng.choice(("object", "list", "nested"))
    if kind == "object":
        text = f"{name} has {count} of the item {thing}"
        value: Any = {"name": name, "item": thing, "count": count}
    elif kind == "list":
        words = rng.sample(WORDS, rng.randint(2, 4))
        text, value = f"the list of {', '.join(words)}", words
    else:
        city = rng.choice(WORDS).capitalize()
        text = f"{name} is {count} years old and lives in {city}"
        value = {"name": name, "age": count, "home": {"city": city}}
    return kind, f"Text: {text}\nJSON:", Check(kind="json", value=value)


def _draw_fact(rng: random.Random) -> Draw:
    kind, question, pairs = _fact_tables()[rng.randrange(len(_fact_tables()))]
    subject, answer = rng.choice(pairs)
    others = sorted({other for _, other in pairs if other != answer})
    choices = [answer, *rng.sample(others, 3)]
    rng.shuffle(choices)
    right = choices.index(answer)
    return kind, question.format(subject), ([f" {c}" for c in choices], right)


def _draw_code(rng: random.Random) -> Draw:
    kind = rng.choice(("index", "loop", "branch", "text"))
    if kind == "index":
        numbers = rng.sample(range(1, 60), 4)
        index = rng.randrange(4)
        code, result = f"x = {numbers}\nprint(x[{index}])", str(numbers[index])
    elif kind == "loop":
        start, step = rng.randint(0, 5), rng.randint(1, 3)
        times = rng.randint(2, 4)
        code = f"n = {start}\nfor i in range({times}):\n    n = n + {step}\nprint(n)"
        result = str(start + step * times)
    elif kind == "branch":
        a, b = rng.sample(range(1, 50), 2)
        yes, no = rng.sample(WORDS, 2)
        code = f"if {a} > {b}:\n    print('{yes}')\nelse:\n    print('{no}')"
        result = yes if a > b else no
    else:
        word = rng.choice(WORDS)
        code, result = f"s = '{word}'\nprint(s.upper())", word.upper()
    return kind, f"Code:\n{code}\nPrints:", Check(kind="equals", value=result)


@cache
def _fact_tables() -> list[tuple[str, str, list[tuple[str, str]]]]:
    """Return kind, question and (subject, answer) pairs of every table of facts."""
    return builtin_facts()


_MAKERS: dict[str, Callable[[random.Random], Draw]] = {
    "arithmetic": _draw_arithmetic,
    "copying": _draw_copying,
    "json": _draw_json,
    "facts": _draw_fact,
    "code": _draw_code,
}
_FEW_SHOT = {
    "arithmetic": "Q: 7 + 5 =\nA: 12\n\nQ: Which is larger, 31 or 8?\nA: 31\n\n"
    "Q: 20 - 6 =\nA: 14\n\nQ: 3 * 4 =\nA: 12\n\n",
    "copying": "Input: copper silk\nCopy: copper silk\n\nInput: 4 1 7\nCopy: 4 1 7\n\n"
    "Input: copper silk\nSwap: silk copper\n\nInput: stone flute\nSwap: flute stone\n\n",
    "json": "Text: Zoe has 4 of the item spoon\n"
    f"JSON: {json.dumps({'name': 'Zoe', 'item': 'spoon', 'count': 4})}\n\n"
    f"Text: the list of chalk, fern\nJSON: {json.dumps(['chalk', 'fern'])}\n\n"
    "Text: Zoe is 30 years old and lives in Fern\n"
    f"JSON: {json.dumps({'name': 'Zoe', 'age': 30, 'home': {'city': 'Fern'}})}\n\n",
    "facts": "",
    "code": "Code:\nx = [3, 8]\nprint(x[1])\nPrints: 8\n\n"
    "Code:\nn = 1\nfor i in range(2):\n    n = n + 1\nprint(n)\nPrints: 3\n\n"
    "Code:\nif 2 > 9:\n    print('salt')\nelse:\n    print('coal')\nPrints: coal\n\n"
    "Code:\ns = 'coal'\nprint(s.upper())\nPrints: COAL\n\n",
}
