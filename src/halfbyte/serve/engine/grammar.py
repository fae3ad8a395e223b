"""Constrained decoding: token masks from grammars, computed by llguidance."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from halfbyte.errors import ServeError, require_extra
from halfbyte.serve.engine.contract import Grammar

MAX_GRAMMAR_CHARACTERS = 100_000
"""Limits the time to compile a grammar, which grows with its length."""


class Matcher:
    """Follows one answer through its grammar."""

    def __init__(self, matcher: Any, vocabulary: int) -> None:
        """Start at the beginning of the grammar.

        Args:
            matcher: llguidance's matcher.
            vocabulary: Size of the model's vocabulary; the tokenizer's may be smaller.
        """
        self._matcher = matcher
        self._words = np.zeros((vocabulary + 31) // 32, dtype=np.int32)
        self._vocabulary = vocabulary

    def allowed(self) -> Tensor:
        """Return which tokens are allowed next.

        Returns:
            bool [vocabulary].

        Raises:
            ServeError: The grammar exceeds llguidance's limits.
        """
        self._matcher.unsafe_compute_mask_ptr(self._words.ctypes.data, self._words.nbytes)
        self._check()
        bits = np.unpackbits(self._words.view(np.uint8), bitorder="little")
        return torch.from_numpy(bits[: self._vocabulary]).bool()

    def accept(self, token: int) -> bool:
        """Accept a token, and return whether the answer is complete.

        Args:
            token: An allowed token.

        Returns:
            Whether no further token is allowed.

        Raises:
            ServeError: The grammar exceeds llguidance's limits.
        """
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ServeError(
                "Cannot continue an answer with this grammar: "
                f"{_first_line(self._matcher.get_error())}. Simplify the grammar.",
                param="response_format",
                code="invalid_grammar",
            )


class Grammars:
    """Compiles grammars for one model's tokenizer."""

    def __init__(
        self, get_tokenizer: Callable[[], Any], vocabulary: int, ends: Iterable[int]
    ) -> None:
        """Prepare; llguidance's tables are built for the first grammar.

        Args:
            get_tokenizer: Returns the model's tokenizer; called with the first grammar.
            vocabulary: Size of the model's vocabulary.
            ends: The model's end-of-text tokens.
        """
        self._get_tokenizer = get_tokenizer
        self._vocabulary = vocabulary
        self._ends = sorted(ends)
        self._tokenizer: Any = None
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> Matcher:
        """Compile a grammar; thread-safe, and may take a few seconds.

        Args:
            grammar: The request's grammar.

        Returns:
            A matcher at the beginning of the grammar.

        Raises:
            ServeError: 400 if the grammar is invalid; says why.
            MissingExtraError: llguidance is not installed.
        """
        with require_extra("llguidance", "serve", f"An answer by {grammar.kind}"):
            from llguidance import LLMatcher
        if len(grammar.text) > MAX_GRAMMAR_CHARACTERS:
            _reject(
                grammar,
                f"it has {len(grammar.text)} characters, at most {MAX_GRAMMAR_CHARACTERS} are "
                "allowed",
            )
        try:
            source = _convert(grammar, LLMatcher)
        except ValueError as error:
            _reject(grammar, _first_line(str(error)))
        matcher = LLMatcher(self._load_tokenizer(), source)
        if matcher.is_error():
            _reject(grammar, _first_line(matcher.get_error()))
        compiled = Matcher(matcher, self._vocabulary)
        # The first mask builds the lexer, which may take seconds: here it delays only this request.
        compiled.allowed()
        return compiled

    def _load_tokenizer(self) -> Any:
        with self._lock:
            if self._tokenizer is None:
                from llguidance.hf import from_tokenizer
                from transformers import PreTrainedTokenizerFast

                tokenizer = self._get_tokenizer()
                if not isinstance(tokenizer, PreTrainedTokenizerFast):
                    raise ServeError(
                        "This model does not support grammars: its tokenizer has no "
                        "tokenizer.json.",
                        param="response_format",
                    )
                self._tokenizer = from_tokenizer(
                    tokenizer, n_vocab=self._vocabulary, eos_token=self._ends or None
                )
            return self._tokenizer


def _convert(grammar: Grammar, matcher: Any) -> str:
    """Convert a grammar to llguidance's format."""
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
            raise ValueError("choices must be a JSON list of at least one string")
        if not all(isinstance(choice, str) and choice for choice in choices):
            raise ValueError("every choice must be a non-empty string")
        words = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return str(matcher.grammar_from_lark(f"start: {words}"))
    return str(matcher.grammar_from_lark(grammar.text))


def _reject(grammar: Grammar, reason: str) -> NoReturn:
    raise ServeError(
        f"Cannot constrain the answer by this {grammar.kind}: {reason}. Correct it.",
        param="response_format",
        code="invalid_grammar",
    )


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    return (lines[0] if lines else "unknown error").rstrip(".")[:300]
