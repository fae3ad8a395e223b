"""The embedded engine: one thread that owns the model, and asyncio around it.

::

    generate() ──checked──> inbox ──> worker: admit ─> plan ─> run ─> sample ─> mail ──> generate()
    mail goes out when the next step has been planned, or there is none
    closing the iterator ──> inbox: cancelled, its pages free before the next step
    a step fails ──> everything that ran is read again from its tokens; who fails alone is to blame

The worker alone touches model, pages and scheduler, so none of them needs a lock.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from halfbyte.errors import HalfbyteError, ServeError
from halfbyte.serve.engine.checks import check_request
from halfbyte.serve.engine.contract import (
    Ended,
    EngineInfo,
    EngineLoad,
    Generated,
    Prompted,
    TokenEvent,
    TokenRequest,
)
from halfbyte.serve.engine.failures import engine_failed, late, not_finite
from halfbyte.serve.engine.grammar import Grammars
from halfbyte.serve.engine.job import MOST_FAILURES, Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.rating import Rater, Rating
from halfbyte.serve.engine.runner import Piece, Runner
from halfbyte.serve.engine.sampler import Sampler
from halfbyte.serve.engine.scheduler import Scheduler

log = logging.getLogger(__name__)

Mail = asyncio.Queue[TokenEvent | HalfbyteError]

RATED_ROWS = 16
"""Of a prompt, at a time."""

MOST_CONTROLS = 6
"""Times in a row that nothing runs at all, until those that wait are told so: 1.5 seconds."""
FIRST_PAUSE = 0.05
"""Seconds after the first of them; then twice as long each time."""

RATE_MEMORY = 0.9
"""How much of the measured speed each step leaves."""


@dataclass(frozen=True, slots=True)
class _Address:
    loop: asyncio.AbstractEventLoop
    mail: Mail


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
        """
        self.info = info
        self._runner = runner
        self._pool = pool
        self._ends = ends
        self._grammars = grammars
        self._queue = queue
        self._scheduler = Scheduler(pool, sequences=sequences, step_tokens=step_tokens)
        self._page_bytes = pool.page_tokens * info.bytes_per_token
        self._addresses: dict[Job, _Address] = {}
        self._adapters: tuple[str, ...] = ()
        self._leaving: dict[str, Future[None]] = {}
        self._changed = threading.Condition()
        self._inbox: list[Callable[[], None]] = []
        self._arriving = 0
        self._closing = False
        self._restarts = 0
        self._failed_controls = 0
        """In a row; see _judge."""
        self._in_step: list[Job] = []
        self._tokens_per_second = 0.0
        self._rater = Rater()
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

    async def generate(self, request: TokenRequest) -> AsyncGenerator[TokenEvent, None]:
        """Generate; see contract.Engine.

        Args:
            request: What is wanted.

        Yields:
            Prompted, Generated for each token, Ended.

        Raises:
            ServeError: As the contract says.
        """
        check_request(request, self.info, self._adapters, self._pool)
        matcher = None
        if request.grammar is not None:
            matcher = await asyncio.to_thread(self._grammars.compile, request.grammar)
        job = Job(request, Sampler(request, matcher))
        loop = asyncio.get_running_loop()
        mail: Mail = asyncio.Queue()
        timer = None
        if request.deadline is not None:
            left = max(request.deadline - time.monotonic(), 0)
            timer = loop.call_later(left, mail.put_nowait, late(request))
        self._submit(job, _Address(loop, mail))
        try:
            while True:
                event = await mail.get()
                if isinstance(event, HalfbyteError):
                    raise event
                yield event
                if isinstance(event, Ended):
                    return
        finally:
            if timer is not None:
                timer.cancel()
            if not job.is_over:
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
            name: Of it.

        Raises:
            ServeError: 404: there is none of that name.
        """
        if name not in self._adapters:
            raise ServeError(
                f"There is no adapter {name}; loaded are: {', '.join(self._adapters) or 'none'}.",
                status=404,
                code="model_not_found",
                param="model",
            )
        # Nobody new from now on.
        self._adapters = tuple(other for other in self._adapters if other != name)
        done: Future[None] = Future()
        self._send(lambda: self._leaving.update({name: done}))
        await asyncio.wrap_future(done)

    async def close(self) -> None:
        """Take nothing new, finish what runs and waits, and free everything."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        await asyncio.to_thread(self._worker.join)

    def _submit(self, job: Job, address: _Address) -> None:
        """Hand a request to the worker."""
        with self._changed:
            if self._closing:
                raise ServeError(
                    "The server is shutting down. Try again in a moment.",
                    status=503,
                    kind="server_error",
                    code="shutting_down",
                    retry_after=5,
                )
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
            self._inbox.append(lambda: self._take(job, address))
            self._changed.notify()

    def _send(self, command: Callable[[], None]) -> None:
        """Let the worker do something before its next step."""
        with self._changed:
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

        self._send(run)
        await asyncio.wrap_future(done)

    def _estimate_wait(self) -> float:
        """Give the seconds until what is here now may be done, between 1 and 60."""
        reserved = self._load.cache_used_bytes / max(self.info.bytes_per_token, 1)
        return min(max(reserved / max(self._tokens_per_second, 1.0), 1.0), 60.0)

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
            self._in_step = []
            try:
                for command in inbox:
                    command()
                self._step()
            except Exception:
                log.exception("A step of the engine failed; it goes on with what it was doing")
                self._recover()
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

    def _step(self) -> None:
        self._scheduler.admit()
        work = self._scheduler.plan()
        # Only now, with the model about to run outside of Python: both threads share Python's lock,
        # and the next step would wait for what becomes of the last one's tokens.
        self._post()
        if not work:
            return
        self._in_step = [job for job, _ in work]
        start = time.perf_counter()
        results = self._runner.run([piece for _, piece in work])
        self._failed_controls = 0
        newest = []
        for (job, piece), logits in zip(work, results, strict=True):
            self._scheduler.note_computed(job, len(piece.tokens))
            if job.rates_prompt:
                self._guard(job, partial(self._note_prompt, job, piece, logits))
            if job.computed == len(job.tokens) and not job.is_over:
                self._finish_prompt(job)
                if not job.is_over:
                    newest.append((job, logits[-1]))
        if newest:
            self._sample(newest)
        self._measure_rate(len(newest), time.perf_counter() - start)

    def _finish_prompt(self, job: Job) -> None:
        job.is_suspect = False
        if job.is_prompted:
            return
        rated = tuple(job.rated) if job.request.prompt_logprobs is not None else None
        job.is_prompted = True
        job.outbox.append(Prompted(cached_tokens=job.cached_tokens or 0, rated=rated))
        if job.request.max_new_tokens == 0:
            self._end(job, Ended(reason="length"))

    def _note_prompt(self, job: Job, piece: Piece, logits: Tensor) -> None:
        """Rate the prompt's tokens that a piece's logits foretell."""
        known = job.tokens[piece.start + 1 : piece.start + len(piece.tokens) + 1]
        for first in range(0, len(known), RATED_ROWS):
            tokens = known[first : first + RATED_ROWS]
            rating = self._rater.rate(list(logits[first : first + len(tokens)]))
            if not all(rating.is_finite):
                raise not_finite(job)
            count = job.request.prompt_logprobs
            job.rated += [rating.rate_token(row, token, count) for row, token in enumerate(tokens)]

    def _sample(self, newest: Sequence[tuple[Job, Tensor]]) -> None:
        """Draw a token for each of them."""
        rating = self._rater.rate([row for _, row in newest])
        for row, (job, _) in enumerate(newest):
            if rating.is_finite[row]:
                self._guard(job, partial(self._draw, job, rating, row))
            else:
                self._fail(job, not_finite(job))

    def _draw(self, job: Job, rating: Rating, row: int) -> None:
        token = rating.likeliest[row]
        if not job.sampler.is_greedy:
            token = job.sampler.draw(rating.logits[row], job.tokens)
        self._note_token(job, token, rating, row)

    def _note_token(self, job: Job, token: int, rating: Rating, row: int) -> None:
        request = job.request
        job.failures = 0
        if token in self._ends and not request.ignore_end:
            return self._end(job, Ended(reason="end"))
        if token in request.stop_tokens:
            return self._end(job, Ended(reason="stop_token", stop_token=token))
        job.tokens.append(token)
        job.sampler.note(token)
        rated = rating.rate_token(row, token, request.top_logprobs)
        job.outbox.append(Generated(rated=rated, entropy=rating.entropies[row]))
        if job.sampler.matcher is not None and job.sampler.matcher.accept(token):
            return self._end(job, Ended(reason="grammar"))
        if job.new_tokens >= request.max_new_tokens:
            self._end(job, Ended(reason="length"))
        return None

    def _guard(self, job: Job, action: Callable[[], None]) -> None:
        """Do something for one request; what goes wrong is its own failure."""
        try:
            action()
        except HalfbyteError as error:
            self._fail(job, error)
        except Exception:
            log.exception("A request of %d tokens failed", len(job.tokens))
            self._fail(job, engine_failed("its next token could not be chosen", status=500))

    def _end(self, job: Job, event: Ended | HalfbyteError) -> None:
        self._scheduler.remove(job)
        job.outbox.append(event)
        job.is_over = True

    def _fail(self, job: Job, error: HalfbyteError) -> None:
        self._end(job, error)

    def _recover(self) -> None:
        """Begin again with everything that ran; find out who is to blame, one at a time."""
        self._restarts += 1
        for job in self._in_step:
            job.is_suspect = True
        for job in self._scheduler.repeat_all():
            job.begin_again()
        if len(self._in_step) == 1 and not self._in_step[0].is_over:
            self._judge(self._in_step[0])

    def _judge(self, job: Job) -> None:
        """Refuse a request that failed alone again and again, unless the engine is to blame."""
        if self._runs_without():
            self._failed_controls = 0
            job.failures += 1
            if job.failures >= MOST_FAILURES:
                self._fail(job, engine_failed(f"it failed {job.failures} times alone"))
            return
        self._failed_controls += 1
        if self._failed_controls < MOST_CONTROLS:
            # What is short for a moment, such as memory, is there again in another.
            time.sleep(FIRST_PAUSE * 2 ** (self._failed_controls - 1))
        else:
            self._fail(job, engine_failed("nothing runs at the moment"))

    def _runs_without(self) -> bool:
        """Run a token that is nobody's; tell whether the model still can."""
        reservation = self._pool.reserve([0], 1, share=False)
        assert reservation is not None  # after a failure nothing else is reserved
        piece = Piece(tokens=[0], start=0, pages=reservation.pages, logits=1, is_prompt=True)
        try:
            self._runner.run([piece])
        except Exception:
            log.exception("The engine fails without any request as well")
            return False
        finally:
            self._pool.release(reservation)
        return True

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

    def _measure_rate(self, tokens: int, seconds: float) -> None:
        if tokens:
            now = tokens / max(seconds, 1e-6)
            self._tokens_per_second += (1 - RATE_MEMORY) * (now - self._tokens_per_second)

    def _measure_load(self) -> EngineLoad:
        return EngineLoad(
            running=len(self._scheduler.running),
            waiting=self._scheduler.waiting,
            cache_used_bytes=self._pool.used * self._page_bytes,
            prefix_queries=self._pool.queries,
            prefix_hits=self._pool.hits,
            restarts=self._restarts,
        )

    def _post(self) -> None:
        """Send what there is for each event loop, in one call."""
        batches: dict[asyncio.AbstractEventLoop, list[tuple[Mail, list[Any]]]] = defaultdict(list)
        for job in [job for job in self._addresses if job.outbox]:
            address = self._addresses[job]
            batches[address.loop].append((address.mail, job.outbox))
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


def _deliver(batch: Sequence[tuple[Mail, list[Any]]]) -> None:
    for mail, events in batch:
        for event in events:
            mail.put_nowait(event)
