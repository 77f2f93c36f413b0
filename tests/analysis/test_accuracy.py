"""Wilson's interval against published values and its equation."""

import math

import pytest

from maetok.analysis import Accuracy


@pytest.mark.parametrize(("correct", "count", "low", "high"), [
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
])  # fmt: skip
def test_interval_is_that_of_newcombe_1998_table_1(correct: int, count: int, low: float, high: float) -> None:
    accuracy = Accuracy.of(correct, count)
    assert (round(accuracy.low, 4), round(accuracy.high, 4)) == (low, high)
    mirrored = Accuracy.of(count - correct, count)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - accuracy.high, 1 - accuracy.low), abs=1e-12)


@pytest.mark.parametrize(("correct", "count"), [(1, 2), (7, 10), (991, 1000), (5, 5)])
def test_bounds_are_the_shares_that_the_normal_test_just_does_not_reject(correct: int, count: int) -> None:
    accuracy = Accuracy.of(correct, count)
    assert (accuracy.value, accuracy.count) == (correct / count, count)
    for bound in (accuracy.low, accuracy.high):
        deviation = 1.959963984540054 * math.sqrt(bound * (1 - bound) / count)
        assert abs(accuracy.value - bound) == pytest.approx(deviation, abs=1e-9)


@pytest.mark.parametrize(("correct", "count"), [(-1, 4), (5, 4), (0, 0)])
def test_impossible_counts_are_refused(correct: int, count: int) -> None:
    with pytest.raises(ValueError, match="0 <= correct <= count and count >= 1"):
        Accuracy.of(correct, count)
