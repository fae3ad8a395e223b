"""Schedule requests: fair queueing between keys, admission by cache space, batching of tokens.

::

    waiting (a queue per key) ──admit: all its pages reserved──> running ──plan──> pieces

A request is admitted only when pages for its whole prompt and answer are reserved, so a running
request never runs out of memory and is never preempted. The key that has used the fewest tokens is
next; within a key, requests run in order of arrival. If the next request does not fit, no other is
admitted before it: otherwise smaller requests could starve a large one. Only a request whose prefix
is being computed lets others pass, because that takes a limited time.

Short prompts are computed before long ones, so that their first tokens do not wait for a long
prompt. The oldest prompt always gets half of a step, so that none is starved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice

from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Piece

MAX_LOOKAHEAD = 16
"""Waiting requests of which the first is admitted whose prefix is not being computed."""


@dataclass(slots=True)
class _KeyQueue:
    """The waiting requests of one key, and what it has used."""

    waiting: deque[Job] = field(default_factory=deque)
    used_tokens: float = 0.0
    """Virtual time of fair queueing, in tokens: a new key starts at the minimum of the others, not
    at 0."""


class Scheduler:
    """Schedules the requests of one engine; used only by its worker thread."""

    def __init__(self, pool: PagePool, *, max_sequences: int, max_batched_tokens: int) -> None:
        """Start without requests.

        Args:
            pool: Pages of the KV cache.
            max_sequences: Max number of running requests.
            max_batched_tokens: Max tokens per step.
        """
        self.pool = pool
        self.running: list[Job] = []
        self._max_running = max_sequences
        self._step_tokens = max_batched_tokens
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
            job = self._find_next()
            if job is None:
                return
            reservation = self.pool.reserve(
                job.tokens, job.max_tokens, namespace=job.namespace, share=job.can_share
            )
            if reservation is None:
                return
            if job in self._requeued:
                self._requeued.remove(job)
            else:
                queue = self._key_queues[job.request.key]
                queue.waiting.remove(job)
                queue.used_tokens += job.max_tokens - reservation.cached_tokens
            job.reservation = reservation
            job.num_computed = reservation.cached_tokens
            if job.cached_tokens is None:
                job.cached_tokens = reservation.cached_tokens
            self.running.append(job)

    def plan(self) -> list[tuple[Job, Piece]]:
        """Choose the pieces of the next step.

        Returns:
            The newest token of every answer, then pieces of prompts, the shortest first. After a
            failure, each suspect request runs alone.
        """
        suspects = [job for job in self.running if job.is_suspect]
        if suspects:
            return [(suspects[0], suspects[0].next_piece(self._step_tokens))]
        # Decode steps, which miss only their newest token, come before prompts.
        order = sorted(self.running, key=lambda job: job.num_missing)
        prompts = [job for job in self.running if job.num_missing > 1]
        remaining = self._step_tokens
        reserved = (remaining - len(order) + len(prompts) + 1) // 2
        pieces = []
        for job in order:
            if prompts and job is prompts[0]:
                reserved = 0
            if remaining > reserved:
                piece = job.next_piece(remaining - reserved)
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
            and other.namespace == job.namespace
            and other.tokens[:end] == job.tokens[:end]
        )

    def _find_next(self) -> Job | None:
        """Return the first waiting request whose prefix is not being computed."""
        queues = sorted(self._key_queues.values(), key=lambda queue: queue.used_tokens)
        waiting = self._requeued or chain.from_iterable(queue.waiting for queue in queues)
        for job in islice(waiting, MAX_LOOKAHEAD):
            if not any(self._is_computing_prefix(other, job) for other in self.running):
                return job
        return None

    def _release(self, job: Job) -> None:
        if job.reservation is not None:
            self.pool.release(job.reservation)
            job.reservation = None

    def _drop_idle_keys(self) -> None:
        """Remove keys without requests, so that their number does not grow without limit."""
        busy = {job.request.key for job in self.jobs()}
        for key in [key for key in self._key_queues if key not in busy]:
            del self._key_queues[key]
