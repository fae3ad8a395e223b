"""The embedded engine: a worker thread that owns the model, with an asyncio interface.

::

    generate() ──validated──> commands ──> worker: Steps.step ─> outboxes ─> queue ──> generate()
    closing the iterator ──> commands: removed, its pages freed before the next step

Outboxes are delivered once the next step is planned, or if there is none; to each answer at most
every chunk_interval. Only the worker touches steps, pages and scheduler, so they need no locks.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch

from halfbyte.errors import HalfbyteError, ServeError
from halfbyte.serve.adapters import check_is_loaded
from halfbyte.serve.engine.admission import check_request
from halfbyte.serve.engine.contract import (
    Ended,
    EngineInfo,
    EngineLoad,
    TokenEvent,
    TokenRequest,
)
from halfbyte.serve.engine.failures import deadline_error
from halfbyte.serve.engine.grammar import Grammars
from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Runner
from halfbyte.serve.engine.sampler import Sampler
from halfbyte.serve.engine.scheduler import Scheduler
from halfbyte.serve.engine.steps import Steps

log = logging.getLogger(__name__)

Batch = Sequence[TokenEvent] | HalfbyteError


class _EventQueue:
    """A minimal queue with one consumer task; used only within its event loop.

    It does less than :class:`asyncio.Queue`, because each piece of each answer passes through it.
    """

    __slots__ = ("_batches", "_waiter")

    def __init__(self) -> None:
        self._batches: deque[Batch] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, batch: Batch) -> None:
        """Append a batch of events or an error."""
        self._batches.append(batch)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Batch:
        """Wait for the oldest batch and remove it."""
        while not self._batches:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._batches.popleft()


@dataclass(slots=True)
class _Consumer:
    """Where a job's events are delivered."""

    loop: asyncio.AbstractEventLoop
    queue: _EventQueue
    next_delivery: float = 0.0
    """Earliest time of the next piece, by :func:`time.monotonic`."""


class EmbeddedEngine:
    """Generates with a model in this process; implements contract.Engine."""

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        info: EngineInfo,
        *,
        ends: frozenset[int],
        grammars: Grammars,
        max_sequences: int,
        max_batched_tokens: int,
        max_queue: int,
        chunk_interval: float = 0.0,
    ) -> None:
        """Start the worker thread.

        Args:
            runner: Computes the model; its pages are allocated.
            pool: Manages the runner's pages.
            info: The engine's constant properties.
            ends: The model's end-of-text tokens.
            grammars: Compiles grammars for the model's tokenizer.
            max_sequences: Max number of running requests.
            max_batched_tokens: Max tokens per step.
            max_queue: Max number of queued requests.
            chunk_interval: Min time between two pieces of an answer; faster tokens are delivered
                together.
        """
        self.info = info
        self._runner = runner
        self._pool = pool
        self._grammars = grammars
        self._max_waiting = max_queue
        self._piece_seconds = chunk_interval
        self._scheduler = Scheduler(
            pool, max_sequences=max_sequences, max_batched_tokens=max_batched_tokens
        )
        self._page_bytes = pool.page_tokens * info.bytes_per_token
        self._consumers: dict[Job, _Consumer] = {}
        self._adapters: tuple[str, ...] = ()
        self._unloading: dict[str, Future[None]] = {}
        self._changed = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._num_submitted = 0
        """Jobs among the commands."""
        self._closing = False
        self._steps = Steps(
            runner, pool, self._scheduler, ends=ends, before_run=lambda: self._deliver_due()
        )
        self._load = self._measure_load()
        self._worker = threading.Thread(target=self._run, name="halfbyte-engine", daemon=True)
        self._worker.start()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the loaded adapters."""
        return self._adapters

    def load(self) -> EngineLoad:
        """Return how busy it is."""
        return self._load

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Generate; see contract.Engine.

        Args:
            request: The prompt and sampling parameters.

        Yields:
            Batches of events: Prefilled, Generated for each token, Ended.

        Raises:
            ServeError: See contract.Engine.
        """
        self._check_open()
        check_request(request, self.info, self._adapters, self._pool)
        matcher = None
        if request.grammar is not None:
            matcher = await asyncio.to_thread(self._grammars.compile, request.grammar)
        job = Job(request, Sampler(request, matcher))
        loop = asyncio.get_running_loop()
        queue = _EventQueue()
        timer = None
        if request.deadline is not None:
            left = max(request.deadline - time.monotonic(), 0)
            timer = loop.call_later(left, queue.put, deadline_error(request))
        self._submit(job, _Consumer(loop, queue))
        try:
            while True:
                batch = await queue.get()
                if isinstance(batch, HalfbyteError):
                    raise batch
                yield batch
                if isinstance(batch[-1], Ended):
                    return
        finally:
            if timer is not None:
                timer.cancel()
            if not job.is_finished:
                with self._changed:
                    self._send(lambda: self._drop(job))

    async def load_adapter(self, name: str, folder: str) -> None:
        """Load a PEFT adapter.

        Args:
            name: The adapter's name.
            folder: The adapter's folder; the caller has checked that it may be loaded.
        """

        def load() -> None:
            self._runner.load_adapter(name, folder)
            self._adapters = (*self._adapters, name)

        await self._run_on_worker(load)

    async def unload_adapter(self, name: str) -> None:
        """Unload an adapter after the requests that use it have finished.

        Args:
            name: The adapter's name; a ServeError of status 404 is raised if it is not loaded.
        """
        check_is_loaded(name, self._adapters)
        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            # New requests can no longer use it.
            self._adapters = tuple(other for other in self._adapters if other != name)
            self._send(lambda: self._unloading.update({name: done}))
        await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Accept no new requests, finish all others and free the memory."""
        with self._changed:
            was_closing, self._closing = self._closing, True
            self._changed.notify()
        await asyncio.to_thread(self._worker.join)
        if not was_closing:
            # Remaining references to this engine must not keep the model and its pages in memory,
            # nor must the reference cycle that the two are part of.
            del self._runner, self._pool, self._scheduler, self._steps
            await asyncio.to_thread(gc.collect)

    def _check_open(self) -> None:
        if self._closing:
            raise ServeError(
                "The server is shutting down. Try again in a moment.",
                status=503,
                kind="server_error",
                code="shutting_down",
                retry_after=5,
            )

    def _submit(self, job: Job, consumer: _Consumer) -> None:
        """Pass a request to the worker."""
        with self._changed:
            self._check_open()
            waiting = self._load.waiting + self._num_submitted
            if waiting > self._max_waiting:
                raise ServeError(
                    f"The server is full: {waiting} requests are queued, at most "
                    f"{self._max_waiting} are allowed. Try again later.",
                    status=429,
                    kind="rate_limit_error",
                    code="queue_full",
                    retry_after=self._estimate_wait(),
                )
            self._num_submitted += 1
            self._send(lambda: self._add(job, consumer))

    def _send(self, command: Callable[[], None]) -> None:
        """Queue a command for the worker's next iteration; the caller holds the lock."""
        self._commands.append(command)
        self._changed.notify()

    async def _run_on_worker(self, command: Callable[[], None]) -> None:
        """Run a command on the worker and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # noqa: BLE001 - raised again in the waiting task
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            self._check_open()
            self._send(run)
        await asyncio.wrap_future(done)

    def _estimate_wait(self) -> float:
        """Estimate the seconds until the current requests are done, between 1 and 60."""
        reserved = self._load.cache_used_bytes / max(self.info.bytes_per_token, 1)
        return min(max(reserved / max(self._steps.tokens_per_second, 1.0), 1.0), 60.0)

    # All methods below run on the worker thread.

    def _run(self) -> None:
        with torch.inference_mode():
            self._work()

    def _work(self) -> None:
        while True:
            if self._scheduler.is_idle:
                self._deliver_due()
            with self._changed:
                while not self._commands and self._scheduler.is_idle and not self._unloading:
                    if self._closing:
                        return
                    self._changed.wait()
                commands, self._commands, self._num_submitted = self._commands, [], 0
            self._steps.forget_step()
            try:
                for command in commands:
                    command()
                self._steps.step()
            except Exception:
                log.exception("A step of the engine failed; restarting the running requests")
                self._steps.recover()
            self._load = self._measure_load()
            self._unload_unused()

    def _add(self, job: Job, consumer: _Consumer) -> None:
        self._consumers[job] = consumer
        self._scheduler.add(job)

    def _drop(self, job: Job) -> None:
        """Remove a request whose consumer no longer waits."""
        self._scheduler.remove(job)
        self._consumers.pop(job, None)
        job.is_finished = True

    def _unload_unused(self) -> None:
        """Unload the adapters to unload that no request uses any more."""
        if not self._unloading:
            return
        used = {job.request.adapter for job in self._scheduler.jobs()}
        for name in [name for name in self._unloading if name not in used]:
            done = self._unloading.pop(name)
            try:
                self._runner.unload_adapter(name)
                self._pool.forget(name)
            except Exception as error:  # noqa: BLE001 - raised again in the waiting task
                done.set_exception(error)
            else:
                done.set_result(None)

    def _measure_load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            cache_used_bytes=self._pool.used * self._page_bytes,
            restarts=self._steps.restarts,
        )

    def _deliver_due(self) -> None:
        """Deliver the outboxes that are due, with one call per event loop."""
        due: dict[asyncio.AbstractEventLoop, list[tuple[_EventQueue, list[Any]]]]
        due = defaultdict(list)
        now = time.monotonic()
        for job in [job for job in self._consumers if job.outbox]:
            consumer = self._consumers[job]
            if not job.is_finished and now < consumer.next_delivery:
                continue
            due[consumer.loop].append((consumer.queue, job.outbox))
            consumer.next_delivery = now + self._piece_seconds
            job.outbox = []
            if job.is_finished:
                del self._consumers[job]
        for loop, outboxes in due.items():
            try:
                loop.call_soon_threadsafe(_deliver, outboxes)
            except RuntimeError:
                # The loop is closed, so none of its consumers waits any more.
                for job in [j for j, c in self._consumers.items() if c.loop is loop]:
                    self._drop(job)


def _deliver(outboxes: Sequence[tuple[_EventQueue, list[Any]]]) -> None:
    for queue, events in outboxes:
        if isinstance(events[-1], HalfbyteError):
            error = events.pop()
            if events:
                queue.put(events)
            queue.put(error)
        else:
            queue.put(events)
