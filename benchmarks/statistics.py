"""Summaries of paired runs."""

from collections.abc import Sequence

import numpy as np

from train.statistics import Interval, mean_interval


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Student's interval for the mean of the differences ours - theirs.

    >>> from benchmarks.statistics import paired_interval
    >>> interval = paired_interval([3.0, 5.0, 4.0], [2.0, 3.0, 4.0])
    >>> print([round(x, 2) for x in interval], interval.verdict)
    [1.0, -1.48, 3.48] no clear difference

    Raises:
      ValueError: for fewer than two pairs, or lists of different lengths.
    """
    if len(ours) != len(theirs) or len(ours) < 2:
        raise ValueError(
            f"two or more pairs are needed, got {len(ours)} and {len(theirs)} values"
        )
    return mean_interval(np.subtract(ours, theirs))
