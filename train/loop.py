"""The training loop that all tasks share; it knows none of them.

Runs from several seeds are trained in groups: each call takes all of a group a step
further, and a group is one seed unless several are stacked in one state.
"""

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.program import STEPS_IN_FLIGHT, Program, of_each
from train.step import Record, TrainState, Tree


class NonFiniteLossError(ArithmeticError):
    """The loss stopped being a number."""

    def __init__(self, seed: int, step: int, epoch: int):
        super().__init__(
            f"the loss of seed {seed} is not finite at step {step} (epoch {epoch}): "
            "lower the learning rate, or clip the gradient"
        )
        self.step = step


class Report(NamedTuple):
    """Where runs stand, after some steps.

    Attributes:
      states: of each group; donated when the next report is asked for.
      steps: taken since the last report, over all groups.
      logs: a record of the last step for each seed of a group that is to be logged.
      epoch: a record for each seed, if an epoch has ended.
      totals: of the evaluation, for each seed, if there was one.
    """

    states: tuple[TrainState, ...]
    steps: int
    logs: list[Record]
    epoch: list[Record]
    totals: list[Tree]


def groups_of(program: Program, seeds: Sequence[int]) -> list[tuple[int, ...]]:
    """Seeds that are trained together."""
    width = program.width
    return [tuple(seeds[i : i + width]) for i in range(0, len(seeds), width)]


def fit(
    program: Program,
    seeds: Sequence[int],
    *,
    states: Sequence[TrainState] | None = None,
    finished_epochs: int = 0,
) -> Iterator[Report]:
    """Trains from some seeds, and reports after every few steps.

    Args:
      program: the compiled run.
      seeds: decide parameters, order of examples, augmentation and random tricks.
      states: of each group, to go on from; those before the first step if unset.
      finished_epochs: epochs whose records there are already.

    Raises:
      NonFiniteLossError: at the next logging after the loss became NaN or infinite.
    """
    config = program.config
    groups = groups_of(program, seeds)
    states = list(states or map(program.init, groups))
    taken = [int(np.ravel(jax.device_get(state.step))[0]) for state in states]
    flights = [1 for _ in groups]
    with contextlib.ExitStack() as stack:
        feeds = [
            stack.enter_context(contextlib.closing(program.feeds(group, step)))
            for group, step in zip(groups, taken, strict=True)
        ]
        for epoch in range(finished_epochs + 1, config.epochs + 1):
            first, end = map(program.steps_before, (epoch - 1, epoch))
            seconds = [0.0 for _ in groups]
            for i, group in enumerate(groups):
                if taken[i] == first:
                    states[i] = program.reset(states[i])
                while taken[i] < end:
                    to_log = config.log_every - taken[i] % config.log_every
                    steps = min(flights[i], to_log, end - taken[i])
                    start = time.perf_counter()
                    states[i] = _advance(program, states[i], feeds[i], steps)
                    elapsed = time.perf_counter() - start
                    seconds[i] += elapsed
                    taken[i] += steps
                    logs = []
                    if steps == to_log or taken[i] == end:
                        logs = _log_records(program, states[i], group, taken[i], epoch)
                    yield Report(tuple(states), steps * len(group), logs, [], [])
                    flights[i] = _next_flight(program, steps, elapsed)
            records, totals = _epoch_records(program, groups, states, seconds, epoch)
            yield Report(tuple(states), 0, [], records, totals)


def _advance(
    program: Program, state: TrainState, feeds: Iterator[Tree], steps: int
) -> TrainState:
    """Takes some steps and waits for them."""
    while steps:
        count = min(steps, program.steps_per_call)
        state = program.train(state, next(feeds), count)
        for _ in range(count - 1):
            next(feeds)  # the same for all steps of a call
        steps -= count
    jax.block_until_ready(state.step)
    return state


def _next_flight(program: Program, flight: int, seconds: float) -> int:
    """As many steps as take a second, so that progress is seen to move."""
    most = STEPS_IN_FLIGHT * program.steps_per_call
    steps = max(1, min(most, 2 * flight, int(flight / seconds)))
    # The clocks of processes differ, and all have to report after the same steps.
    return int(multihost_utils.broadcast_one_to_all(np.int32(steps)))


def _log_records(
    program: Program, state: TrainState, seeds: Sequence[int], step: int, epoch: int
) -> list[Record]:
    """What the last step says, for each seed."""
    logs = of_each(state.log, program.width)
    for seed, log in zip(seeds, logs, strict=True):
        if log.bad_step >= 0:
            raise NonFiniteLossError(seed, int(log.bad_step), epoch)
    return [
        {
            "seed": seed,
            "epoch": epoch,
            "step": step,
            **_learning_rates(program, step),
            **{f"train_{key}": float(value) for key, value in log.last.items()},
        }
        for seed, log in zip(seeds, logs, strict=True)
    ]


def _learning_rates(program: Program, step: int) -> Record:
    """Those of the step before."""
    rates = {name: float(f(step - 1)) for name, f in program.schedules.items()}
    if len(rates) == 1:
        return {"learning_rate": next(iter(rates.values()))}
    return {f"{name}_learning_rate": rate for name, rate in rates.items()}


def _epoch_records(
    program: Program,
    groups: Sequence[Sequence[int]],
    states: Sequence[TrainState],
    seconds: Sequence[float],
    epoch: int,
) -> tuple[list[Record], list[Tree]]:
    """Means of the epoch and scores of the evaluation, if it is time for one."""
    config = program.config
    evaluates = epoch % config.evaluate_every == 0 or epoch == config.epochs
    step, split_name = program.steps_before(epoch), config.data.evaluate_on
    records, all_totals = [], []
    for group, state, elapsed in zip(groups, states, seconds, strict=True):
        logs = of_each(state.log, program.width)
        totals = program.evaluate(state) if evaluates else []
        all_totals += totals
        for i, (seed, log) in enumerate(zip(group, logs, strict=True)):
            means = {key: total / log.steps for key, total in log.sums.items()}
            scores = program.task.scores(totals[i]) if evaluates else {}
            records.append(
                {
                    "seed": seed,
                    "epoch": epoch,
                    "step": step,
                    **_learning_rates(program, step),
                    **{f"train_{k}": float(v) for k, v in (log.last | means).items()},
                    **{f"{split_name}_{k}": float(v) for k, v in scores.items()},
                    "seconds": elapsed,
                }
            )
    return records, all_totals
