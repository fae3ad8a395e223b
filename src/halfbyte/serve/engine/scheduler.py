"""Schedule requests: fair queueing between keys, admission by cache space, batching of tokens.

::

    waiting (a queue per key) ──admit: all its pages reserved──> running ──plan──> pieces

A request is admitted only when pages for its whole prompt and answer are reserved, so a running
request never runs out of memory and is never preempted. The key that has used the fewest tokens is
next; within a key, requests run in order of arrival. If the next request does not fit, no other is
admitted before it: otherwise smaller requests could starve a large one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Piece


@dataclass(slots=True)
class _KeyQueue:
    """The waiting requests of one key, and what it has used."""

    waiting: deque[Job] = field(default_factory=deque)
    used_tokens: float = 0.0
    """Virtual time of fair queueing, in tokens: a new key starts at the minimum of the others, not
    at 0."""


class Scheduler:
    """Schedules the requests of one engine; used only by its worker thread."""

    def __init__(self, pool: PagePool, *, sequences: int, step_tokens: int) -> None:
        """Start without requests.

        Args:
            pool: Pages of the KV cache.
            sequences: Max number of running requests.
            step_tokens: Max tokens per step.
        """
        self.pool = pool
        self.running: list[Job] = []
        self._max_running = sequences
        self._step_tokens = step_tokens
        self._key_queues: dict[str, _KeyQueue] = {}
        self._requeued: deque[Job] = deque()

    @property
    def waiting(self) -> int:
        """Number of requests that are not admitted yet."""
        return len(self._requeued) + sum(len(queue.waiting) for queue in self._key_queues.values())

    @property
    def is_idle(self) -> bool:
        """Whether there are no requests."""
        return not self.running and not self.waiting

    def jobs(self) -> Iterator[Job]:
        """Iterate over all requests, running or waiting."""
        yield from self.running
        yield from self._requeued
        for queue in self._key_queues.values():
            yield from queue.waiting

    def add(self, job: Job) -> None:
        """Queue a request."""
        queue = self._key_queues.get(job.request.key)
        if queue is None:
            start = min((other.used_tokens for other in self._key_queues.values()), default=0.0)
            queue = self._key_queues[job.request.key] = _KeyQueue(used_tokens=start)
        queue.waiting.append(job)

    def remove(self, job: Job) -> None:
        """Remove a request, running or waiting, and free its pages."""
        queue = self._key_queues.get(job.request.key)
        if job in self.running:
            self.running.remove(job)
            self._release(job)
            if queue is not None:
                # It was charged for an answer of maximum length.
                queue.used_tokens -= job.max_tokens - len(job.tokens)
        elif job in self._requeued:
            self._requeued.remove(job)
        elif queue is not None and job in queue.waiting:
            queue.waiting.remove(job)
        self._drop_idle_keys()

    def requeue_running(self) -> list[Job]:
        """Requeue all running requests after a failure, and invalidate everything computed.

        Returns:
            The requeued requests; they will run before all that wait.
        """
        jobs = self.running
        for job in jobs:
            self._release(job)
        self.pool.forget()
        self._requeued.extendleft(reversed(jobs))
        self.running = []
        return jobs

    def admit(self) -> None:
        """Admit requests in order while there is space."""
        while len(self.running) < self._max_running:
            waiting, queue = self._find_next()
            if waiting is None:
                return
            job = waiting[0]
            if any(self._is_computing_prefix(other, job) for other in self.running):
                return
            reservation = self.pool.reserve(
                job.tokens, job.max_tokens, namespace=job.request.adapter or "", share=job.can_share
            )
            if reservation is None:
                return
            waiting.popleft()
            job.reservation = reservation
            job.num_computed = reservation.cached_tokens
            if job.cached_tokens is None:
                job.cached_tokens = reservation.cached_tokens
            if queue is not None:
                queue.used_tokens += job.max_tokens - reservation.cached_tokens
            self.running.append(job)

    def plan(self) -> list[tuple[Job, Piece]]:
        """Choose the pieces of the next step.

        Returns:
            The newest token of every answer, then pieces of prompts in order of arrival. After a
            failure, each suspect request runs alone.
        """
        suspects = [job for job in self.running if job.is_suspect]
        if suspects:
            return [(suspects[0], suspects[0].next_piece(self._step_tokens))]
        # Decode steps, which miss only their newest token, come before prompts.
        order = sorted(self.running, key=lambda job: len(job.tokens) - job.num_computed > 1)
        remaining = self._step_tokens
        pieces = []
        for job in order:
            if remaining == 0:
                break
            piece = job.next_piece(remaining)
            remaining -= len(piece.tokens)
            pieces.append((job, piece))
        return pieces

    def mark_computed(self, job: Job, count: int) -> None:
        """Mark tokens of a request as computed, and share the full pages of its prompt.

        Pages of the answer are not shared: prefill may compute the same tokens with different last
        bits, and an answer must not depend on earlier requests of others.
        """
        job.num_computed += count
        assert job.reservation is not None
        num_shared = min(job.num_computed, len(job.request.prompt))
        self.pool.register_computed(job.reservation, job.tokens, num_shared)

    def _is_computing_prefix(self, other: Job, job: Job) -> bool:
        """Return whether a running request is about to compute a prefix of this one.

        The choices of one request, or requests with the same system prompt, often arrive together;
        waiting for the first one computes their prefix only once.
        """
        if not (job.can_share and other.can_share and self.pool.share):
            return False
        # The end of the page that is being computed.
        end = (other.num_computed // self.pool.page_tokens + 1) * self.pool.page_tokens
        return (
            end <= len(other.request.prompt)
            and end < len(job.tokens)
            and other.request.adapter == job.request.adapter
            and other.tokens[:end] == job.tokens[:end]
        )

    def _find_next(self) -> tuple[deque[Job] | None, _KeyQueue | None]:
        """Return the requests to admit from, and the key's queue to charge."""
        if self._requeued:
            return self._requeued, None
        queues = [queue for queue in self._key_queues.values() if queue.waiting]
        if not queues:
            return None, None
        queue = min(queues, key=lambda queue: queue.used_tokens)
        return queue.waiting, queue

    def _release(self, job: Job) -> None:
        if job.reservation is not None:
            self.pool.release(job.reservation)
            job.reservation = None

    def _drop_idle_keys(self) -> None:
        """Remove keys without requests, so that their number does not grow without limit."""
        busy = {job.request.key for job in self.jobs()}
        for key in [key for key in self._key_queues if key not in busy]:
            del self._key_queues[key]
