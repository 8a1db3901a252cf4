"""Learning rates for the methods of a study, from the same number of trials for each.

All methods try the same rates, on validation examples and from seeds that are not
compared. So no method is tuned better than another, and none has seen the test
examples.
"""

import dataclasses
import itertools
import statistics
from collections import defaultdict
from collections.abc import Sequence

from scipy.stats import qmc

from benchmarks.report import Report, Row
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import Method
from benchmarks.studies.runs import train
from benchmarks.studies.study import OpenedStudy
from train.progress import Reporter, shown_on

TRIALS = "trials.jsonl"

# The rates are from the base optimizer's divided by this to as many times that.
_RANGE = 30.0
# Far from the seeds of a study, which start at 0.
_SEEDS = (1_000_000, 1_000_001)


def rates_to_try(base: float, count: int) -> list[float]:
    """Returns learning rates that fill the range evenly on a logarithmic scale.

    They are quasi-random (Halton, 1960): more trials add to those of fewer.

    >>> rates_to_try(0.3, 3)
    [0.3, 0.055, 1.6]

    Args:
      base: the learning rate of the base optimizer, which is the first one.
      count: number of rates.
    """
    sequence = qmc.Halton(d=1, scramble=False)
    sequence.fast_forward(1)  # past the end of the range
    exponents = 2 * sequence.random(count)[:, 0] - 1
    return [float(f"{base * _RANGE**exponent:.2g}") for exponent in exponents]


def tuned_methods(config: CompareConfig, report: Report) -> tuple[Method, ...]:
    """Returns the methods of a study, each with the best learning rate of its trials.

    Trials that are in the folder already are not run again. Of equally good rates, the
    smallest is taken.
    """
    if config.trials is None:
        return config.methods
    rates = rates_to_try(config.methods[0].optimizer.learning_rate, config.trials)
    _run_missing(config, rates, report)
    best = best_rates(report.folder.read(TRIALS), config)
    return tuple(with_rate(method, best[method.name]) for method in config.methods)


def with_rate(method: Method, rate: float) -> Method:
    """Returns the method with another learning rate."""
    optimizer = dataclasses.replace(method.optimizer, learning_rate=rate)
    return dataclasses.replace(method, optimizer=optimizer)


def _run_missing(config: CompareConfig, rates: Sequence[float], report: Report) -> None:
    """Trains the trials that have no row yet."""
    folder = report.folder
    done = {
        (row["method"], row["learning_rate"], row["seed"])
        for row in folder.read(TRIALS)
    }
    missing = [
        (with_rate(method, rate), seed)
        for rate in rates
        for method in config.methods
        for seed in _SEEDS
        if (method.name, rate, seed) not in done
    ]
    if not missing:
        return
    progress = shown_on(report.console)
    config = dataclasses.replace(config, trials=None, eval_split="validation")
    dataset = config.data.load(config.task, progress)
    opened = OpenedStudy(config=config, methods=config.methods, dataset=dataset)
    epochs = config.epochs or config.study_task.epochs
    folder.start()
    with progress("choosing learning rates", len(missing)) as reporter:
        for method, trials in itertools.groupby(missing, key=lambda pair: pair[0]):
            rate = method.optimizer.learning_rate
            reporter.describe(f"{method.name}, learning rate {rate:g}")
            compiled = opened.compile(method, epochs)
            for _, seed in trials:
                row = train(compiled, seed, Reporter("", 0), "")
                del row["curve"]
                folder.append(TRIALS, {"learning_rate": rate} | row)
                reporter.advance()


def best_rates(trials: Sequence[Row], config: CompareConfig) -> dict[str, float]:
    """Returns the learning rate of the best mean score, by the name of the method."""
    task = config.study_task
    means = mean_scores(trials, task.score)
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for (method, rate), mean in means.items():
        found[method].append((task.error(mean), rate))
    return {method: min(errors)[1] for method, errors in found.items()}


def mean_scores(trials: Sequence[Row], score: str) -> dict[tuple[str, float], float]:
    """Returns the mean score over the seeds, by method and learning rate."""
    scores: dict[tuple[str, float], list[float]] = defaultdict(list)
    for row in trials:
        scores[row["method"], row["learning_rate"]].append(row[score])
    return {key: statistics.mean(values) for key, values in scores.items()}


def about_trials(config: CompareConfig) -> str:
    """Returns how the learning rates were chosen, in words."""
    if config.trials is None:
        return "not chosen for these images"
    return (
        f"the best of {config.trials} for each method, the same for all, on validation "
        f"examples and from {len(_SEEDS)} other seeds"
    )
