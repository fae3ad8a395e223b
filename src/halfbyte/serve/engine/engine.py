"""The embedded engine: one thread that owns the model, and asyncio around it.

::

    generate() ──checked──> inbox ──> worker: Steps.step ─> outboxes ─> mail ──> generate()
    mail goes out when the next step has been planned, or there is none; to each answer not more
    often than every piece_seconds
    closing the iterator ──> inbox: cancelled, its pages free before the next step

The worker alone touches steps, pages and scheduler, so none of them needs a lock.
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
from halfbyte.serve.engine.failures import late
from halfbyte.serve.engine.grammar import Grammars
from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Runner
from halfbyte.serve.engine.sampler import Sampler
from halfbyte.serve.engine.scheduler import Scheduler
from halfbyte.serve.engine.steps import Steps

log = logging.getLogger(__name__)

Letter = Sequence[TokenEvent] | HalfbyteError


class _Mail:
    """Letters on their way to the one task that waits for them; used in its event loop alone.

    Less than an :class:`asyncio.Queue`, because each piece of each answer passes through it.
    """

    __slots__ = ("_letters", "_waiter")

    def __init__(self) -> None:
        self._letters: deque[Letter] = deque()
        self._waiter: asyncio.Future[None] | None = None

    def put(self, letter: Letter) -> None:
        """Put a letter in."""
        self._letters.append(letter)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Letter:
        """Take the oldest letter; wait for one."""
        while not self._letters:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        return self._letters.popleft()


@dataclass(slots=True)
class _Address:
    loop: asyncio.AbstractEventLoop
    mail: _Mail
    due: float = 0.0
    """From when on the next piece may go there; seconds of :func:`time.monotonic`."""


class EmbeddedEngine:
    """Many requests through one model in this process; behind contract.Engine."""

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        info: EngineInfo,
        *,
        ends: frozenset[int],
        grammars: Grammars,
        sequences: int,
        step_tokens: int,
        queue: int,
        piece_seconds: float = 0.0,
    ) -> None:
        """Start the worker.

        Args:
            runner: Its pages are made.
            pool: As many pages as the runner has.
            info: What is told of it.
            ends: The model's end-of-text tokens.
            grammars: Compiles them for the model's tokenizer.
            sequences: Requests that run at the same time, at most.
            step_tokens: Tokens that go through the model at once, at most.
            queue: Requests that may wait.
            piece_seconds: Between two pieces of an answer, at least; tokens that come faster are
                given together.
        """
        self.info = info
        self._runner = runner
        self._pool = pool
        self._grammars = grammars
        self._queue = queue
        self._piece_seconds = piece_seconds
        self._scheduler = Scheduler(pool, sequences=sequences, step_tokens=step_tokens)
        self._page_bytes = pool.page_tokens * info.bytes_per_token
        self._addresses: dict[Job, _Address] = {}
        self._adapters: tuple[str, ...] = ()
        self._leaving: dict[str, Future[None]] = {}
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._arriving = 0
        self._closing = False
        self._steps = Steps(
            runner, pool, self._scheduler, ends=ends, before_run=lambda: self._post()
        )
        self._load = self._measure_load()
        self._worker = threading.Thread(target=self._run, name="halfbyte-engine", daemon=True)
        self._worker.start()

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of those that are loaded."""
        return self._adapters

    def load(self) -> EngineLoad:
        """Tell how busy it is."""
        return self._load

    async def generate(self, request: TokenRequest) -> AsyncGenerator[Sequence[TokenEvent], None]:
        """Generate; see contract.Engine.

        Args:
            request: What is wanted.

        Yields:
            What there is: Prompted, Generated for each token, Ended.

        Raises:
            ServeError: As the contract says.
        """
        self._check_open()
        check_request(request, self.info, self._adapters, self._pool)
        matcher = None
        if request.grammar is not None:
            matcher = await asyncio.to_thread(self._grammars.compile, request.grammar)
        job = Job(request, Sampler(request, matcher))
        loop = asyncio.get_running_loop()
        mail = _Mail()
        timer = None
        if request.deadline is not None:
            left = max(request.deadline - time.monotonic(), 0)
            timer = loop.call_later(left, mail.put, late(request))
        self._submit(job, _Address(loop, mail))
        try:
            while True:
                found = await mail.get()
                if isinstance(found, HalfbyteError):
                    raise found
                yield found
                if isinstance(found[-1], Ended):
                    return
        finally:
            if timer is not None:
                timer.cancel()
            if not job.is_over:
                with self._changed:
                    self._send(lambda: self._drop(job))

    async def load_adapter(self, name: str, folder: str) -> None:
        """Make a PEFT adapter servable under a name.

        Args:
            name: Of it.
            folder: Of it; the caller has checked its place.
        """

        def do() -> None:
            self._runner.load_adapter(name, folder)
            self._adapters = (*self._adapters, name)

        await self._ask(do)

    async def unload_adapter(self, name: str) -> None:
        """Take an adapter away; requests that use it finish first.

        Args:
            name: Of it; a ServeError of 404 where there is none of that name.
        """
        check_is_loaded(name, self._adapters)
        done: Future[None] = Future()
        with self._changed:
            self._check_open()
            # Nobody new from now on.
            self._adapters = tuple(other for other in self._adapters if other != name)
            self._send(lambda: self._leaving.update({name: done}))
        await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Take nothing new, finish what runs and waits, and free everything."""
        with self._changed:
            was_closing, self._closing = self._closing, True
            self._changed.notify()
        await asyncio.to_thread(self._worker.join)
        if not was_closing:
            # Whoever still knows this engine must not keep the model and its pages in memory, nor
            # must the circle of references that the two are part of.
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

    def _submit(self, job: Job, address: _Address) -> None:
        """Hand a request to the worker."""
        with self._changed:
            self._check_open()
            waiting = self._load.waiting + self._arriving
            if waiting > self._queue:
                raise ServeError(
                    f"The server is full: {waiting} requests wait, {self._queue} are allowed. Try "
                    "again later.",
                    status=429,
                    kind="rate_limit_error",
                    code="queue_full",
                    retry_after=self._estimate_wait(),
                )
            self._arriving += 1
            self._send(lambda: self._take(job, address))

    def _send(self, command: Callable[[], None]) -> None:
        """Let the worker do something before its next step; the caller holds the lock."""
        self._inbox.append(command)
        self._changed.notify()

    async def _ask(self, command: Callable[[], None]) -> None:
        """Let the worker do something, and wait for it."""
        done: Future[None] = Future()

        def run() -> None:
            try:
                command()
            except Exception as error:  # noqa: BLE001 - it reaches whoever asked
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._changed:
            self._check_open()
            self._send(run)
        await asyncio.wrap_future(done)

    def _estimate_wait(self) -> float:
        """Give the seconds until what is here now may be done, between 1 and 60."""
        reserved = self._load.cache_used_bytes / max(self.info.bytes_per_token, 1)
        return min(max(reserved / max(self._steps.tokens_per_second, 1.0), 1.0), 60.0)

    # What follows runs on the worker.

    def _run(self) -> None:
        with torch.inference_mode():
            self._work()

    def _work(self) -> None:
        while True:
            if self._scheduler.is_idle:
                self._post()
            with self._changed:
                while not self._inbox and self._scheduler.is_idle and not self._leaving:
                    if self._closing:
                        return
                    self._changed.wait()
                inbox, self._inbox, self._arriving = self._inbox, [], 0
            self._steps.forget_step()
            try:
                for command in inbox:
                    command()
                self._steps.step()
            except Exception:
                log.exception("A step of the engine failed; it goes on with what it was doing")
                self._steps.recover()
            self._load = self._measure_load()
            self._let_leave()

    def _take(self, job: Job, address: _Address) -> None:
        self._addresses[job] = address
        self._scheduler.add(job)

    def _drop(self, job: Job) -> None:
        """Forget a request that nobody waits for any more."""
        self._scheduler.remove(job)
        self._addresses.pop(job, None)
        job.is_over = True

    def _let_leave(self) -> None:
        """Unload adapters that nobody uses any more."""
        if not self._leaving:
            return
        used = {job.request.adapter for job in self._scheduler.jobs()}
        for name in [name for name in self._leaving if name not in used]:
            done = self._leaving.pop(name)
            try:
                self._runner.unload_adapter(name)
                self._pool.forget(name)
            except Exception as error:  # noqa: BLE001 - it reaches whoever asked
                done.set_exception(error)
            else:
                done.set_result(None)

    def _measure_load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            cache_used_bytes=self._pool.used * self._page_bytes,
            prefix_queries=self._pool.queries,
            prefix_hits=self._pool.hits,
            restarts=self._steps.restarts,
        )

    def _post(self) -> None:
        """Send what is due for each event loop, in one call."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[_Mail, list[Any]]]] = defaultdict(list)
        now = time.monotonic()
        for job in [job for job in self._addresses if job.outbox]:
            address = self._addresses[job]
            if not job.is_over and now < address.due:
                continue
            batches[address.loop].append((address.mail, job.outbox))
            address.due = now + self._piece_seconds
            job.outbox = []
            if job.is_over:
                del self._addresses[job]
        for loop, batch in batches.items():
            try:
                loop.call_soon_threadsafe(_deliver, batch)
            except RuntimeError:
                # The loop is closed, and so is everybody who waited in it.
                for job in [j for j, a in self._addresses.items() if a.loop is loop]:
                    self._drop(job)


def _deliver(batch: Sequence[tuple[_Mail, list[Any]]]) -> None:
    for mail, events in batch:
        if isinstance(events[-1], HalfbyteError):
            error = events.pop()
            if events:
                mail.put(events)
            mail.put(error)
        else:
            mail.put(events)
