"""Summaries of paired runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class Interval(NamedTuple):
    """A mean with its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """Whether the interval leaves zero out, and on which side."""
        if self.low > 0:
            return "better"
        return "worse" if self.high < 0 else "no clear difference"


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
    differences = np.subtract(ours, theirs)
    n = len(differences)
    error = differences.std(ddof=1) / math.sqrt(n)
    reach = float(stats.t.ppf(0.975, n - 1) * error)
    mean = float(differences.mean())
    return Interval(mean, mean - reach, mean + reach)
