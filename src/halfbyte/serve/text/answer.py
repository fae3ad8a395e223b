"""What an engine says of one choice as the pieces that a client reads.

::

    token ──TextStream──> text ──StopFilter──> ──ToolCallFilter──> Delta

A token's logprobs come out with its text: not before, and not at all where a stop string swallowed
it whole.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from halfbyte.integrations.generation import TextStream
from halfbyte.serve.backend import Delta, Finish, FinishReason, TokenLogprob, ToolCall
from halfbyte.serve.engine.contract import Ended, Generated, Prompted, Rated
from halfbyte.serve.text.stops import StopFilter
from halfbyte.serve.text.token_text import Spelling
from halfbyte.serve.text.tool_calls import ToolCallFilter


class AnswerText:
    """Puts one choice's tokens into words."""

    def __init__(
        self,
        choice: int,
        tokenizer: Any,
        spelling: Spelling,
        *,
        stops: Sequence[str] = (),
        calls: ToolCallFilter | None = None,
        logprobs: bool = False,
    ) -> None:
        """Start.

        Args:
            choice: Its index.
            tokenizer: The model's.
            spelling: Of its tokens.
            stops: Stop strings.
            calls: Finds tool calls; None: none may come.
            logprobs: Whether the client wants them.
        """
        self.choice = choice
        # The marks of tool calls are special tokens to some tokenizers.
        self._stream = TextStream(tokenizer, skip_special=calls is None)
        self._stops = StopFilter(stops)
        self._calls = calls
        self._spelling = spelling
        self._logprobs = logprobs
        # Otherwise it matters which text is of which token.
        self._all_at_once = not (stops or calls or logprobs)
        # Where a token's text begins among all text, and what is told of it.
        self._rated: deque[tuple[int, TokenLogprob]] = deque()
        self._entropies: list[float] = []
        self._fed = self._released = 0
        # Of the next piece.
        self._content = ""
        self._found: tuple[ToolCall, ...] = ()
        self.tokens = 0
        """Of the answer, as far as it was looked at."""
        self._called = False

    @property
    def is_complete(self) -> bool:
        """Nothing that comes after is wanted."""
        return self._stops.hit or (self._calls is not None and self._calls.full)

    def begin(self, event: Prompted, prompt: Sequence[int], text: str) -> Delta:
        """Repeat the prompt.

        Args:
            event: With the prompt's likelihoods, where they were asked for.
            prompt: Its token ids.
            text: The prompt's.

        Returns:
            The prompt as a piece of the answer.
        """
        rated = None
        if event.rated is not None and self._logprobs:
            rated = tuple(
                tell_unrated(token, self._spelling)
                if rating is None
                else tell_logprob(rating, self._spelling)
                for token, rating in zip(prompt, event.rated, strict=True)
            )
        return Delta(choice=self.choice, text=text, logprobs=rated)

    def add(self, events: Sequence[Generated]) -> None:
        """Take tokens; those after the answer's end are not looked at.

        Args:
            events: They, with their likelihoods.
        """
        if self._all_at_once and events:
            self.tokens += len(events)
            self._note_entropies(events)
            self._accept(self._stream.add(*[event.rated.token for event in events]))
            return
        for event in events:
            self.tokens += 1
            self._note_entropies((event,))
            if self._logprobs:
                self._rated.append((self._fed, tell_logprob(event.rated, self._spelling)))
            text = self._stream.add(event.rated.token)
            self._fed += len(text)
            self._accept(self._stops.feed(text))
            if self.is_complete:
                return

    def take(self) -> Delta | None:
        """Give what is certain by now.

        Returns:
            The next piece; None where nothing is new.
        """
        return self._release(end=False)

    def end(self, event: Ended | None) -> tuple[Delta | None, Finish]:
        """Close the choice.

        Args:
            event: How the engine ended; None where the text was complete before.

        Returns:
            What was not taken yet, and the finish.
        """
        text = ""
        if not self.is_complete:
            text = self._stops.feed(self._stream.finish()) + self._stops.finish()
        self._accept(text)
        if self._calls is not None:
            self._keep(*self._calls.finish())
        delta = self._release(end=True)
        reason: FinishReason = "stop"
        if event is not None and event.reason == "length" and not self.is_complete:
            reason = "length"
        elif self._called:
            reason = "tool_calls"
        return delta, Finish(choice=self.choice, reason=reason)

    def _note_entropies(self, events: Sequence[Generated]) -> None:
        self._entropies += [event.entropy for event in events if not math.isnan(event.entropy)]

    def _accept(self, text: str) -> None:
        """Take text that no stop string is in."""
        self._released += len(text)
        self._keep(*((text, ()) if self._calls is None else self._calls.feed(text)))

    def _keep(self, content: str, calls: tuple[ToolCall, ...]) -> None:
        """Put text and calls into the next piece."""
        self._content += content
        self._found += calls
        self._called = self._called or bool(calls)

    def _release(self, *, end: bool) -> Delta | None:
        rated = self._take_rated(all_of_them=end and not self._stops.hit)
        if not (self._content or self._found or rated or (end and self._entropies)):
            return None
        content, self._content = self._content, ""
        calls, self._found = self._found, ()
        entropies, self._entropies = tuple(self._entropies), []
        return Delta(
            choice=self.choice,
            text=content,
            logprobs=rated if self._logprobs else None,
            tool_calls=calls,
            entropies=entropies,
        )

    def _take_rated(self, *, all_of_them: bool) -> tuple[TokenLogprob, ...]:
        taken = []
        while self._rated and (all_of_them or self._rated[0][0] < self._released):
            taken.append(self._rated.popleft()[1])
        return tuple(taken)


def tell_logprob(rated: Rated, spelling: Spelling) -> TokenLogprob:
    """Write a rated token as clients read it.

    Args:
        rated: By the engine.
        spelling: Of the model's tokens.

    Returns:
        The token with its text and bytes.
    """
    text, raw = spelling.spell(rated.token)
    top = []
    for token, logprob in rated.top:
        other, other_raw = spelling.spell(token)
        top.append(TokenLogprob(token=other, logprob=logprob, bytes=tuple(other_raw)))
    return TokenLogprob(token=text, logprob=rated.logprob, bytes=tuple(raw), top=tuple(top))


def tell_unrated(token: int, spelling: Spelling) -> TokenLogprob:
    """Write a token that has no likelihood, because nothing stands before it.

    Args:
        token: Its id.
        spelling: Of the model's tokens.

    Returns:
        The token; its logprob is not a number.
    """
    text, raw = spelling.spell(token)
    return TokenLogprob(token=text, logprob=math.nan, bytes=tuple(raw))
