"""Run the engine's steps, and find the request that makes a step fail.

::

    admit ─> plan ─> run ─> score prompts, draw tokens ─> each job's outbox
    a step fails ──> all running requests are recomputed, those of that step one at a time;
                     a request that fails alone, while a probe token runs, is the cause

This module knows no threads and no event loops; its owner calls it sequentially.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor

from halfbyte.errors import HalfbyteError
from halfbyte.serve.engine.contract import Ended, Generated, Prefilled
from halfbyte.serve.engine.failures import engine_error, non_finite_error
from halfbyte.serve.engine.job import MAX_FAILURES, Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.runner import Piece, Runner
from halfbyte.serve.engine.scheduler import Scheduler
from halfbyte.serve.engine.token_logprobs import LogitScorer, ScoredLogits

log = logging.getLogger(__name__)

SCORED_ROWS = 16
"""Rows of a prompt that are scored at a time."""

MAX_PROBE_FAILURES = 6
"""Consecutive failures of the probe, within 1.5 seconds, before requests get an error."""
FIRST_PAUSE_SECONDS = 0.05
"""Pause after the first failure of the probe; it doubles with each further one."""

RATE_DECAY = 0.9
"""Weight of the previous average in the moving average of the speed."""


class Steps:
    """Runs one engine's model, step by step."""

    def __init__(
        self,
        runner: Runner,
        pool: PagePool,
        scheduler: Scheduler,
        *,
        ends: frozenset[int],
        before_run: Callable[[], None],
    ) -> None:
        """Start without requests.

        Args:
            runner: Computes the model; its pages are allocated.
            pool: Manages the runner's pages.
            scheduler: Schedules requests over that pool.
            ends: The model's end-of-text tokens.
            before_run: Called after a step is planned, before the model runs.
        """
        self.scheduler = scheduler
        self.restarts = 0
        """Number of failed steps."""
        self.tokens_per_second = 0.0
        self._runner = runner
        self._pool = pool
        self._ends = ends
        self._before_run = before_run
        self._scorer = LogitScorer()
        self._in_step: list[Job] = []
        self._probe_failures = 0
        """Consecutive failures of the probe; see _handle_lone_failure."""

    def forget_step(self) -> None:
        """Do not attribute further failures to the jobs of the last step."""
        self._in_step = []

    def step(self) -> None:
        """Run one step, and draw a token for every answer in it."""
        self.scheduler.admit()
        work = self.scheduler.plan()
        # Only now, when the model is about to run without the GIL: delivering the last step's
        # tokens earlier would wake the event loop's thread, which would delay this step.
        self._before_run()
        if not work:
            return
        self._in_step = [job for job, _ in work]
        start = time.perf_counter()
        results = self._runner.run([piece for _, piece in work])
        self._probe_failures = 0
        newest = []
        for (job, piece), logits in zip(work, results, strict=True):
            self.scheduler.mark_computed(job, len(piece.tokens))
            if job.scores_prompt:
                self._guard(job, partial(self._score_prompt, job, piece, logits))
            if job.num_computed == len(job.tokens) and not job.is_finished:
                self._finish_prefill(job)
                if not job.is_finished:
                    newest.append((job, logits[-1]))
        if newest:
            self._sample(newest)
        self._measure_rate(len(newest), time.perf_counter() - start)

    def _finish_prefill(self, job: Job) -> None:
        job.is_suspect = False
        if job.is_prefilled:
            return
        scored = tuple(job.scored_prompt) if job.request.prompt_logprobs is not None else None
        job.is_prefilled = True
        job.outbox.append(Prefilled(cached_tokens=job.cached_tokens or 0, scored_prompt=scored))
        if job.request.max_new_tokens == 0:
            self._end(job, Ended(reason="length"))

    def _score_prompt(self, job: Job, piece: Piece, logits: Tensor) -> None:
        """Score the prompt tokens that follow each token of a piece."""
        targets = job.tokens[piece.start + 1 : piece.start + len(piece.tokens) + 1]
        count = job.request.prompt_logprobs
        for first in range(0, len(targets), SCORED_ROWS):
            tokens = targets[first : first + SCORED_ROWS]
            scored = self._scorer.score(list(logits[first : first + len(tokens)]))
            if not all(scored.is_finite):
                raise non_finite_error(job)
            job.scored_prompt += [
                scored.score_token(row, token, count) for row, token in enumerate(tokens)
            ]

    def _sample(self, newest: Sequence[tuple[Job, Tensor]]) -> None:
        """Draw a token for each job from its newest logits."""
        scored = self._scorer.score([row for _, row in newest])
        for row, (job, _) in enumerate(newest):
            if scored.is_finite[row]:
                self._guard(job, partial(self._draw, job, scored, row))
            else:
                self._end(job, non_finite_error(job))

    def _draw(self, job: Job, scored: ScoredLogits, row: int) -> None:
        token = scored.argmax[row]
        if not job.sampler.is_greedy:
            token = job.sampler.draw(scored.logits[row], job.tokens)
        self._add_token(job, token, scored, row)

    def _add_token(self, job: Job, token: int, scored: ScoredLogits, row: int) -> None:
        request = job.request
        job.failures = 0
        if token in self._ends and not request.ignore_end:
            return self._end(job, Ended(reason="end"))
        if token in request.stop_tokens:
            return self._end(job, Ended(reason="stop_token", stop_token=token))
        job.tokens.append(token)
        job.sampler.add(token)
        scored_token = scored.score_token(row, token, request.top_logprobs)
        job.outbox.append(Generated(scored=scored_token, entropy=scored.entropies[row]))
        if job.sampler.matcher is not None and job.sampler.matcher.accept(token):
            return self._end(job, Ended(reason="grammar"))
        if job.num_new_tokens >= request.max_new_tokens:
            self._end(job, Ended(reason="length"))
        return None

    def _guard(self, job: Job, action: Callable[[], None]) -> None:
        """Run an action for one request; an error ends only this request."""
        try:
            action()
        except HalfbyteError as error:
            self._end(job, error)
        except Exception:
            log.exception("A request of %d tokens failed", len(job.tokens))
            self._end(job, engine_error("its next token could not be drawn", status=500))

    def _end(self, job: Job, event: Ended | HalfbyteError) -> None:
        self.scheduler.remove(job)
        job.outbox.append(event)
        job.is_finished = True

    def recover(self) -> None:
        """Restart all running requests after a failed step; those of the step become suspects."""
        self.restarts += 1
        for job in self._in_step:
            job.is_suspect = True
        for job in self.scheduler.requeue_running():
            job.restart()
        if len(self._in_step) == 1 and not self._in_step[0].is_finished:
            self._handle_lone_failure(self._in_step[0])

    def _handle_lone_failure(self, job: Job) -> None:
        """End a request that failed alone repeatedly, unless the engine itself does not work."""
        if self._can_run_probe():
            self._probe_failures = 0
            job.failures += 1
            if job.failures >= MAX_FAILURES:
                self._end(job, engine_error(f"it failed {job.failures} times alone"))
            return
        self._probe_failures += 1
        if self._probe_failures < MAX_PROBE_FAILURES:
            # A temporary shortage, such as of memory, may pass.
            time.sleep(FIRST_PAUSE_SECONDS * 2 ** (self._probe_failures - 1))
        else:
            self._end(job, engine_error("the engine cannot run any request at the moment"))

    def _can_run_probe(self) -> bool:
        """Return whether the model can run a token that belongs to no request."""
        reservation = self._pool.reserve([0], 1, share=False)
        assert reservation is not None  # after a failure nothing else is reserved
        piece = Piece(tokens=[0], start=0, pages=reservation.pages, logits=1, is_prompt=True)
        try:
            self._runner.run([piece])
        except Exception:
            log.exception("The engine fails without any request too")
            return False
        finally:
            self._pool.release(reservation)
        return True

    def _measure_rate(self, tokens: int, seconds: float) -> None:
        if tokens:
            rate = tokens / max(seconds, 1e-6)
            self.tokens_per_second += (1 - RATE_DECAY) * (rate - self.tokens_per_second)
