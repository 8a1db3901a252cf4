"""A study: plain SGD and each technique, over the same seeds, and which of them helped.

Each technique is held against a baseline without it. Random Gradient's has the
settings of its paper; Step-Tuned SGD, an optimizer of its own, meets SGD with momentum.
Techniques that take two gradients in a step also meet SGD of twice the epochs.
"""

import csv
import dataclasses
import itertools
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich import box
from rich.console import Console
from rich.table import Table
from train.loop import NonFiniteLossError, fit

from benchmarks.figures import save_learning_curves
from train import data
from train.data.config import DataConfig
from train.errors import UsageError
from train.intervals import Interval, paired_interval
from train.optim.optimizer import OptimizerConfig
from train.output.run_folder import RunFolder, environment, open_run_folder
from train.program import Program
from train.progress import Reporter, make_console, shown_on
from train.run import build
from train.step import Record
from train.tasks import classification
from train.tasks.classification import ClassificationConfig, ModelName


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Method:
    """One row of the study.

    Attributes:
      name: what the table calls it.
      optimizer: what trains.
      baseline: the method it is held against at equal epochs; None for a baseline.
      equal_gradients: the method that takes as many gradients in all, where that is
        not the baseline.
      epochs_factor: epochs it trains for, in those of the study.
    """

    name: str
    optimizer: OptimizerConfig
    baseline: str | None = None
    equal_gradients: str | None = None
    epochs_factor: int = 1


Row = dict[str, Any]
_ROWS = "rows.jsonl"

# Momentum, decay and schedule are PUGD's for SGD, Gradient Centralization (whose paper
# has steps in place of the cosine) and PUGD, and those of its paper's code for Random
# Gradient. Step-Tuned SGD has its own schedule and no momentum; its decay, which the
# paper leaves open, is that of SGD. Learning rates were chosen on held-out training
# images, from the same six for every method, since the papers' are for other networks
# and data: see docs/digits.md.
_SGD = OptimizerConfig(learning_rate=0.3)
_RANDOM_GRADIENT = OptimizerConfig(
    learning_rate=1.0, momentum=0.5, weight_decay=1e-4, schedule="poly"
)
_STEP_TUNED = OptimizerConfig(
    learning_rate=3.0, momentum=0.0, weight_decay=5e-4, schedule="robbins_monro"
)


def _with(optimizer: OptimizerConfig, trick: str) -> OptimizerConfig:
    return dataclasses.replace(optimizer, techniques=(trick,))


METHODS = (
    Method(name="sgd", optimizer=_SGD),
    Method(name="sgd, 2x epochs", optimizer=_SGD, epochs_factor=2),
    Method(name="sgd, momentum 0.5", optimizer=_RANDOM_GRADIENT),
    Method(
        name="scale_by_random",
        optimizer=_with(_RANDOM_GRADIENT, "scale_by_random"),
        baseline="sgd, momentum 0.5",
    ),
    Method(
        name="centralize",
        optimizer=_with(_SGD, "centralize"),
        baseline="sgd",
    ),
    Method(
        name="barzilai_borwein_step",
        optimizer=_with(_STEP_TUNED, "barzilai_borwein_step"),
        baseline="sgd",
        equal_gradients="sgd, 2x epochs",
    ),
    Method(
        name="perturbed_unit_step",
        optimizer=_with(_SGD, "perturbed_unit_step"),
        baseline="sgd",
        equal_gradients="sgd, 2x epochs",
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class CompareConfig:
    """Train plain SGD and each technique over the same seeds."""

    dataset: str = "digits"
    """Name of a prepared dataset; `python -m train.data list` shows them."""
    model: ModelName = "resnet8"
    """Network to train."""
    epochs: int = 15
    """Passes over the training images."""
    batch_size: int = 100
    """Images in a step."""
    seeds: int = 5
    """Runs of each method, at least 2; the same seeds for all."""
    eval_split: Literal["test", "validation"] = "test"
    """Validation holds out a fifth of the training images, to choose settings by."""
    learning_rate: float | None = None
    """One learning rate for all methods, in place of each one's own."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UsageError(f"seeds must be at least 2 to compare, got {self.seeds}")
        self.task_config(METHODS[0])  # raises where a setting is out of its range

    def task_config(self, method: Method) -> ClassificationConfig:
        """What a method trains."""
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
    """Train plain SGD and each technique over the same seeds, and say which helped.

    Args:
      task: what to train for.
      config: what to compare, and on what.
      run_dir: folder for the results; a new one under runs/ if unset. One that holds a
        part of the same study is finished, and nothing in it is run again.
    """
    console = make_console()
    described = dataclasses.asdict(config) | {
        "methods": {m.name: dataclasses.asdict(config.task_config(m)) for m in METHODS}
    }
    name = f"compare-{task}-{config.dataset}"
    with open_run_folder(run_dir, name, described, resume=True) as folder:
        _run_missing(config, folder, console)
        rows = folder.read(_ROWS)
        summaries = summarize(rows)
        _write_results(folder, rows, summaries, config.seeds)
        save_learning_curves(rows, folder.path / "learning_curves.png")
        console.print(_table(summaries), soft_wrap=False)
        text = conclusion(summaries, config.seeds)
        console.print(text)
        console.print(f"Written to {folder.path}")


def _run_missing(config: CompareConfig, folder: RunFolder, console: Console) -> None:
    done = {(row["method"], row["seed"]) for row in folder.read(_ROWS)}
    missing = [
        (seed, method)
        for seed in range(config.seeds)
        for method in METHODS
        if (method.name, seed) not in done
    ]
    if not missing:
        return
    programs: dict[str, Program] = {}
    with console.status("compiling") as status:
        for _, method in missing:
            if method.name not in programs:
                status.update(f"compiling {method.name}")
                task_config = config.task_config(method)
                programs[method.name], _ = build(classification, task_config)
    folder.start()
    total = sum(_num_steps(config, programs, method) for _, method in missing)
    with shown_on(console)("training", total) as reporter:
        # Seeds outside, methods inside: a slow minute of the machine hits them all.
        for seed, method in missing:
            text = f"seed {seed + 1}/{config.seeds}, {method.name}"
            row = _run(config, method, programs[method.name], seed, reporter, text)
            folder.append(_ROWS, row)


def _num_steps(
    config: CompareConfig, programs: dict[str, Program], method: Method
) -> int:
    epochs = config.epochs * method.epochs_factor
    return programs[method.name].steps_before(epochs)


def _run(
    config: CompareConfig,
    method: Method,
    program: Program,
    seed: int,
    reporter: Reporter,
    text: str,
) -> Row:
    curve: list[Record] = []

    def add(record: Record) -> None:
        curve.append(
            {
                "epoch": record["epoch"],
                "gradient_evaluations": record["step"] * gradients,
                "seconds": record["seconds"] + (curve[-1]["seconds"] if curve else 0.0),
                "accuracy": record[f"{config.eval_split}_accuracy"],
            }
        )
        reporter.describe(f"{text}, accuracy {curve[-1]['accuracy']:.4f}")

    gradients = method.optimizer.gradients_per_step
    epochs = config.epochs * method.epochs_factor
    failure = None
    try:
        for report in fit(program, (seed,)):
            reporter.advance(report.steps)
            for record in report.epoch:
                add(record)
        accuracy = curve[-1]["accuracy"]
    except NonFiniteLossError as error:
        failure = str(error)  # kept in the table, as a network that guesses
        accuracy = 1 / data.load(config.dataset).num_classes
    times = [point["seconds"] for point in curve]
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
        "gradient_evaluations": program.steps_before(epochs) * gradients,
        "failure": failure,
        "environment": environment(),
        "curve": curve,
    }


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """What the table says of a method; accuracies in percent."""

    method: Method
    mean: float
    std: float
    failures: int
    ms_per_step: float
    versus_baseline: Interval | None
    versus_equal_gradients: Interval | None


def summarize(rows: Sequence[Row]) -> list[Summary]:
    """Means, standard deviations and paired differences over the seeds."""
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


_HEADER = (
    "method",
    "grads/step",
    "accuracy %",
    "against its baseline",
    "ms/step",
)


def _cells(summary: Summary) -> tuple[str, ...]:
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
    if interval is None:
        return "baseline"
    return f"{interval.mean:+.2f} [{interval.low:+.2f}, {interval.high:+.2f}]"


def _table(summaries: Sequence[Summary]) -> Table:
    # Narrow enough for 80 columns, which is also what a log file gets.
    table = Table(box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in _HEADER:
        table.add_column(name, no_wrap=True)
    for summary in summaries:
        table.add_row(*_cells(summary))
    return table


def _markdown(summaries: Sequence[Summary]) -> str:
    lines = [_HEADER, ("---",) * len(_HEADER), *map(_cells, summaries)]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def conclusion(summaries: Sequence[Summary], seeds: int) -> str:
    """What the intervals say of each technique, in words."""
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


def _write_results(
    folder: RunFolder, rows: Sequence[Row], summaries: Sequence[Summary], seeds: int
) -> None:
    text = f"{_markdown(summaries)}\n{conclusion(summaries, seeds)}\n"
    (folder.path / "table.md").write_text(text)
    flat = [
        {k: v for k, v in row.items() if k not in ("curve", "environment")}
        | row["environment"]
        for row in rows
    ]
    with (folder.path / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(flat[0]))
        writer.writeheader()
        writer.writerows(flat)
