"""Confidence intervals of means over seeds."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether a difference is distinguishable from zero, and its sign."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"


def mean_interval(values: Sequence[float]) -> Interval:
    """Returns Student's interval for the mean of independent values.

    >>> from train.intervals import mean_interval
    >>> [round(x, 2) for x in mean_interval([1.0, 2.0, 0.0])]
    [1.0, -1.48, 3.48]

    Raises:
      ValueError: for fewer than two values.
    """
    from scipy import stats  # half a second, for runs of several seeds only

    n = len(values)
    if n < 2:
        raise ValueError(f"an interval needs two or more values, got {n}")
    error = float(np.std(values, ddof=1)) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1)) * error
    mean = float(np.mean(values))
    return Interval(mean, mean - reach, mean + reach)


def paired_interval(ours: Sequence[float], theirs: Sequence[float]) -> Interval:
    """Returns Student's interval for the mean of the differences ours - theirs.

    >>> from train.intervals import paired_interval
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
    return mean_interval(np.subtract(ours, theirs).tolist())
