from __future__ import annotations

import threading

import pytest

from halfbyte.convert.ahead import run_ahead


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_results_come_in_order(number):
    assert list(run_ahead(lambda item: item * 2, range(number))) == [2 * n for n in range(number)]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_as_many_as_there_are_threads_are_prepared_at_once_and_no_more(threads):
    started, last = [], threading.Event()
    meet = threading.Barrier(threads)

    def prepare(item):
        started.append(item)
        if item == threads:
            last.set()
        if item < threads:
            meet.wait(10)  # broken, and so an error, where they do not run at the same time
        return item

    results = run_ahead(prepare, range(8), threads)
    assert next(results) == 0
    assert last.wait(10)
    assert sorted(started) == list(range(threads + 1))
    assert list(results) == [1, 2, 3, 4, 5, 6, 7]


def test_an_error_comes_out_where_its_result_was_due():
    def prepare(item):
        if item == 1:
            raise ValueError("one")
        return item

    results = run_ahead(prepare, range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
