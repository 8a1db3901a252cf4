"""Times of several functions that are fair to compare on a noisy machine."""

import time
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Ratio(NamedTuple):
    """The median of ratios within rounds, and the range of the middle 80 % of them."""

    median: float
    low: float
    high: float


def interleave(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int,
    before: Mapping[str, Callable[[], Any]] = types.MappingProxyType({}),
) -> dict[str, list[float]]:
    """Runs every function once in each round, and returns its seconds.

    A slow moment of the machine then hits neighbors alike. Each round starts with
    another function, so that none always follows the same other.

    Args:
      functions: what to time, already compiled; the time ends when results are ready.
      rounds: number of rounds.
      before: for some of the functions, what to do before each of their turns; it is
        not timed.
    """
    names = list(functions)
    for name in names:  # warm-up, not counted
        jax.block_until_ready(functions[name]())
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            jax.block_until_ready(before.get(name, lambda: None)())
            start = time.perf_counter()
            jax.block_until_ready(functions[name]())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def ratio(seconds: Sequence[float], reference: Sequence[float]) -> Ratio:
    """Compares two functions round by round.

    >>> from benchmarks.timing import ratio
    >>> print([round(x, 2) for x in ratio([2.0, 2.2, 3.0], [1.0, 1.0, 1.0])])
    [2.2, 2.04, 2.84]
    """
    ratios = np.divide(seconds, reference)
    return Ratio(*(float(q) for q in np.quantile(ratios, [0.5, 0.1, 0.9])))
