"""Trains plain SGD and each technique over the same seeds, and says which helped.

Each technique is compared with a baseline without it. The baseline of Random Gradient
has the settings of its paper. Step-Tuned SGD is a complete optimizer, and its
baseline is SGD with momentum. Techniques that take two gradients per step are also
compared with SGD that trains for twice the epochs.
"""

import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import tyro

import optax_tricks
from benchmarks.report import (
    ROWS,
    Report,
    Row,
    markdown,
    open_report,
    with_range,
)
from train import plots
from train.data.config import DataConfig
from train.intervals import Interval, paired_interval
from train.optim.config import OptimizerConfig
from train.optim.techniques import TECHNIQUES, Technique
from train.output.run_folder import environment
from train.program import Program, open_program
from train.progress import Reporter, shown_on
from train.run import Callbacks, NonFiniteLossError, train_seed
from train.settings import Positive, settings
from train.step import Record, TrainState
from train.tasks.classification import ClassificationConfig, ModelName


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the study.

    Attributes:
      name: the name of the method in tables.
      optimizer: the settings of its optimizer.
      baseline: the method that it is compared with at equal epochs; None for a
        baseline.
      equal_gradients: another method that takes the same number of gradients in all;
        None if the baseline does.
      epochs_factor: factor on the epochs of the study.
    """

    name: str
    optimizer: OptimizerConfig
    baseline: str | None = None
    equal_gradients: str | None = None
    epochs_factor: int = 1


# SGD, Gradient Centralization and PUGD have the momentum, decay and schedule of the
# paper on PUGD. (The paper on Gradient Centralization lowers the rate in steps.) Random
# Gradient has the settings of its paper's code. Step-Tuned SGD has its own schedule and
# no momentum. Its paper does not state the decay, so it has the decay of SGD. The
# papers' learning rates are for other networks and data, so each method has the best of
# the same six rates on held-out training images; see docs/digits.md.
_SGD = OptimizerConfig(learning_rate=0.3)
_RANDOM_GRADIENT = OptimizerConfig(
    learning_rate=1.0, momentum=0.5, weight_decay=1e-4, schedule="poly"
)
_STEP_TUNED = OptimizerConfig(
    learning_rate=3.0, momentum=0.0, weight_decay=5e-4, schedule="robbins_monro"
)
_BASELINES = (
    Method(name="sgd", optimizer=_SGD),
    Method(name="sgd, 2x epochs", optimizer=_SGD, epochs_factor=2),
    Method(name="sgd, momentum 0.5", optimizer=_RANDOM_GRADIENT),
)
# Settings and baselines of techniques that do not have the settings of SGD.
_SETTINGS = {
    "scale_by_random": (_RANDOM_GRADIENT, "sgd, momentum 0.5"),
    "barzilai_borwein_step": (_STEP_TUNED, "sgd"),
}


def _method(technique: Technique) -> Method:
    optimizer, baseline = _SETTINGS.get(technique.name, (_SGD, "sgd"))
    return Method(
        name=technique.name,
        optimizer=dataclasses.replace(optimizer, techniques=(technique.name,)),
        baseline=baseline,
        equal_gradients="sgd, 2x epochs" if technique.gradients_per_step == 2 else None,
    )


METHODS = (
    *_BASELINES,
    *(_method(row) for row in TECHNIQUES.values() if row.name in optax_tricks.__all__),
)


@settings
class CompareConfig:
    """Train plain SGD and each technique over the same seeds."""

    dataset: str = "digits"
    """Name of a prepared dataset; `python -m train.data list` shows them."""
    model: ModelName = "resnet8"
    """Network to train."""
    epochs: Positive[int] = 15
    """Passes over the training images."""
    batch_size: Positive[int] = 100
    """Images in a step."""
    seeds: Annotated[int, pydantic.Field(ge=2)] = 5
    """Runs of each method, at least 2; all methods have the same seeds."""
    eval_split: Literal["test", "validation"] = "test"
    """Split to evaluate on; validation is for choosing settings, and holds out a fifth
    of the training images if the dataset has no such split."""
    learning_rate: Positive[float] | None = None
    """One learning rate for all methods, instead of their own rates."""

    def task_config(self, method: Method) -> ClassificationConfig:
        """Returns the settings of the runs of a method."""
        optimizer = method.optimizer
        if self.learning_rate is not None:
            optimizer = dataclasses.replace(optimizer, learning_rate=self.learning_rate)
        return ClassificationConfig(
            data=DataConfig(dataset=self.dataset, eval_split=self.eval_split),
            model=self.model,
            epochs=self.epochs * method.epochs_factor,
            batch_size=self.batch_size,
            optimizer=optimizer,
        )


def compare(
    task: tyro.conf.Positional[Literal["classification"]],
    config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Train with plain SGD and with each technique, and say which helped.

    Args:
      task: the task of the networks.
      config: settings of the study.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same study, only the missing runs are trained.
    """
    described = dataclasses.asdict(config) | {
        "methods": {m.name: dataclasses.asdict(config.task_config(m)) for m in METHODS}
    }
    name = f"compare-{task}-{config.dataset}"
    with open_report(name, described, run_dir, resume=True) as report:
        _run_missing(config, report)
        rows = report.folder.read(ROWS)
        summaries = summarize(rows)
        cells = [cells_of(summary) for summary in summaries]
        text = conclusion(summaries, config.seeds)
        table = f"{markdown(HEADER, cells)}\n{text}\n"
        (report.folder.path / "table.md").write_text(table)
        report.save_rows([_flat(row) for row in rows])
        plots.save_learning_curves(
            _curves(rows),
            report.folder.path / "learning_curves.png",
            ylabel=f"{config.eval_split} error (%)",
            baselines=[method.name for method in METHODS if method.baseline is None],
        )
        report.show(HEADER, cells)
        report.console.print(text)


def _run_missing(config: CompareConfig, report: Report) -> None:
    """Trains the methods and seeds that have no row yet."""
    done = {(row["method"], row["seed"]) for row in report.folder.read(ROWS)}
    # Methods are the inner loop, so that a slow minute of the machine hits all of them.
    missing = [
        (seed, method)
        for seed in range(config.seeds)
        for method in METHODS
        if (method.name, seed) not in done
    ]
    if not missing:
        return
    progress = shown_on(report.console)
    programs = {}
    names = {method.name for _, method in missing}
    with progress("compiling", len(names)) as reporter:
        for method in METHODS:
            if method.name in names:
                reporter.describe(f"compiling {method.name}")
                programs[method.name] = _open(config, method)
                reporter.advance()
    report.folder.start()
    total = sum(_num_steps(programs[method.name].program) for _, method in missing)
    with progress("training", total) as reporter:
        for seed, method in missing:
            text = f"seed {seed + 1}/{config.seeds}, {method.name}"
            row = _run(programs[method.name], seed, reporter, text)
            report.folder.append(ROWS, row)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class _Compiled:
    """A method and its compiled program, with the number of classes of the dataset."""

    method: Method
    program: Program
    num_classes: int


def _open(config: CompareConfig, method: Method) -> _Compiled:
    program, dataset = open_program(config.task_config(method))
    return _Compiled(method=method, program=program, num_classes=dataset.num_classes)


def _num_steps(program: Program) -> int:
    return program.steps_before(program.config.epochs)


class _Curve(Callbacks):
    """Collects the learning curve of a run, and shows its progress.

    Attributes:
      points: a point for each epoch.
    """

    def __init__(self, compiled: _Compiled, reporter: Reporter, text: str):
        self.points: list[Record] = []
        self._gradients_per_step = compiled.method.optimizer.gradients_per_step
        self._accuracy = f"{compiled.program.config.data.eval_split}_accuracy"
        self._reporter, self._text = reporter, text

    def on_steps(self, state: TrainState, count: int, seconds: float) -> None:
        """Shows progress."""
        self._reporter.advance(count)

    def on_epoch(self, state: TrainState, record: Record) -> None:
        """Adds a point to the curve."""
        seconds_before = self.points[-1]["seconds"] if self.points else 0.0
        accuracy = record[self._accuracy]
        self.points.append(
            {
                "epoch": record["epoch"],
                "gradient_evaluations": record["step"] * self._gradients_per_step,
                "seconds": seconds_before + record["seconds"],
                "accuracy": accuracy,
            }
        )
        self._reporter.describe(f"{self._text}, accuracy {accuracy:.4f}")


def _run(compiled: _Compiled, seed: int, reporter: Reporter, text: str) -> Row:
    """Trains one method from one seed."""
    method, program = compiled.method, compiled.program
    curve = _Curve(compiled, reporter, text)
    failure = None
    try:
        train_seed(program, seed, curve)
        accuracy = curve.points[-1]["accuracy"]
    except NonFiniteLossError as error:
        # The run stays in the table, with the accuracy of guessing.
        failure = str(error)
        accuracy = 1 / compiled.num_classes
    times = [point["seconds"] for point in curve.points]
    epoch_seconds = [b - a for a, b in itertools.pairwise([0.0, *times])]
    return {
        "method": method.name,
        "seed": seed,
        "accuracy": accuracy,
        "ms_per_step": (
            1000 * statistics.median(epoch_seconds) / program.steps_before(1)
            if epoch_seconds
            else None
        ),
        "gradient_evaluations": (
            _num_steps(program) * method.optimizer.gradients_per_step
        ),
        "failure": failure,
        "environment": environment(),
        "curve": curve.points,
    }


def _flat(row: Row) -> Row:
    """Returns a row of the CSV file."""
    flat = {k: v for k, v in row.items() if k not in ("curve", "environment")}
    flat |= row["environment"]
    return flat


def _curves(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Returns the learning curves of each method, without runs that diverged."""
    curves = defaultdict(list)
    for row in rows:
        if row["failure"] is None:
            curves[row["method"]].append(row["curve"])
    return curves


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The results of a method over all seeds; accuracies are in percent.

    Attributes:
      method: the method.
      mean: mean accuracy.
      std: standard deviation of the accuracy.
      failures: number of runs that diverged.
      ms_per_step: median time of a step in milliseconds.
      versus_baseline: paired difference from the baseline; None for a baseline.
      versus_equal_gradients: paired difference from `Method.equal_gradients`, or None.
    """

    method: Method
    mean: float
    std: float
    failures: int
    ms_per_step: float
    versus_baseline: Interval | None
    versus_equal_gradients: Interval | None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Returns means, standard deviations and paired differences over the seeds."""
    by_method: dict[str, dict[int, Row]] = defaultdict(dict)
    for row in rows:
        by_method[row["method"]][row["seed"]] = row

    def accuracies(name: str) -> list[float]:
        by_seed = by_method[name]
        return [100 * by_seed[seed]["accuracy"] for seed in sorted(by_seed)]

    def difference(method: Method, other: str | None) -> Interval | None:
        if other is None:
            return None
        return paired_interval(accuracies(method.name), accuracies(other))

    return [
        Summary(
            method=method,
            mean=statistics.mean(accuracies(method.name)),
            std=statistics.stdev(accuracies(method.name)),
            failures=sum(r["failure"] is not None for r in runs.values()),
            ms_per_step=statistics.median(
                r["ms_per_step"] or math.nan for r in runs.values()
            ),
            versus_baseline=difference(method, method.baseline),
            versus_equal_gradients=difference(method, method.equal_gradients),
        )
        for method in METHODS
        if (runs := by_method[method.name])
    ]


HEADER = (
    "method",
    "grads/step",
    "accuracy %",
    "against its baseline",
    "ms/step",
)


def cells_of(summary: Summary) -> tuple[str, ...]:
    """Returns the row of a method in a table under `HEADER`."""
    method = summary.method
    failed = f" ({summary.failures} diverged)" if summary.failures else ""
    return (
        method.name,
        str(method.optimizer.gradients_per_step),
        f"{summary.mean:.2f} ± {summary.std:.2f}{failed}",
        _difference(summary.versus_baseline),
        f"{summary.ms_per_step:.1f}",
    )


def _difference(interval: Interval | None) -> str:
    return "baseline" if interval is None else with_range(*interval, "+.2f")


def conclusion(summaries: Sequence[Summary], seeds: int) -> str:
    """Returns sentences that say what the intervals show for each technique."""
    lines = []
    for summary in summaries:
        method = summary.method
        if summary.versus_baseline:
            verdict = summary.versus_baseline.verdict
            lines.append(f"{method.name}: {verdict} against {method.baseline}")
        if summary.versus_equal_gradients:
            interval = summary.versus_equal_gradients
            lines.append(
                f"{method.name}: {interval.verdict} against {method.equal_gradients}, "
                f"which takes as many gradients: {_difference(interval)}"
            )
    lines.append(
        f"Differences are points of accuracy, paired over {seeds} seeds, with 95 % "
        "intervals; of twenty techniques without effect, one would seem to have one."
    )
    return "\n".join(lines)
