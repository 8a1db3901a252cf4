"""How long a study will take, and what fits into a time.

>>> cost = Cost(start=1.0, step=0.1, evaluation=1.0, steps_per_epoch=20)
>>> cost.seconds(epochs=3)
10.0
>>> choose([cost, cost], budget=110.0, spent=10.0, most_epochs=3, most_seeds=20)
Choice(epochs=3, seeds=5, share=1.0)
>>> choose([cost, cost], budget=40.0, spent=10.0, most_epochs=3, most_seeds=20)
Choice(epochs=1, seeds=3, share=1.0)
>>> choose([cost, cost], budget=22.0, spent=10.0, most_epochs=3, most_seeds=20)
Choice(epochs=1, seeds=2, share=0.5)
"""

import dataclasses
import math
import re
import time
from collections.abc import Sequence
from typing import NamedTuple

import jax

from train.errors import UsageError, see
from train.program import Program

# Fewer seeds than these are trained only if not even one epoch of them fits.
_ENOUGH_SEEDS = 3
LEAST_SEEDS = 2
# An epoch has so many steps at least if examples or batch size are chosen.
LEAST_STEPS = 10
# The steps of a program are timed for so long, but at least three of them.
_TIMED_SECONDS = 0.1
_TIMED_STEPS = 3

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def parse_duration(text: str) -> float:
    """Returns the seconds of a time such as 90s, 30m or 1.5h.

    Raises:
      UsageError: if it is no time above zero with a unit.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh])", text.strip())
    if match is None or float(match[1]) == 0:
        raise UsageError(
            f"budget must be a time above 0 with a unit, as 90s, 30m or 1.5h, got "
            f"{text!r}"
        )
    return float(match[1]) * _UNITS[match[2]]


def in_words(seconds: float) -> str:
    """Writes a time.

    >>> in_words(7.4), in_words(90), in_words(660), in_words(9000)
    ('7 s', '1.5 min', '11 min', '2.5 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"
    return f"{seconds / 3600:.1f} h"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """What the runs of one method cost, in seconds.

    Attributes:
      start: time to make the first state.
      step: time of a training step.
      evaluation: time of evaluations in an epoch, on average.
      steps_per_epoch: number of steps in an epoch.
      epochs_factor: factor of the method on the epochs of the study.
    """

    start: float
    step: float
    evaluation: float
    steps_per_epoch: int
    epochs_factor: int = 1

    def seconds(self, epochs: int) -> float:
        """Returns the time of one run."""
        epoch = self.steps_per_epoch * self.step + self.evaluation
        return self.start + epochs * self.epochs_factor * epoch


def measure(program: Program, epochs_factor: int) -> Cost:
    """Times the start, some steps and an evaluation of a compiled program.

    Args:
      program: the program. What starts share must have been compiled by one before.
      epochs_factor: factor on the epochs of the study.
    """
    start = time.perf_counter()
    state = jax.block_until_ready(program.init_state(0))
    started = time.perf_counter() - start
    feeds = program.feeds(0)
    try:
        state = program.train_step(state, next(feeds))
        jax.block_until_ready(state.step)
        start, count = time.perf_counter(), 0
        while count < _TIMED_STEPS or time.perf_counter() - start < _TIMED_SECONDS:
            state = program.train_step(state, next(feeds))
            jax.block_until_ready(state.step)
            count += 1
        step = (time.perf_counter() - start) / count
    finally:
        feeds.close()
    program.evaluate(state)  # compiles
    start = time.perf_counter()
    program.evaluate(state)
    return Cost(
        start=started,
        step=step,
        evaluation=(time.perf_counter() - start) / program.config.eval_every,
        steps_per_epoch=program.steps_before(1),
        epochs_factor=epochs_factor,
    )


class Choice(NamedTuple):
    """What fits into a budget.

    Attributes:
      epochs: passes over the training examples.
      seeds: number of seeds.
      share: share of the training examples.
    """

    epochs: int
    seeds: int
    share: float


def choose(
    costs: Sequence[Cost],
    *,
    budget: float,
    spent: float,
    most_epochs: int,
    most_seeds: int,
) -> Choice:
    """Returns the epochs, the seeds and the examples that fit into a budget.

    All epochs are kept as long as three seeds fit, and as many seeds as fit are taken.
    If three do not fit, the epochs are cut for three seeds, and if one epoch of them
    does not fit, for two. If that does not fit either, the training examples are halved
    until it does, as long as an epoch has ten steps.

    Args:
      costs: the cost of each method.
      budget: the time for all, in seconds.
      spent: what is needed for all but training, in seconds.
      most_epochs: the epochs that are wanted.
      most_seeds: the largest number of seeds.

    Raises:
      UsageError: if one epoch and two seeds of every method do not fit, with as few
        examples as may be.
    """

    def fitting_seeds(costs: Sequence[Cost], epochs: int) -> int:
        return min(most_seeds, math.floor((budget - spent) / _round(costs, epochs)))

    share, shared = 1.0, costs
    while True:
        for least in (min(_ENOUGH_SEEDS, most_seeds), LEAST_SEEDS):
            for epochs in range(most_epochs, 0, -1):
                if (seeds := fitting_seeds(shared, epochs)) >= least:
                    return Choice(epochs, seeds, share)
        fewer = [
            dataclasses.replace(cost, steps_per_epoch=cost.steps_per_epoch // 2)
            for cost in shared
        ]
        if any(cost.steps_per_epoch < LEAST_STEPS for cost in fewer):
            break
        share, shared = share / 2, fewer
    needed = LEAST_SEEDS * _round(shared, 1)
    raise UsageError(
        f"a budget of {in_words(budget)} is too small: one epoch and {LEAST_SEEDS} "
        f"seeds of {len(costs)} methods take about {in_words(needed)} to train, and "
        f"{in_words(spent)} to load, compile and draw; give it more time, or take "
        "fewer techniques, smaller images or a smaller network" + see("compare.md#time")
    )


def _round(costs: Sequence[Cost], epochs: int) -> float:
    """Returns the time of one run of each method."""
    return sum(cost.seconds(epochs) for cost in costs)
