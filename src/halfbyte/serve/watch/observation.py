"""Records of one request and of each model's attempt at it, filled as events pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from halfbyte.serve.backend import Call, Delta, Event, Finish, Served, ToolCall, Usage
from halfbyte.serve.fault import Fault

Role = Literal["primary", "canary", "fallback"]
Arm = Literal["", "primary", "canary"]


@dataclass(slots=True, kw_only=True, eq=False)
class AttemptRecord:
    """One model's answer, complete or not. Times are seconds of a monotonic clock."""

    backend: str
    role: Role
    started: float
    first: float | None = None
    """When the first event came."""
    last: float = 0.0
    """When the last event came."""
    ended: float | None = None
    num_tokens: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)
    """Text pieces of each choice."""
    tool_calls: list[ToolCall] = field(default_factory=list)
    finished: dict[int, str] = field(default_factory=dict)
    """Finish reason of each finished choice."""
    usage: Usage | None = None
    gaps: list[float] = field(default_factory=list)
    """Seconds between consecutive tokens. Tokens that arrive together share the time equally."""
    logprobs: list[float] = field(default_factory=list)
    """Log-probabilities of the sampled tokens, in nats; empty if the model reports none."""
    entropies: list[float] = field(default_factory=list)
    """Entropies of the tokens' distributions, in nats; empty if the model reports none."""
    cause: str = ""
    """Why the next model was asked, or the request failed; empty if the client got this answer."""
    fault: Fault | None = None
    """Whose fault it is that the answer is missing or incomplete; None if it is complete."""
    failures: tuple[str, ...] = ()
    """Failed checks."""

    def add(self, event: Event, now: float) -> None:
        """Record an event that arrived at time `now`."""
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
            # Monitors treat a refusal as text of the answer; reasoning is not part of it.
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
        """Return the text of a choice so far."""
        return "".join(self.texts.get(choice, ()))

    @property
    def choices(self) -> list[int]:
        """Indices of the choices that have started or finished."""
        return sorted({*self.texts, *self.finished})


@dataclass(slots=True, kw_only=True)
class Observation:
    """One request from its arrival to its end. Times are seconds of a monotonic clock."""

    call: Call
    served: Served
    started: float
    arm: Arm = ""
    """The arm of a canary trial that was drawn for it; empty: it is not part of a trial."""
    attempts: list[AttemptRecord] = field(default_factory=list)
    """In order. The last one is the answer, if there is one."""
    first: float | None = None
    """When the client got the first event."""
    ended: float | None = None
    status: int = 200
    """HTTP status that the client got, or 499 if it disconnected."""
    error: str = ""

    @property
    def answer(self) -> AttemptRecord | None:
        """The attempt whose answer the client got; None if all of them failed."""
        return next((a for a in reversed(self.attempts) if not a.cause), None)


def prompt_text(body: Mapping[str, Any]) -> str:
    """Return the last user message, or the prompt, as text.

    Args:
        body: The body of a request.

    Returns:
        The text; empty if the prompt is token ids.
    """
    messages = body.get("messages")
    if isinstance(messages, Sequence) and not isinstance(messages, str):
        users = [m for m in messages if isinstance(m, Mapping) and m.get("role") == "user"]
        return content_text(users[-1].get("content")) if users else ""
    prompt = body.get("prompt", "")
    if isinstance(prompt, str):
        return prompt
    return "\n".join(p for p in prompt if isinstance(p, str)) if prompt else ""


def content_text(content: object) -> str:
    """Return the text of a message's content, which may be a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        return ""
    parts = [p.get("text", "") for p in content if isinstance(p, Mapping)]
    return "".join(part for part in parts if isinstance(part, str))
