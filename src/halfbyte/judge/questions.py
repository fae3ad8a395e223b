"""Items and texts as token ids, made once by the base's tokenizer: both models get the same.

::

    Item -> Question (prompt ids, choice ids)       text -> Passage (one window of a document)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from halfbyte.data import EVALUATION_FILES, PROSE, evaluation_documents
from halfbyte.errors import ConfigError
from halfbyte.judge.tasks import Item

SHORTEST_PASSAGE = 16
"""Tokens; a shorter rest of a document is left out."""
STRETCH_TOKENS = 1024
"""Of one long text that count as a document: what a model loses on a window of 256 tokens tells of
the next one (a correlation of 0.2 on WikiText-2) and the one behind it (0.1), hardly of others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One item as the models see it."""

    item: Item
    ids: tuple[int, ...]
    """Of the prompt; empty where no tokenizer is at hand and the text itself is sent."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Token ids of what may follow."""

    @property
    def key(self) -> str:
        """A digest of everything that the answer depends on, but the model."""
        item = self.item
        return digest(
            [self.ids, self.choices, item.prompt, item.messages, item.max_new_tokens, item.stop]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One window of a text."""

    ids: tuple[int, ...]
    document: str
    kind: str
    """A slice of the text: "prose", "code", ... or the name of the user's file."""

    @property
    def key(self) -> str:
        """A digest of its tokens."""
        return digest(self.ids)


def digest(value: Any) -> str:
    """Give 32 hex digits of the SHA-256 of plain values, as JSON."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def make_question(tokenizer: Any, item: Item) -> Question:
    """Turn an item into token ids.

    Args:
        tokenizer: A Hugging Face tokenizer, or None where both models take text.
        item: The item.

    Returns:
        The question.

    Raises:
        ConfigError: A chat, and the tokenizer has no chat template; or a choice adds no token.
    """
    if tokenizer is None:
        return Question(item=item, ids=())
    if item.messages:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"Item '{item.name}' is a chat, and the base's tokenizer has no chat template. "
                "Give 'prompt' instead of 'messages'."
            )
        encoded = tokenizer.apply_chat_template(
            [dict(m) for m in item.messages],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        ids = tuple(encoded["input_ids"])
    else:
        ids = encode_prompt(tokenizer, item.prompt)
    if not item.choices:
        return Question(item=item, ids=ids)
    if item.messages:
        choices = [
            tuple(tokenizer(c, add_special_tokens=False, verbose=False)["input_ids"])
            for c in item.choices
        ]
    else:
        # The prompt's last token may change with what follows it: then the split moves back to
        # what every choice has in common.
        whole = [encode_prompt(tokenizer, item.prompt + c) for c in item.choices]
        shared = min(_common_prefix(ids, w) for w in whole)
        ids, choices = ids[:shared], [w[shared:] for w in whole]
    if not all(choices) or not ids:
        raise ConfigError(
            f"Item '{item.name}': a choice adds no token of its own to the prompt "
            f"{item.shown_prompt[-30:]!r}. Move the words that choices share into them."
        )
    return Question(item=item, ids=ids, choices=tuple(choices))


def encode_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Give a prompt's token ids, with the special tokens that the tokenizer puts before a text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: May be empty.

    Returns:
        At least one id where the tokenizer has a BOS or EOS token: a model cannot run on none.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # Some tokenizers also close the text; a prompt is to be continued.
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id and ids[0] == tokenizer.bos_token_id:
        ids.pop()
    if not ids:
        start = tokenizer.bos_token_id
        start = tokenizer.eos_token_id if start is None else start
        ids = [] if start is None else [start]
    return tuple(ids)


def _common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    count = 0
    for a, b in zip(left, right, strict=False):
        if a != b:
            break
        count += 1
    return count


def make_passages(
    tokenizer: Any, documents: Mapping[str, Iterable[str]], *, window: int, limit: int | None
) -> list[Passage]:
    """Cut documents into windows of tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        documents: Texts by kind.
        window: Tokens per window; a document's shorter rest counts too, from 16 tokens on.
        limit: At most this many windows of each kind, spread over all of it; None: all.

    Returns:
        The windows. Those of one document are not independent; of a kind of one long text, such as
        the prose, each stretch of ``STRETCH_TOKENS`` is taken as a document.

    Raises:
        ConfigError: A window below 16 tokens, or a text of fewer.
    """
    if window < SHORTEST_PASSAGE:
        raise ConfigError(f"window is {window} tokens; it must be {SHORTEST_PASSAGE} or more.")
    passages: list[Passage] = []
    for kind, texts in documents.items():
        found: list[Passage] = []
        texts = list(texts)
        for number, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), window):
                piece = tuple(ids[start : start + window])
                if len(piece) < SHORTEST_PASSAGE:
                    continue
                part = start // STRETCH_TOKENS if len(texts) == 1 else number
                found.append(Passage(ids=piece, document=f"{kind}:{part}", kind=kind))
        if not found:
            raise ConfigError(
                f"The text '{kind}' has no piece of {SHORTEST_PASSAGE} tokens or more to read. "
                "Give a longer one, or leave running text out."
            )
        count = len(found) if limit is None else min(limit, len(found))
        passages += [found[place * len(found) // count] for place in range(count)]
    return passages


def builtin_documents() -> dict[str, list[str]]:
    """Give the held-out text that ships with halfbyte, by kind; the prose first."""
    return {kind: evaluation_documents(kind) for kind in (PROSE, *EVALUATION_FILES)}
