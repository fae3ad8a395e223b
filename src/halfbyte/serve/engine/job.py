"""The state of one request in the engine."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.errors import HalfbyteError
from halfbyte.serve.engine.contract import ScoredToken, TokenEvent, TokenRequest
from halfbyte.serve.engine.page_pool import Namespace, Reservation
from halfbyte.serve.engine.runner import Piece
from halfbyte.serve.engine.sampler import Sampler

MAX_FAILURES = 3
"""Consecutive steps that may fail with a request alone, while the model runs without it, before the
request is considered the cause."""


class Job:
    """A request while it waits and runs; only the worker thread changes it."""

    def __init__(self, request: TokenRequest, sampler: Sampler) -> None:
        """Create a job that has not started.

        Args:
            request: The validated request.
            sampler: Draws its tokens.
        """
        self.request = request
        self.sampler = sampler
        self.tokens: list[int] = list(request.prompt)
        self.max_tokens = len(request.prompt) + request.max_new_tokens
        """Max tokens of prompt and answer together."""
        self.num_computed = 0
        """Tokens whose keys and values are in its pages."""
        self.reservation: Reservation | None = None
        self.cached_tokens: int | None = None
        """Prompt tokens found in the prefix cache when it was first admitted."""
        self.scored_prompt: list[ScoredToken | None] = [None]
        """The prompt's tokens scored so far, if requested."""
        self.is_prefilled = False
        self.is_suspect = False
        """Whether it was part of a failed step and must run alone next."""
        self.failures = 0
        """Steps that failed with it alone, but not without it, since its last token."""
        self.outbox: list[TokenEvent | HalfbyteError] = []
        self.is_finished = False

    @property
    def num_new_tokens(self) -> int:
        """Tokens of the answer so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def num_missing(self) -> int:
        """Tokens to run before the next one can be drawn: 1 while it is decoded."""
        return len(self.tokens) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's tokens still have to be scored."""
        return self.request.prompt_logprobs is not None and not self.is_prefilled

    @property
    def namespace(self) -> Namespace:
        """Where its pages may be shared."""
        return self.request.adapter or "", self.request.key

    @property
    def can_share(self) -> bool:
        """Whether its prefix may come from the cache: not if the prompt's logits are needed."""
        return not self.scores_prompt

    def restart(self) -> None:
        """Mark nothing as computed; the answer so far is then recomputed like a prompt."""
        self.num_computed = 0
        if not self.is_prefilled:
            self.scored_prompt = [None]

    def next_piece(self, max_tokens: int) -> Piece:
        """Return the tokens to run next.

        Args:
            max_tokens: Max size of the piece.

        Returns:
            The piece, with logits for its last token if that is the newest, or for all tokens if
            the prompt is scored.
        """
        assert self.reservation is not None
        prompt = len(self.request.prompt)
        is_prompt = self.num_computed < prompt
        if is_prompt:
            max_tokens = min(max_tokens, prompt - self.num_computed)
        part: Sequence[int] = self.tokens[self.num_computed : self.num_computed + max_tokens]
        reaches_end = self.num_computed + len(part) == len(self.tokens)
        return Piece(
            tokens=part,
            start=self.num_computed,
            pages=self.reservation.pages,
            logits=len(part) if self.scores_prompt else int(reaches_end),
            is_prompt=is_prompt,
            adapter=self.request.adapter,
        )
