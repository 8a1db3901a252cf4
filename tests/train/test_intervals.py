import numpy as np
import pytest
from scipy import stats

from benchmarks.timing import interleave, ratio
from train.intervals import mean_interval


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_that_of_the_t_test(n):
    values = np.random.default_rng(n).normal(size=n)
    interval = mean_interval(values.tolist())
    reference = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    np.testing.assert_allclose(interval[1:], reference, rtol=1e-10)
    assert interval.mean == pytest.approx(values.mean())


def test_equal_values_give_a_point():
    assert mean_interval([1.0, 1.0]) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [1.0]])
def test_too_few_values_are_refused(values):
    with pytest.raises(ValueError, match="two or more values, got"):
        mean_interval(values)


def test_rounds_start_with_another_function_each():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(functions, rounds=3)
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"  # the first is not counted
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys(
        "abc", 3
    )
    assert all(t > 0 for times in seconds.values() for t in times)


def test_ratio_is_taken_within_rounds():
    # Twice as slow in every round, however the machine's speed moves.
    machine = np.array([1.0, 10.0, 3.0])
    assert ratio(2 * machine, machine) == pytest.approx((2.0, 2.0, 2.0))
