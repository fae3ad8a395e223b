import math
import statistics

import pytest

from halfbyte.evaluate.window_mean import WindowMean


def collect(pairs):
    mean = WindowMean()
    for total, count in pairs:
        mean.add(total, count)
    return mean


def test_mean_and_error_of_known_windows():
    mean = collect([(10.0, 10), (20.0, 10), (30.0, 10)])
    assert mean.mean == 2.0
    assert mean.standard_error == pytest.approx(1.0 / math.sqrt(3))
    assert (mean.num_windows, mean.num_tokens) == (3, 30)


def test_equal_windows_give_the_plain_standard_error():
    values = [0.3, 1.7, 2.2, -0.4, 5.0]
    mean = collect([(v * 7, 7) for v in values])
    assert mean.standard_error == pytest.approx(statistics.stdev(values) / math.sqrt(5))


def test_unequal_windows_weigh_by_their_tokens():
    mean = collect([(30.0, 10), (2.0, 2)])
    assert mean.mean == pytest.approx(32 / 12)
    spread = [30.0 - 10 * 32 / 12, 2.0 - 2 * 32 / 12]
    assert mean.standard_error == pytest.approx(math.sqrt(2 * sum(s * s for s in spread)) / 12)


def test_one_window_has_no_standard_error():
    assert collect([(10.0, 10)]).standard_error is None
