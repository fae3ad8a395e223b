from __future__ import annotations

import threading

import pytest

from halfbyte.convert.prefetch import prefetch


@pytest.mark.parametrize("number", [0, 1, 2, 7])
def test_results_come_in_order(number):
    assert list(prefetch(lambda item: item * 2, range(number))) == [2 * n for n in range(number)]


def test_at_most_two_results_are_prepared_ahead():
    started, both = [], threading.Barrier(3)

    def prepare(item):
        started.append(item)
        if item in (1, 2):
            both.wait(10)  # not passed unless both are being prepared at once
        return item

    results = prefetch(prepare, range(5))
    assert next(results) == 0
    both.wait(10)
    assert sorted(started) == [0, 1, 2]
    assert list(results) == [1, 2, 3, 4]


def test_error_is_raised_in_place_of_its_result():
    def prepare(item):
        if item == 1:
            raise ValueError("one")
        return item

    results = prefetch(prepare, range(3))
    assert next(results) == 0
    with pytest.raises(ValueError, match="one"):
        next(results)
