"""Training examples: JSON lines -> token ids and labels that mark the tokens that the loss counts.

::

    {"messages": [...]}                   a chat: the assistant's messages are counted
    {"prompt": ..., "completion": ...}    two texts or lists of messages: the completion is counted
    {"text": ...}                         plain text: all of it is counted

The counted part is located in the text, by character offsets, and then mapped to tokens, because a
tokenizer may merge characters across its border. A token that spans the border is counted.
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
"""A space in the tokens of byte-level tokenizers."""
KINDS = "'messages', 'prompt' and 'completion', or 'text'"


@dataclass(frozen=True, slots=True)
class Example:
    """One training example."""

    ids: tuple[int, ...]
    labels: tuple[int, ...]
    """The token id where the loss counts it, else IGNORED."""
    joined: bool = False
    """Whether a token spans the border of a prompt and its answer."""

    @property
    def digest(self) -> str:
        """Digest of ids and labels, the same on every machine."""
        return hashlib.sha256(json.dumps([self.ids, self.labels]).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """The examples of a file, and notes on how they were changed."""

    examples: tuple[Example, ...]
    notes: tuple[str, ...]

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all examples."""
        return sum(len(example.ids) for example in self.examples)

    @property
    def num_counted(self) -> int:
        """Number of tokens that the loss counts."""
        return sum(label != IGNORED for e in self.examples for label in e.labels)

    @property
    def digest(self) -> str:
        """Digest of all examples, in order."""
        return hashlib.sha256("".join(e.digest for e in self.examples).encode()).hexdigest()


def read_examples(path: Path, tokenizer: Any, *, length: int, everything: bool) -> Examples:
    """Read and tokenize a file.

    Args:
        path: JSON lines, as the module docstring describes.
        tokenizer: The model's.
        length: Longer examples are truncated to this many tokens.
        everything: Count every token, including prompts.

    Returns:
        The examples, in the file's order.

    Raises:
        DataError: The file cannot be read, a line has an unknown format, or no example has a
            counted token.
    """
    wanted = f"Give one object per line, with {KINDS}."
    lines = read_json_lines(path, DataError, what="the data", wanted=wanted)
    made = [_make_example(line.where, line.values, tokenizer, everything) for line in lines]
    notes = []
    longer = sum(len(example.ids) > length for example in made)
    if longer:
        notes.append(f"{longer} of {len(made)} examples truncated to {length} tokens")
    joined = sum(example.joined for example in made)
    if joined:
        notes.append(
            f"in {joined} of {len(made)} examples the answer's first token begins in the prompt, "
            "for example because the prompt ends with a space: move the space to the answer, or "
            "the model is trained on other tokens than it will see"
        )
    cut = [Example(e.ids[:length], e.labels[:length]) for e in made]
    # The first token of a row is not predicted, so its label does not count.
    kept = [e for e in cut if any(label != IGNORED for label in e.labels[1:])]
    if len(kept) < len(cut):
        notes.append(
            f"{len(cut) - len(kept)} of {len(cut)} examples left out: "
            f"no counted token in their first {length} tokens"
        )
    if not kept:
        raise DataError(
            f"{path} holds {len(made)} examples, and none has a counted token within its first "
            f"{length} tokens. Use longer answers, or a larger --length."
        )
    return Examples(examples=tuple(kept), notes=tuple(notes))


def split_examples(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples | None]:
    """Split examples into training and held-out ones; equal examples stay together.

    Args:
        examples: All examples.
        share: Share of the distinct examples to hold out; 0: none.
        seed: Seed of the split.

    Returns:
        The training examples, and the held-out ones; None if the share is 0.

    Raises:
        DataError: There are too few distinct examples to split.
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
            f"Cannot hold out {share:.0%} of the data: it has {len(order)} distinct example(s). "
            "Provide more, or use --validation 0."
        )
    apart = set(order[:count])
    sides: tuple[list[Example], list[Example]] = ([], [])
    for example in examples.examples:
        sides[example.digest in apart].append(example)
    return Examples(examples=tuple(sides[0]), notes=examples.notes), Examples(
        examples=tuple(sides[1]), notes=()
    )


def pack(examples: Sequence[Example], length: int) -> list[list[Example]]:
    """Pack examples into rows: first fit, longest example first.

    Args:
        examples: Each of at most ``length`` tokens.
        length: Maximum tokens per row.

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
    """Make a padded batch from rows of one or more examples.

    Args:
        rows: Examples in the same row do not attend to each other.
        padding: Token id for padding.

    Returns:
        input_ids and labels, int64 [rows, tokens]. Also attention_mask if every row is one example;
        otherwise position_ids, which restart with each example.
    """
    width = max(sum(len(example.ids) for example in row) for row in rows)
    shape = (len(rows), width)
    ids = torch.full(shape, padding, dtype=torch.int64)
    labels = torch.full(shape, IGNORED, dtype=torch.int64)
    # A position that does not follow the one before starts a new sequence: padding is not seen.
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
            f"{where} holds half a character, {error.object[error.start]!a}: an unpaired "
            "surrogate. Write the full surrogate pair, or the character itself."
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
        f"Give an object with {KINDS}; messages are a list, the others are strings."
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
            f"{where} is a chat, and the tokenizer has no chat template. Use 'prompt' and "
            "'completion', or a chat model with its tokenizer."
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
                        f"{where}: the chat template writes message {index + 1} differently when "
                        "more messages follow, so the answer cannot be located in the text. Use "
                        "one line per answer, or train with --train-on everything."
                    )
                counted.append((len(before), len(after)))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{where} holds messages that the chat template cannot render: {str(error)[:200]}. "
            "Each message needs 'role' and 'content'."
        ) from error
    except Exception as error:
        # A template may raise any error of jinja2, which is not a direct dependency.
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise DataError(
            f"{where} holds messages that the chat template refuses: {str(error)[:200]}."
        ) from error
    return _tokenize(whole, counted, tokenizer, plain=False)


def _tokenize(
    text: str, counted: Sequence[tuple[int, int]], tokenizer: Any, *, plain: bool
) -> Example:
    """Tokenize, and label the tokens that overlap a counted character span."""
    if not getattr(tokenizer, "is_fast", False):
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets of its tokens, "
            "which are needed to mask prompts. Add the model's tokenizer.json."
        )
    # Plain text gets the BOS and EOS tokens here; a chat template writes them itself.
    encoded = tokenizer(text, add_special_tokens=plain, return_offsets_mapping=True, verbose=False)
    ids, spans = list(encoded["input_ids"]), _token_spans(text, encoded)
    labels = [
        token if any(max(start, low) < min(stop, high) for low, high in counted) else IGNORED
        for token, (start, stop) in zip(ids, spans, strict=True)
    ]
    joined = any(start < low < min(stop, high) for low, high in counted for start, stop in spans)
    end = tokenizer.eos_token_id
    if plain and end is not None and (not ids or ids[-1] != end):
        ids.append(end)
        labels.append(end)
    return Example(tuple(ids), tuple(labels), joined)


def _token_spans(text: str, encoded: Any) -> list[tuple[int, int]]:
    """Return tokens' character spans; GPT-NeoX's tokenizer omits their leading spaces."""
    found, last = [], 0
    for token, (start, stop) in zip(encoded.tokens(), encoded["offset_mapping"], strict=True):
        spaces = len(token) - len(token.lstrip(SPACE))
        found.append((last if spaces and text[last:start] == " " * spaces else start, stop))
        last = max(last, stop)
    return found
