"""Who runs next: reservations, turns between keys, and which tokens go through the model at once.

::

    waiting (a queue per key) ──admit: all its pages reserved──> running ──plan──> pieces

A request is admitted only with the pages for prompt and answer reserved, so nothing that runs is
ever short of memory, or thrown out for somebody else. The key that has had least is next; within a
key, first come, first served. Whoever is next and does not fit is waited for: if smaller ones went
past, a large one might wait for ever.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Piece


@dataclass(slots=True)
class _Turn:
    """What one key waits for, and what it has had."""

    waiting: deque[Job] = field(default_factory=deque)
    had: float = 0.0
    """Tokens, by the virtual time of fair queueing: who comes late starts at the least of the
    others', not at 0."""


class Scheduler:
    """All requests of one engine; used by its worker alone."""

    def __init__(self, pool: PagePool, *, sequences: int, step_tokens: int) -> None:
        """Start with nothing to do.

        Args:
            pool: Pages of the cache.
            sequences: That run at the same time, at most.
            step_tokens: That go through the model at once, at most.
        """
        self.pool = pool
        self.running: list[Job] = []
        self._sequences = sequences
        self._step_tokens = step_tokens
        self._turns: dict[str, _Turn] = {}
        self._again: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        """Requests that are not admitted yet."""
        return len(self._again) + sum(len(turn.waiting) for turn in self._turns.values())

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not self.running and not self.waiting

    def jobs(self) -> Iterator[Job]:
        """All of them, running or waiting."""
        yield from self.running
        yield from self._again
        for turn in self._turns.values():
            yield from turn.waiting

    def add(self, job: Job) -> None:
        """Take a request in."""
        turn = self._turns.get(job.request.key)
        if turn is None:
            least = min((other.had for other in self._turns.values()), default=0.0)
            turn = self._turns[job.request.key] = _Turn(had=least)
        turn.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Take a request out, wherever it is; its pages are free at once."""
        if job in self.running:
            self.running.remove(job)
            self._release(job)
            turn = self._turns.get(job.request.key)
            if turn is not None:
                # It was charged for an answer of full length.
                turn.had -= job.room - len(job.tokens)
        elif job in self._again:
            self._again.remove(job)
        else:
            turn = self._turns.get(job.request.key)
            if turn is not None and job in turn.waiting:
                turn.waiting.remove(job)
        self._drop_turns()

    def repeat_all(self) -> list[Job]:
        """Take back everything that runs, after a failure; nothing computed is trusted any more.

        Returns:
            Those that will run again, before all that wait.
        """
        jobs = self.running
        for job in jobs:
            self._release(job)
        self.pool.forget()
        self._again.extendleft(reversed(jobs))
        self.running = []
        return jobs

    def admit(self) -> None:
        """Let in who is next, as long as there is room."""
        while len(self.running) < self._sequences:
            queue, turn = self._next()
            if queue is None:
                return
            job = queue[0]
            if any(self._is_reading_for(other, job) for other in self.running):
                return
            reservation = self.pool.reserve(
                job.tokens, job.room, family=job.request.adapter or "", share=job.shares
            )
            if reservation is None:
                return
            queue.popleft()
            job.reservation = reservation
            job.computed = reservation.cached_tokens
            if job.cached_tokens is None:
                job.cached_tokens = reservation.cached_tokens
            if turn is not None:
                turn.had += job.room - reservation.cached_tokens
            self.running.append(job)

    def plan(self) -> list[tuple[Job, Piece]]:
        """Choose what the next step runs.

        Returns:
            Every answer's newest token, then pieces of prompts, first come, first served. After a
            failure those under suspicion run alone, one after the other.
        """
        suspects = [job for job in self.running if job.is_suspect]
        if suspects:
            return [(suspects[0], suspects[0].next_piece(self._step_tokens))]
        # Of whom only the newest token is missing stands before all prompts.
        order = sorted(self.running, key=lambda job: len(job.tokens) - job.computed > 1)
        room = self._step_tokens
        pieces = []
        for job in order:
            if room == 0:
                break
            piece = job.next_piece(room)
            room -= len(piece.tokens)
            pieces.append((job, piece))
        return pieces

    def note_computed(self, job: Job, count: int) -> None:
        """Note that tokens of a request have been run; the prompt's full pages can be shared.

        Not the answer's: read as part of a prompt, the same tokens may give other last bits, and an
        answer must not depend on what somebody else asked before.
        """
        job.computed += count
        assert job.reservation is not None
        shared = min(job.computed, len(job.request.prompt))
        self.pool.note_computed(job.reservation, job.tokens, shared)

    def _is_reading_for(self, other: Job, job: Job) -> bool:
        """Tell whether another is about to read what this one begins with: so it is read once.

        The choices of one request, and all that have the same system prompt, come at the same time.
        """
        if not (job.shares and other.shares and self.pool.share):
            return False
        # Up to the end of the page that is being read.
        end = (other.computed // self.pool.page_tokens + 1) * self.pool.page_tokens
        return (
            end <= len(other.request.prompt)
            and end < len(job.tokens)
            and other.request.adapter == job.request.adapter
            and other.tokens[:end] == job.tokens[:end]
        )

    def _next(self) -> tuple[deque[Job] | None, _Turn | None]:
        if self._again:
            return self._again, None
        turns = [turn for turn in self._turns.values() if turn.waiting]
        if not turns:
            return None, None
        turn = min(turns, key=lambda turn: turn.had)
        return turn.waiting, turn

    def _release(self, job: Job) -> None:
        if job.reservation is not None:
            self.pool.release(job.reservation)
            job.reservation = None

    def _drop_turns(self) -> None:
        """Forget keys that have nothing here; there may be many over the years."""
        busy = {job.request.key for job in self.jobs()}
        for key in [key for key in self._turns if key not in busy]:
            del self._turns[key]
