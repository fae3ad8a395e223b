"""One step of the engine after the other: what runs, what is drawn of it, who is to blame.

::

    admit ─> plan ─> run ─> rate prompts, draw tokens ─> each job's outbox
    a step fails ──> all that ran is read again from its tokens, those of that step one at a time;
                     who fails alone, where nobody's token does not, is to blame

No thread and no event loop is known here; whoever owns the steps calls them one after the other.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.serve.engine.contract import Ended, Generated, Prompted
from halfbyte.serve.engine.failures import engine_failed, not_finite
from halfbyte.serve.engine.job import MOST_FAILURES, Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Piece, Runner
from halfbyte.serve.engine.scheduler import Scheduler
from halfbyte.serve.engine.token_logprobs import Rater, Rating

log = logging.getLogger(__name__)

RATED_ROWS = 16
"""Of a prompt, at a time."""

MOST_CONTROLS = 6
"""Times in a row that nothing runs at all, until those that wait are told so: 1.5 seconds."""
FIRST_PAUSE = 0.05
"""Seconds after the first of them; then twice as long each time."""

RATE_MEMORY = 0.9
"""How much of the measured speed each step leaves."""


class Steps:
    """Model, pages and scheduler of one engine, a step at a time."""

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        scheduler: Scheduler,
        *,
        ends: frozenset[int],
        before_run: Callable[[], None],
    ) -> None:
        """Start with nothing to do.

        Args:
            runner: Its pages are made.
            pool: As many pages as the runner has.
            scheduler: Over that pool.
            ends: The model's end-of-text tokens.
            before_run: Called when a step has been planned, before the model runs.
        """
        self.scheduler = scheduler
        self.restarts = 0
        """Steps that failed."""
        self.tokens_per_second = 0.0
        self._runner = runner
        self._pool = pool
        self._ends = ends
        self._before_run = before_run
        self._rater = Rater()
        self._in_step: list[Job] = []
        self._failed_controls = 0
        """In a row; see _judge."""

    def forget_step(self) -> None:
        """Note that what fails from now on is not the last step's fault."""
        self._in_step = []

    def step(self) -> None:
        """Run what is next, once, and draw a token for every answer in it."""
        self.scheduler.admit()
        work = self.scheduler.plan()
        # Only now, with the model about to run outside of Python: both threads share Python's lock,
        # and the next step would wait for what becomes of the last one's tokens.
        self._before_run()
        if not work:
            return
        self._in_step = [job for job, _ in work]
        start = time.perf_counter()
        results = self._runner.run([piece for _, piece in work])
        self._failed_controls = 0
        newest = []
        for (job, piece), logits in zip(work, results, strict=True):
            self.scheduler.note_computed(job, len(piece.tokens))
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
        self.scheduler.remove(job)
        job.outbox.append(event)
        job.is_over = True

    def _fail(self, job: Job, error: HalfbyteError) -> None:
        self._end(job, error)

    def recover(self) -> None:
        """Begin again with everything that ran; find out who is to blame, one at a time."""
        self.restarts += 1
        for job in self._in_step:
            job.is_suspect = True
        for job in self.scheduler.repeat_all():
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

    def _measure_rate(self, tokens: int, seconds: float) -> None:
        if tokens:
            now = tokens / max(seconds, 1e-6)
            self.tokens_per_second += (1 - RATE_MEMORY) * (now - self.tokens_per_second)
