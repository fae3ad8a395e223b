"""Examples in a JSON-lines file -> token ids, with a mark on those that the loss counts.

::

    {"messages": [...]}                     chat: counted is what the assistant says
    {"prompt": ..., "completion": ...}      two texts, or two lists of messages: the completion
    {"text": ...}                           plain text: all of it

What is counted is found in the text, by its place in characters, and only then in the tokens: a
tokenizer may join what a template puts side by side. A token that stands on both sides counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import DataError
from halfbyte.json_lines import read_json_lines
from halfbyte.quantize.calibration_source import IGNORED

SPACE = "Ġ"
"""In the tokens of byte-level tokenizers."""
KINDS = "'messages', 'prompt' and 'completion', or 'text'"


@dataclass(frozen=True, slots=True)
class Example:
    """One training example."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The id where the loss counts it, IGNORED elsewhere."""
    joined: bool = False
    """Whether a token stands in both a prompt and its answer."""

    @property
    def digest(self) -> str:
        """The same example has the same digest, on every machine."""
        return hashlib.sha256(json.dumps([self.ids, self.labels]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples of a file, and what had to be done to them."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens in all of them."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_counted(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED for e in self.examples for label in e.labels)

    @property
    def digest(self) -> str:
        """Of all examples, in order."""
        return hashlib.sha256("".join(e.digest for e in self.examples).encode()).hexdigest()


def read_examples(path: Path, tokenizer: Any, *, length: int, everything: bool) -> Examples:
    """Read and tokenise a file.

    Args:
        path: JSON lines; see the top of this module.
        tokenizer: The model's.
        length: Longer examples are cut to so many tokens.
        everything: Count every token, prompts too.

    Returns:
        The examples, in the file's order.

    Raises:
        DataError: The file cannot be read, a line is of no known kind, or nothing is left to
            learn.
    """
    wanted = f"Give one object per line, with {KINDS}."
    lines = read_json_lines(path, DataError, what="the data", wanted=wanted)
    made = [_make_example(line.where, line.values, tokenizer, everything) for line in lines]
    notes = []
    longer = sum(len(example.ids) > length for example in made)
    if longer:
        notes.append(f"{longer} of {len(made)} examples cut to {length} tokens")
    joined = sum(example.joined for example in made)
    if joined:
        notes.append(
            f"in {joined} of {len(made)} examples the answer's first token begins in the prompt, "
            "as where a prompt ends with a space: put the space before the answer, or the model "
            "is asked in other tokens than it learns"
        )
    cut = [Example(e.ids[:length], e.labels[:length]) for e in made]
    # The first token of a row is predicted from nothing, so its label alone teaches nothing.
    kept = [e for e in cut if any(label != IGNORED for label in e.labels[1:])]
    if len(kept) < len(cut):
        notes.append(
            f"{len(cut) - len(kept)} of {len(cut)} examples left out: "
            f"nothing to learn in their first {length} tokens"
        )
    if not kept:
        raise DataError(
            f"{path} holds {len(made)} examples, and none has anything to learn within {length} "
            "tokens. Give longer answers, or a larger --length."
        )
    return Examples(examples=tuple(kept), notes=tuple(notes))


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """Keep some examples apart; equal ones are never on both sides.

    Args:
        examples: All of them.
        share: Of the different examples, how many to keep apart; 0: none.
        seed: Chooses them.

    Returns:
        Those to train on and those kept apart; None where there are none.

    Raises:
        DataError: There are too few different examples to split.
    """
    if share == 0:
        return examples, None
    order = sorted(
        {example.digest for example in examples.examples},
        key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest(),
    )
    count = max(round(len(order) * share), 1)
    if count >= len(order):
        raise DataError(
            f"Cannot keep {share:.0%} of the data apart: it holds {len(order)} different "
            "example(s). Give more, or --validation 0."
        )
    apart = set(order[:count])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples.examples:
        sides[example.digest in apart].append(example)
    return Examples(examples=tuple(sides[0]), notes=examples.notes), Examples(
        examples=tuple(sides[1]), notes=()
    )


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Put examples into rows, each example into the first row that has room (longest first).

    Args:
        examples: Each of at most ``length`` tokens.
        length: Tokens in a row, at most.

    Returns:
        The rows, in the order of the first example of each.
    """
    order = sorted(range(len(examples)), key=lambda i: (-len(examples[i].ids), i))
    rows: list[list[int]] = []
    room: list[int] = []
    for index in order:
        size = len(examples[index].ids)
        place = next((r for r, free in enumerate(room) if free >= size), None)
        if place is None:
            rows.append([])
            room.append(length)
            place = len(rows) - 1
        rows[place].append(index)
        room[place] -= size
    return [[examples[i] for i in row] for row in sorted(sorted(row) for row in rows)]


def collate(rows: Sequence[Sequence[Example]], padding: int) -> dict[str, Tensor]:
    """Make a batch of rows of one or more examples.

    Args:
        rows: Examples that stand in one row do not see each other.
        padding: Token id to fill up with.

    Returns:
        input_ids and labels, int64 [rows, tokens]. With them attention_mask where every row is one
        example; position_ids, which begin again with each example, where one is more.
    """
    width = max(sum(len(example.ids) for example in row) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, padding, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    # Positions that do not go up by one begin a sequence of their own: padding is seen by none.
    positions = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.int64)
    for place, row in enumerate(rows):
        start = 0
        for example in row:
            stop = start + len(example.ids)
            ids[place, start:stop] = torch.tensor(example.ids)
            labels[place, start:stop] = torch.tensor(example.labels)
            labels[place, start] = IGNORED
            positions[place, start:stop] = torch.arange(stop - start)
            mask[place, start:stop] = 1
            start = stop
    batch = {"input_ids": ids, "labels": labels}
    if all(len(row) == 1 for row in rows):
        return {**batch, "attention_mask": mask}
    return {**batch, "position_ids": positions}


def _make_example(where: str, row: Mapping[str, Any], tokenizer: Any, everything: bool) -> Example:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where} holds half a character, {error.object[error.start]!a}: it is one of a pair. "
            "Write the pair, or the character itself."
        ) from error
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(row.get("messages"), list):
        return _from_chat(where, row["messages"], row.get("tools"), tokenizer, everything)
    if isinstance(prompt, list) and isinstance(completion, list):
        return _from_chat(
            where, prompt + completion, row.get("tools"), tokenizer, everything, len(prompt)
        )
    if isinstance(prompt, str) and isinstance(completion, str):
        counted = [(0 if everything else len(prompt), len(prompt) + len(completion))]
        return _tokenize(prompt + completion, counted, tokenizer, plain=True)
    if isinstance(row.get("text"), str):
        text = row["text"]
        return _tokenize(text, [(0, len(text))], tokenizer, plain=True)
    raise DataError(
        f"{where} has the keys {', '.join(map(repr, row)) or 'of an empty object'}. "
        f"Give an object with {KINDS}; messages are a list, the others text."
    )


def _from_chat(
    where: str,
    messages: list[Any],
    tools: Any,
    tokenizer: Any,
    everything: bool,
    first_counted: int = 0,
) -> Example:
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{where} is a chat, and the tokenizer has no chat template. Give 'prompt' and "
            "'completion', or the chat model's own tokenizer."
        )

    def render(count: int, *, opened: bool = False) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages[:count], tools=tools, tokenize=False, add_generation_prompt=opened
            )
        )

    try:
        whole = render(len(messages))
        if everything:
            return _tokenize(whole, [(0, len(whole))], tokenizer, plain=False)
        counted = []
        for index, message in enumerate(messages):
            if index >= first_counted and message["role"] == "assistant":
                before, after = render(index, opened=True), render(index + 1)
                if not (whole.startswith(after) and after.startswith(before)):
                    raise DataError(
                        f"{where}: the chat template writes message {index + 1} in another way "
                        "when more follow, so the answer cannot be found in the text. Give one "
                        "line per answer, or train with --train-on everything."
                    )
                counted.append((len(before), len(after)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{where} holds messages that the chat template cannot write: {str(error)[:200]}. "
            "Each needs 'role' and 'content'."
        ) from error
    except Exception as error:
        # Templates are programs of jinja2, which is no dependency of ours by name.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise DataError(
            f"{where} holds messages that the chat template refuses: {str(error)[:200]}."
        ) from error
    return _tokenize(whole, counted, tokenizer, plain=False)


def _tokenize(
    text: str, counted: Sequence[tuple[int, int]], tokenizer: Any, *, plain: bool
) -> Example:
    """Tokenise, and count the tokens that stand, even in part, in a counted stretch."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} does not tell where its tokens stand in "
            "the text, which is needed to mask prompts. Add the model's tokenizer.json."
        )
    # A plain text gets the tokenizer's own first token and an end; a template has written both.
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
    ids, places = list(encoded["input_ids"]), _places(text, encoded)
    labels = [
        token if any(max(start, low) < min(stop, high) for low, high in counted) else IGNORED
        for token, (start, stop) in zip(ids, places, strict=True)
    ]
    joined = any(start < low < min(stop, high) for low, high in counted for start, stop in places)
    end = tokenizer.eos_token_id
    if plain and end is not None and (not ids or ids[-1] != end):
        ids.append(end)
        labels.append(end)
    return Example(tuple(ids), tuple(labels), joined)


def _places(text: str, encoded: Any) -> list[tuple[int, int]]:
    """Say where tokens stand; GPT-NeoX's tokenizer leaves out the spaces that one begins with."""
    found, last = [], 0
    for token, (start, stop) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        spaces = len(token) - len(token.lstrip(SPACE))
        found.append((last if spaces and text[last:start] == " " * spaces else start, stop))
        last = max(last, stop)
    return found
