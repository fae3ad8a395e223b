"""Convert the engine's events of one choice into deltas.

::

    token ──TextStream──> text ──StopFilter──> ──ToolCallFilter──> Delta

A token's logprobs are released together with its text, and dropped if the whole token belongs to a
stop string.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

from halfbyte.integrations.generation import TextStream
from halfbyte.serve.backend import Delta, Finish, FinishReason, TokenLogprob, ToolCall
from halfbyte.serve.engine.contract import Ended, Generated, Prefilled, ScoredToken
from halfbyte.serve.text.stops import StopFilter
from halfbyte.serve.text.token_text import Spelling
from halfbyte.serve.text.tool_calls import ToolCallFilter


class AnswerText:
    """Decodes one choice's tokens into deltas."""

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
        """Prepare the filters.

        Args:
            choice: The choice's index.
            tokenizer: The model's tokenizer.
            spelling: Texts and bytes of its tokens.
            stops: Stop strings.
            calls: Finds tool calls; None if none are expected.
            logprobs: Whether the client requested logprobs.
        """
        self.choice = choice
        # In some tokenizers the tool call markers are special tokens.
        self._stream = TextStream(tokenizer, skip_special=calls is None)
        self._stops = StopFilter(stops)
        self._calls = calls
        self._spelling = spelling
        self._logprobs = logprobs
        # With stops, calls or logprobs, tokens are decoded one by one.
        self._can_decode_together = not (stops or calls or logprobs)
        # Per token: the offset of its text in the whole text, and its logprob.
        self._pending_logprobs: deque[tuple[int, TokenLogprob]] = deque()
        self._entropies: list[float] = []
        self._decoded_length = self._released_length = 0
        # Content and tool calls of the next delta.
        self._content = ""
        self._new_calls: tuple[ToolCall, ...] = ()
        self.tokens = 0
        """Tokens of the answer so far, not counting those after its end."""
        self._has_calls = False

    @property
    def is_complete(self) -> bool:
        """Whether the answer is complete and further tokens are not needed."""
        return self._stops.hit or (self._calls is not None and self._calls.is_full)

    def echo_prompt(self, event: Prefilled, prompt: Sequence[int], text: str) -> Delta:
        """Return the prompt as the first delta, for ``echo``.

        Args:
            event: Contains the prompt's logprobs, if requested.
            prompt: The prompt's token ids.
            text: The prompt's text.

        Returns:
            The delta.
        """
        logprobs = None
        if event.scored_prompt is not None and self._logprobs:
            logprobs = tuple(
                make_unscored_logprob(token, self._spelling)
                if scored is None
                else make_token_logprob(scored, self._spelling)
                for token, scored in zip(prompt, event.scored_prompt, strict=True)
            )
        return Delta(choice=self.choice, text=text, logprobs=logprobs)

    def add(self, events: Sequence[Generated]) -> None:
        """Decode tokens; those after the answer's end are ignored.

        Args:
            events: The generated tokens.
        """
        if self._can_decode_together and events:
            self.tokens += len(events)
            self._add_entropies(events)
            self._accept(self._stream.add(*[event.scored.token for event in events]))
            return
        for event in events:
            self.tokens += 1
            self._add_entropies((event,))
            if self._logprobs:
                logprob = make_token_logprob(event.scored, self._spelling)
                self._pending_logprobs.append((self._decoded_length, logprob))
            text = self._stream.add(event.scored.token)
            self._decoded_length += len(text)
            self._accept(self._stops.feed(text))
            if self.is_complete:
                return

    def take(self) -> Delta | None:
        """Return what is certain to belong to the answer so far.

        Returns:
            The next delta; None if there is nothing new.
        """
        return self._release(end=False)

    def end(self, event: Ended | None) -> tuple[Delta | None, Finish]:
        """Finish the choice.

        Args:
            event: The engine's last event; None if the text was complete before it.

        Returns:
            The last delta, if any, and the finish event.
        """
        text = ""
        if not self.is_complete:
            text = self._stops.feed(self._stream.finish()) + self._stops.finish()
        self._accept(text)
        if self._calls is not None:
            self._collect(*self._calls.finish())
        delta = self._release(end=True)
        reason: FinishReason = "stop"
        if event is not None and event.reason == "length" and not self.is_complete:
            reason = "length"
        elif self._has_calls:
            reason = "tool_calls"
        return delta, Finish(choice=self.choice, reason=reason)

    def _add_entropies(self, events: Sequence[Generated]) -> None:
        self._entropies += [event.entropy for event in events if not math.isnan(event.entropy)]

    def _accept(self, text: str) -> None:
        """Pass on text that has passed the stop filter."""
        self._released_length += len(text)
        self._collect(*((text, ()) if self._calls is None else self._calls.feed(text)))

    def _collect(self, content: str, calls: tuple[ToolCall, ...]) -> None:
        """Add content and tool calls to the next delta."""
        self._content += content
        self._new_calls += calls
        self._has_calls = self._has_calls or bool(calls)

    def _release(self, *, end: bool) -> Delta | None:
        logprobs = self._take_logprobs(take_all=end and not self._stops.hit)
        if not (self._content or self._new_calls or logprobs or (end and self._entropies)):
            return None
        content, self._content = self._content, ""
        calls, self._new_calls = self._new_calls, ()
        entropies, self._entropies = tuple(self._entropies), []
        return Delta(
            choice=self.choice,
            text=content,
            logprobs=logprobs if self._logprobs else None,
            tool_calls=calls,
            entropies=entropies,
        )

    def _take_logprobs(self, *, take_all: bool) -> tuple[TokenLogprob, ...]:
        taken = []
        pending = self._pending_logprobs
        while pending and (take_all or pending[0][0] < self._released_length):
            taken.append(pending.popleft()[1])
        return tuple(taken)


def make_token_logprob(scored: ScoredToken, spelling: Spelling) -> TokenLogprob:
    """Add text and bytes to a token scored by the engine.

    Args:
        scored: The scored token.
        spelling: Texts and bytes of the model's tokens.

    Returns:
        The token and its top alternatives with text and bytes.
    """
    text, raw = spelling.spell(scored.token)
    top = []
    for token, logprob in scored.top:
        other, other_raw = spelling.spell(token)
        top.append(TokenLogprob(token=other, logprob=logprob, bytes=tuple(other_raw)))
    return TokenLogprob(token=text, logprob=scored.logprob, bytes=tuple(raw), top=tuple(top))


def make_unscored_logprob(token: int, spelling: Spelling) -> TokenLogprob:
    """Make the entry of a prompt's first token, which has no log probability.

    Args:
        token: The token's id.
        spelling: Texts and bytes of the model's tokens.

    Returns:
        The token; its logprob is NaN.
    """
    text, raw = spelling.spell(token)
    return TokenLogprob(token=text, logprob=math.nan, bytes=tuple(raw))
