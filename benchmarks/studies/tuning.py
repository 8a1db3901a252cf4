"""Learning rates for the methods of a study, from the same number of trials for each.

All methods try as many rates, over the same range around the usual one of their
optimizer, on validation examples and from seeds that are not compared. So no method has
more trials than another, and none has seen the test examples.
"""

import dataclasses
import functools
import statistics
from collections import defaultdict
from collections.abc import Sequence

from scipy.stats import qmc

from benchmarks.report import Report, Row
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import USUAL_RATES, Method, with_learning_rate
from benchmarks.studies.runs import train
from benchmarks.studies.sharing import append, share
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
    _run_missing(config, report)
    best = best_rates(report.folder.read(TRIALS), config)
    return tuple(with_rate(method, best[method.name]) for method in config.methods)


def with_rate(method: Method, rate: float) -> Method:
    """Returns the method with another learning rate."""
    optimizer = with_learning_rate(method.optimizer, rate)
    return dataclasses.replace(method, optimizer=optimizer)


def _rates_of(config: CompareConfig, method: Method) -> list[float]:
    """Returns the rates that a method tries, around the usual one of its optimizer."""
    assert config.trials is not None
    optimizer = method.optimizer.optimizer
    is_base = optimizer == config.base.optimizer
    usual = config.base.learning_rate if is_base else USUAL_RATES[optimizer]
    return rates_to_try(usual, config.trials)


def _run_missing(config: CompareConfig, report: Report) -> None:
    """Trains the trials that have no row yet, together with other processes."""
    folder = report.folder
    trials = {
        f"{method.name}, learning rate {rate:g}": with_rate(method, rate)
        for method in config.methods
        for rate in _rates_of(config, method)
    }

    def seeds_of(name: str) -> set[int]:
        method = trials[name]
        rate = method.optimizer.learning_rate
        return {
            row["seed"]
            for row in folder.read(TRIALS)
            if (row["method"], row["learning_rate"]) == (method.name, rate)
        }

    def done() -> set[str]:
        return {name for name in trials if seeds_of(name).issuperset(_SEEDS)}

    finished = done()
    if len(finished) == len(trials):
        return
    progress = shown_on(report.console)
    validated = dataclasses.replace(config, trials=None, eval_split="validation")
    opened = OpenedStudy(
        config=validated,
        methods=config.methods,
        dataset=validated.data.load(config.task, progress),
    )

    def run(name: str, reporter: Reporter) -> None:
        method = trials[name]
        reporter.describe(name)
        compiled = opened.compile(method, config.usual_epochs)
        for seed in sorted(set(_SEEDS) - seeds_of(name)):
            row = train(compiled, seed, Reporter("", 0), "")
            del row["curve"]
            rate = method.optimizer.learning_rate
            append(folder, TRIALS, {"learning_rate": rate} | row)
        reporter.advance()

    folder.start()
    left = len(trials) - len(finished)
    with progress("choosing learning rates", left) as reporter, folder.shared():
        work = {name: functools.partial(run, name, reporter) for name in trials}
        share(folder, work, done)


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
        f"the best of {config.trials} for each method, on validation examples and from "
        f"{len(_SEEDS)} other seeds"
    )
