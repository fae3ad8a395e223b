"""One request on its way through the engine."""

from __future__ import annotations

from collections.abc import Sequence

from halfbyte.errors import HalfbyteError
from halfbyte.serve.engine.contract import Rated, TokenEvent, TokenRequest
from halfbyte.serve.engine.page_pool import Reservation
from halfbyte.serve.engine.runner import Piece
from halfbyte.serve.engine.sampler import Sampler

MOST_FAILURES = 3
"""Steps in a row that fail with a request alone while the model runs without it, until it is taken
to be the cause."""


class Job:
    """What is known of a request while it waits and runs; only the worker changes it."""

    def __init__(self, request: TokenRequest, sampler: Sampler) -> None:
        """Start.

        Args:
            request: Checked.
            sampler: Draws its tokens.
        """
        self.request = request
        self.sampler = sampler
        self.tokens: list[int] = list(request.prompt)
        self.room = len(request.prompt) + request.max_new_tokens
        """Tokens that it may have in the end."""
        self.computed = 0
        """Tokens whose keys and values are in its pages."""
        self.reservation: Reservation | None = None
        self.cached_tokens: int | None = None
        """Of the prompt, found in the cache when it was admitted first."""
        self.rated: list[Rated | None] = [None]
        """The prompt's tokens so far, where that was asked for."""
        self.is_prompted = False
        self.is_suspect = False
        self.failures = 0
        """Steps that failed with it alone since it last got a token, and not without it."""
        self.outbox: list[TokenEvent | HalfbyteError] = []
        self.is_over = False

    @property
    def new_tokens(self) -> int:
        """Of the answer, so far."""
        return len(self.tokens) - len(self.request.prompt)

    @property
    def rates_prompt(self) -> bool:
        """Whether the prompt's own tokens are still to be rated."""
        return self.request.prompt_logprobs is not None and not self.is_prompted

    @property
    def shares(self) -> bool:
        """Whether its beginning may come from the cache: not where its logits are asked for."""
        return not self.rates_prompt

    def begin_again(self) -> None:
        """Note that nothing of it is in the cache any more; its tokens so far are its prompt."""
        self.computed = 0
        if not self.is_prompted:
            self.rated = [None]

    def next_piece(self, most: int) -> Piece:
        """Give the tokens that are to be run next.

        Args:
            most: How many at most.

        Returns:
            The piece, with logits of its last token where that is the newest, or of all of them
            where the prompt is rated.
        """
        assert self.reservation is not None
        prompt = len(self.request.prompt)
        is_prompt = self.computed < prompt
        if is_prompt:
            most = min(most, prompt - self.computed)
        part: Sequence[int] = self.tokens[self.computed : self.computed + most]
        whole = self.computed + len(part) == len(self.tokens)
        return Piece(
            tokens=part,
            start=self.computed,
            pages=self.reservation.pages,
            logits=len(part) if self.rates_prompt else int(whole),
            is_prompt=is_prompt,
            adapter=self.request.adapter,
        )
