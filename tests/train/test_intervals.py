import numpy as np
import pytest
from scipy import stats

from benchmarks.timing import interleave, ratio
from train.intervals import Interval, paired_interval


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_that_of_the_paired_t_test(n):
    ours, theirs = np.random.default_rng(n).normal(size=(2, n))
    interval = paired_interval(ours, theirs)
    reference = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    np.testing.assert_allclose(interval[1:], reference, rtol=1e-10)
    assert interval.mean == pytest.approx((ours - theirs).mean())


def test_equal_differences_give_a_point():
    interval = paired_interval([2.0, 3.0], [1.0, 2.0])
    assert interval == (1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [
        (Interval(1.0, 0.1, 1.9), "better"),
        (Interval(-1.0, -1.9, -0.1), "worse"),
        (Interval(1.0, -0.1, 2.1), "no clear difference"),
        (Interval(0.0, 0.0, 0.0), "no clear difference"),
    ],
)
def test_verdict_says_whether_zero_is_left_out(interval, verdict):
    assert interval.verdict == verdict


@pytest.mark.parametrize(("ours", "theirs"), [([1.0], [2.0]), ([1.0, 2.0], [1.0])])
def test_too_few_pairs_are_refused(ours, theirs):
    with pytest.raises(ValueError, match="two or more pairs"):
        paired_interval(ours, theirs)


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
