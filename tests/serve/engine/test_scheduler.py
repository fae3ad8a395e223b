"""Fair queueing and batching, without a model."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from tests.serve.helpers_engine import ask

from halfbyte.serve.engine.job import Job
from halfbyte.serve.engine.page_pool import PagePool
from halfbyte.serve.engine.sampler import Sampler
from halfbyte.serve.engine.scheduler import Scheduler


def make(pages=100, max_sequences=4, max_batched_tokens=16, share=False):
    pool = PagePool(pages, 4, share=share)
    return Scheduler(pool, max_sequences=max_sequences, max_batched_tokens=max_batched_tokens)


def add(scheduler, key="", prompt=4, answer=4, first_token=0):
    request = replace(ask(range(first_token, first_token + prompt), answer), key=key)
    job = Job(request, Sampler(request))
    scheduler.add(job)
    return job


def run_step(scheduler):
    """Update the scheduler as a step does."""
    scheduler.admit()
    work = scheduler.plan()
    for job, piece in work:
        scheduler.mark_computed(job, len(piece.tokens))
        if job.num_computed == len(job.tokens):
            job.tokens.append(0)
            if len(job.tokens) == job.max_tokens:
                scheduler.remove(job)
    return work


def test_keys_get_equal_tokens_whatever_their_number_of_requests():
    scheduler = make(max_sequences=2)
    for _ in range(60):
        add(scheduler, "many", prompt=4, answer=4)
    for _ in range(20):
        add(scheduler, "few", prompt=8, answer=16)
    tokens = Counter()
    for _ in range(100):
        for job, piece in run_step(scheduler):
            tokens[job.request.key] += len(piece.tokens)
    assert abs(tokens["many"] - tokens["few"]) <= 0.15 * tokens["few"]


def test_new_key_gets_no_credit_for_the_past():
    scheduler = make(max_sequences=1)
    for _ in range(50):
        add(scheduler, "old")
    for _ in range(40):
        run_step(scheduler)
    for _ in range(10):
        add(scheduler, "new")
    order = []
    for _ in range(60):
        for job, _ in run_step(scheduler):
            if job not in order:
                order.append(job)
    keys = [job.request.key for job in order[1:9]]
    assert sorted(keys) == ["new"] * 4 + ["old"] * 4


def test_within_a_key_first_come_first_served():
    scheduler = make(max_sequences=1)
    jobs = [add(scheduler, "a") for _ in range(5)]
    order = []
    while not scheduler.is_idle:
        order += [job for job, _ in run_step(scheduler) if job not in order]
    assert order == jobs


def test_large_request_is_not_starved():
    scheduler = make(pages=10, max_sequences=8)
    small = [add(scheduler, prompt=4, answer=12) for _ in range(2)]
    scheduler.admit()
    large = add(scheduler, prompt=20, answer=12)
    late = add(scheduler, prompt=4, answer=4)
    scheduler.admit()
    assert scheduler.running == small
    scheduler.remove(small[0])
    scheduler.remove(small[1])
    scheduler.admit()
    assert scheduler.running == [large, late]


def test_decode_has_priority_and_prefill_is_chunked():
    scheduler = make(max_batched_tokens=10)
    answer = add(scheduler, prompt=2)
    run_step(scheduler)
    first, second = add(scheduler, prompt=25), add(scheduler, prompt=30)
    sizes = [[(job, len(piece.tokens)) for job, piece in run_step(scheduler)] for _ in range(3)]
    assert sizes[0] == [(answer, 1), (first, 9)]
    assert sizes[1] == [(answer, 1), (first, 9)]
    assert sizes[2] == [(answer, 1), (first, 7), (second, 2)]


def test_short_prompts_pass_a_long_one_which_still_gets_half_of_each_step():
    scheduler = make(max_batched_tokens=10)
    long = add(scheduler, prompt=40)
    assert [len(piece.tokens) for _, piece in run_step(scheduler)] == [10]
    shorts = [add(scheduler, prompt=4, answer=1) for _ in range(3)]
    sizes = [{job: len(piece.tokens) for job, piece in run_step(scheduler)} for _ in range(3)]
    assert sizes == [{shorts[0]: 4, shorts[1]: 1, long: 5}, {shorts[1]: 3, shorts[2]: 2, long: 5},
                     {shorts[2]: 2, long: 8}]  # fmt: skip
    while long.num_missing > 1:
        add(scheduler, prompt=4, answer=1)
        add(scheduler, prompt=4, answer=1)
        sizes.append({job: len(piece.tokens) for job, piece in run_step(scheduler)})
    assert [step[long] for step in sizes[3:]] == [5, 5, 2]


def test_only_a_request_whose_prefix_is_being_computed_lets_others_pass():
    scheduler = make(max_batched_tokens=8, share=True)
    long = add(scheduler, prompt=24)
    run_step(scheduler)
    same = add(scheduler, prompt=24)
    others = [add(scheduler, prompt=4, first_token=50) for _ in range(2)]
    scheduler.admit()
    assert scheduler.running == [long, *others]
    while long.num_missing > 1:
        run_step(scheduler)
    scheduler.admit()
    assert same in scheduler.running
    assert same.reservation.cached_tokens == 20


def test_a_prefix_is_shared_only_among_requests_of_one_key():
    scheduler = make(share=True)
    found = {}
    for number, key in enumerate(("ann", "bob", "ann")):
        job = add(scheduler, key, prompt=12)
        while not scheduler.is_idle:
            run_step(scheduler)
        found[number, key] = job.cached_tokens
    assert found == {(0, "ann"): 0, (1, "bob"): 0, (2, "ann"): 8}


def test_only_the_newest_token_has_logits_unless_the_prompt_is_scored():
    scheduler = make(max_batched_tokens=10)
    add(scheduler, prompt=12)
    request = replace(ask(range(12), 4), prompt_logprobs=0)
    scheduler.add(Job(request, Sampler(request)))
    (_, first), *_ = run_step(scheduler)
    assert (len(first.tokens), first.logits) == (10, 0)
    (_, rest), (_, rated) = run_step(scheduler)
    assert (len(rest.tokens), rest.logits) == (2, 1)
    assert (len(rated.tokens), rated.logits) == (8, 8)


def test_after_a_failure_suspects_run_alone_and_before_all_others():
    scheduler = make()
    jobs = [add(scheduler) for _ in range(3)]
    run_step(scheduler)
    for job in jobs[:2]:
        job.is_suspect = True
    for job in scheduler.requeue_running():
        job.restart()
    assert scheduler.pool.used == 0
    add(scheduler)
    scheduler.admit()
    assert scheduler.running[:3] == jobs
    assert [job for job, _ in scheduler.plan()] == [jobs[0]]
    (_, piece), *_ = scheduler.plan()
    assert (piece.is_prompt, len(piece.tokens), piece.logits) == (True, 4, 0)
    scheduler.mark_computed(jobs[0], 4)
    # What it had answered already is run as an answer.
    (_, piece), *_ = scheduler.plan()
    assert (piece.is_prompt, len(piece.tokens), piece.logits) == (False, 1, 1)
    jobs[0].is_suspect = False
    assert [job for job, _ in scheduler.plan()] == [jobs[1]]
    jobs[1].is_suspect = False
    assert len(scheduler.plan()) == 4


def test_removing_frees_pages_and_idle_keys():
    scheduler = make(max_sequences=1)
    running, waiting = add(scheduler, "a"), add(scheduler, "b")
    scheduler.admit()
    assert (scheduler.pool.used, scheduler.waiting) == (2, 1)
    scheduler.remove(waiting)
    scheduler.remove(running)
    assert (scheduler.pool.used, scheduler.waiting, scheduler.is_idle) == (0, 0, True)
    assert not scheduler._key_queues
