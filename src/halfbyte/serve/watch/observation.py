"""What is seen of one request: each model's attempt at it, as its events pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.serve.backend import Call, Delta, Event, Finish, Served, ToolCall, Usage
from halfbyte.serve.fault import Blame

Role = Literal["primary", "canary", "fallback"]
Arm = Literal["", "primary", "canary"]


@dataclass(slots=True, kw_only=True, eq=False)
class Seen:
    """One model's answer, as far as it came. All times are seconds of a clock that never jumps."""

    backend: str
    role: Role
    started: float
    first: float | None = None
    """When the first event came."""
    last: float = 0.0
    ended: float | None = None
    num_tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)
    """Pieces by choice."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finished: dict[int, str] = field(default_factory=dict)
    """Reason by choice."""
    usage: Usage | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between two tokens; those of one piece share the time since the one before."""
    logprobs: list[float] = field(default_factory=list)
    """Of the drawn tokens, in nats; empty where the model did not tell."""
    entropies: list[float] = field(default_factory=list)
    """In nats; empty where the model did not tell."""
    cause: str = ""
    """Why the next model was asked, or why the request failed; empty: this answer was given."""
    blame: Blame | None = None
    """Whose fault it is that there is no answer, or no whole one; None: there is."""
    failures: tuple[str, ...] = ()
    """Monitors that it did not pass."""

    def feed(self, event: Event, now: float) -> None:
        """Take an event in."""
        tokens = 0
        if type(event) is Delta:
            tokens = len(event.entropies) or len(event.logprobs or ()) or 1
        if self.first is None:
            self.first = now
        else:
            self.gaps += [(now - self.last) / tokens] * tokens if tokens else []
        self.last = now
        if type(event) is Delta:
            pieces = self.texts.get(event.choice)
            if pieces is None:
                pieces = self.texts[event.choice] = []
            # To who watches, a refusal is what the model says; what it thinks is not.
            pieces.append(event.text or event.refusal)
            if event.logprobs:
                self.logprobs.extend(token.logprob for token in event.logprobs)
            if event.entropies:
                self.entropies.extend(event.entropies)
            if event.tool_calls:
                self.tool_calls.extend(event.tool_calls)
            self.num_tokens += tokens
        elif type(event) is Finish:
            self.finished[event.choice] = event.reason
        elif type(event) is Usage:
            self.usage = event
            self.num_tokens = event.completion_tokens

    def text(self, choice: int = 0) -> str:
        """Give what a choice says so far."""
        return "".join(self.texts.get(choice, ()))

    @property
    def choices(self) -> list[int]:
        """Numbers of the choices that have begun or ended."""
        return sorted({*self.texts, *self.finished})


@dataclass(slots=True, kw_only=True)
class Observation:
    """One request from its arrival to its end."""

    call: Call
    served: Served
    started: float
    arm: Arm = ""
    """Of a canary: who was drawn to answer; empty: the request takes no part in the trial."""
    attempts: list[Seen] = field(default_factory=list)
    """In order; the last one is the answer, where there was one."""
    first: float | None = None
    """When the first event was let out."""
    ended: float | None = None
    status: int = 200
    """What the client got: 200, an error's status, or 499 where it left."""
    error: str = ""

    @property
    def answer(self) -> Seen | None:
        """The attempt that the client got; None where every one failed."""
        return next((a for a in reversed(self.attempts) if not a.cause), None)


def prompt_text(body: Mapping[str, Any]) -> str:
    """Give what was asked, as one text: the last user message, or the prompt.

    Args:
        body: Of a request.

    Returns:
        The text; empty where the prompt is token ids.
    """
    messages = body.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        asked = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
        return content_text(asked[-1].get("content")) if asked else ""
    prompt = body.get("prompt", "")
    if isinstance(prompt, str):
        return prompt
    return "\n".join(p for p in prompt if isinstance(p, str)) if prompt else ""


def content_text(content: object) -> str:
    """Give a message's content as text: it may come in parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [p.get("text", "") for p in content if isinstance(p, Mapping)]
    return "".join(part for part in parts if isinstance(part, str))
