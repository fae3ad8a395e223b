"""Answers held to a grammar: which tokens may come next, by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import ServeError, require_extra
from halfbyte.serve.engine.contract import Grammar

LONGEST_GRAMMAR = 100_000
"""Characters; what a grammar takes to compile grows with it."""


class Matcher:
    """One answer on its way through its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        """Start.

        Args:
            matcher: llguidance's.
            vocabulary: Tokens that the model knows; the tokenizer may know fewer.
        """
        self._matcher = matcher
        self._words = np.zeros((vocabulary + 31) // 32, dtype=np.int32)
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """Tell which tokens may come next.

        Returns:
            bool [vocabulary].

        Raises:
            ServeError: The grammar became too large to follow.
        """
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._vocabulary]).bool()

    def accept(self, token: int) -> bool:
        """Take a token; tell whether the sentence is complete and nothing may follow.

        Args:
            token: One of the allowed ones.

        Returns:
            Whether it is over.

        Raises:
            ServeError: The grammar became too large to follow.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ServeError(
                f"Cannot follow the grammar any further: {_first_line(self._matcher.get_error())}. "
                "Make it simpler.",
                param="response_format",
                code="invalid_grammar",
            )


class Grammars:
    """Compiles grammars for one model's tokenizer."""

    def __init__(self, folder: str | Path, vocabulary: int, ends: Iterable[int]) -> None:
        """Note where the tokenizer is; it is read when the first grammar comes.

        Args:
            folder: Of the model.
            vocabulary: Tokens that the model knows.
            ends: Its end-of-text tokens.
        """
        self._folder = folder
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """Compile a grammar; takes up to some seconds, from any thread.

        Args:
            grammar: As the request has it.

        Returns:
            Its start.

        Raises:
            ServeError: 400: it is none; says where.
            MissingExtraError: llguidance is not installed.
        """
        with require_extra("llguidance", "serve", f"An answer by {grammar.kind}"):
            from llguidance import LLMatcher
        if len(grammar.text) > LONGEST_GRAMMAR:
            _refuse(
                grammar, f"it has {len(grammar.text)} characters, {LONGEST_GRAMMAR} are allowed"
            )
        try:
            source = _write(grammar, LLMatcher)
        except ValueError as error:
            _refuse(grammar, _first_line(str(error)))
        matcher = LLMatcher(self._open_tokenizer(), source)
        if matcher.is_error():
            _refuse(grammar, _first_line(matcher.get_error()))
        return Matcher(matcher, self._vocabulary)

    def _open_tokenizer(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                from llguidance.hf import from_tokenizer
                from transformers import AutoTokenizer, PreTrainedTokenizerFast

                tokenizer = AutoTokenizer.from_pretrained(self._folder)
                if not isinstance(tokenizer, PreTrainedTokenizerFast):
                    raise ServeError(
                        "This model's answers cannot be held to a grammar: its tokenizer has no "
                        "tokenizer.json.",
                        param="response_format",
                    )
                self._tokenizer = from_tokenizer(
                    tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None
                )
            return self._tokenizer


def _write(grammar: Grammar, matcher: Any) -> str:
    """Give llguidance's own form."""
    if grammar.kind == "json_object":
        return str(matcher.grammar_from_json_schema('{"type": "object"}'))
    if grammar.kind == "json_schema":
        json.loads(grammar.text)
        return str(matcher.grammar_from_json_schema(grammar.text))
    if grammar.kind == "regex":
        return str(matcher.grammar_from_regex(grammar.text))
    if grammar.kind == "choice":
        choices = json.loads(grammar.text)
        if not isinstance(choices, list) or not choices:
            raise ValueError("choices are a JSON list of at least one string")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError("every choice must be a string of one character or more")
        words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return str(matcher.grammar_from_lark(f"start: {words}"))
    return str(matcher.grammar_from_lark(grammar.text))


def _refuse(grammar: Grammar, reason: str) -> NoReturn:
    raise ServeError(
        f"Cannot hold an answer to this {grammar.kind}: {reason}. Correct it.",
        param="response_format",
        code="invalid_grammar",
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if lines else "unknown error").rstrip(".")[:300]
