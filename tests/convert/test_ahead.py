from __future__ import annotations

import threading

import pytest

from halfbyte.convert.ahead import run_ahead


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_results_come_in_order(number):
    assert list(run_ahead(lambda item: item * 2, range(number))) == [2 * n for n in range(number)]


def test_the_next_is_prepared_while_one_is_used_and_no_more():
    started, released = [], threading.Event()

    def prepare(item):
        started.append(item)
        if item == 1:
            released.set()
        return item

    results = run_ahead(prepare, range(5))
    assert next(results) == 0
    assert released.wait(10)
    assert started == [0, 1]
    assert list(results) == [1, 2, 3, 4]


def test_an_error_comes_out_where_its_result_was_due():
    def prepare(item):
        if item == 1:
            raise ValueError("one")
        return item

    results = run_ahead(prepare, range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
