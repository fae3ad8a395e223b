"""Tokenized items and texts. The base's tokenizer encodes them once, for both models.

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

MIN_PASSAGE_TOKENS = 16
"""A shorter remainder of a document is left out."""
STRETCH_TOKENS = 1024
"""Tokens of one long text that count as a document. The losses of neighboring windows of 256 tokens
are correlated (on WikiText-2 by 0.2, two windows apart by 0.1), those farther apart hardly."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One item as token ids."""

    item: Item
    ids: tuple[int, ...]
    """Of the prompt; empty if both models are served and get the text itself."""
    choices: tuple[tuple[int, ...], ...] = ()
    """Token ids of each choice."""

    @property
    def key(self) -> str:
        """Digest of everything that the answer depends on, except the model."""
        item = self.item
        return digest(
            [self.ids, self.choices, item.prompt, item.messages, item.max_new_tokens, item.stop]
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """One window of a document."""

    ids: tuple[int, ...]
    document: str
    kind: str
    """Kind of text: "prose", "code", ... or the name of the user's file."""

    @property
    def key(self) -> str:
        """Digest of its token ids."""
        return digest(self.ids)


def digest(value: Any) -> str:
    """Return the first 32 hex digits of the SHA-256 of plain values, as JSON."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def make_question(tokenizer: Any, item: Item) -> Question:
    """Tokenize an item.

    Args:
        tokenizer: A Hugging Face tokenizer, or None if both models are served.
        item: The item.

    Returns:
        The question.

    Raises:
        ConfigError: The item is a chat and the tokenizer has no chat template, or a choice adds no
            token to the prompt.
    """
    if tokenizer is None:
        return Question(item=item, ids=())
    if item.messages:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError(
                f"Cannot encode item '{item.name}': it is a chat, and the base's tokenizer has no "
                "chat template. Give 'prompt' instead of 'messages'."
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
        # The prompt's last token may depend on what follows it. Then the prompt ends before the
        # first token that is not common to all choices.
        whole = [encode_prompt(tokenizer, item.prompt + c) for c in item.choices]
        shared = min(_common_prefix(ids, w) for w in whole)
        ids, choices = ids[:shared], [w[shared:] for w in whole]
    if not all(choices) or not ids:
        raise ConfigError(
            f"Cannot encode item '{item.name}': a choice adds no token of its own to the prompt "
            f"{item.shown_prompt[-30:]!r}. Move text from the end of the prompt into the choices."
        )
    return Question(item=item, ids=ids, choices=tuple(choices))


def encode_prompt(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Tokenize a prompt, with the special tokens that the tokenizer adds before a text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        text: May be empty.

    Returns:
        At least one id if the tokenizer has a BOS or EOS token: a model cannot run on no token.
    """
    ids = list(tokenizer(text, verbose=False)["input_ids"])
    # Some tokenizers append EOS; a prompt is to be continued.
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
    """Split documents into windows of tokens.

    Args:
        tokenizer: A Hugging Face tokenizer.
        documents: Texts by kind.
        window: Tokens per window; a document's remainder is a window too, from 16 tokens on.
        limit: At most this many windows of each kind, spread evenly over it; None: all.

    Returns:
        The windows. Those of one document are not independent. If a kind is one long text, such as
        the prose, each stretch of ``STRETCH_TOKENS`` counts as a document.

    Raises:
        ConfigError: The window or a text has fewer than 16 tokens.
    """
    if window < MIN_PASSAGE_TOKENS:
        raise ConfigError(f"window is {window} tokens; it must be {MIN_PASSAGE_TOKENS} or more.")
    passages: list[Passage] = []
    for kind, texts in documents.items():
        found: list[Passage] = []
        texts = list(texts)
        for number, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), window):
                piece = tuple(ids[start : start + window])
                if len(piece) < MIN_PASSAGE_TOKENS:
                    continue
                part = start // STRETCH_TOKENS if len(texts) == 1 else number
                found.append(Passage(ids=piece, document=f"{kind}:{part}", kind=kind))
        if not found:
            raise ConfigError(
                f"The text '{kind}' has no document of {MIN_PASSAGE_TOKENS} tokens or more. Give a "
                "longer one, or leave running text out."
            )
        count = len(found) if limit is None else min(limit, len(found))
        passages += [found[i * len(found) // count] for i in range(count)]
    return passages


def builtin_documents() -> dict[str, list[str]]:
    """Return the held-out text that ships with halfbyte, by kind; the prose first."""
    return {kind: evaluation_documents(kind) for kind in (PROSE, *EVALUATION_FILES)}
