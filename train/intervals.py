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
