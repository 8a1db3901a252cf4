"""Plans a study, and trains the runs that are missing in its folder."""

import contextlib
import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.report import ROWS, Report
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import Method
from benchmarks.studies.plan import (
    LEAST_SEEDS,
    LEAST_STEPS,
    Choice,
    choose,
    in_words,
    measure,
)
from benchmarks.studies.runs import Compiled, train
from benchmarks.studies.sharing import append, share
from train.data import Dataset
from train.program import compile_program
from train.progress import Progress, Reporter, shown_on
from train.tasks import TASKS
from train.tasks.base import check_images

PLANS = "plans.jsonl"  # the last one holds

# The number of seeds if it is not set: without a budget, and the most within one.
_SEEDS = 5
_MOST_SEEDS = 20
# Seconds of a budget that are kept for the page, and how much longer training takes
# than the steps that are timed say.
_RESERVE = 12.0
_MARGIN = 1.15


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What a study trains. Its folder keeps it, as more seeds need the same epochs.

    Attributes:
      epochs: passes over the training examples.
      batch_size: examples in a step.
      seeds: number of seeds.
      most_seeds: the setting `seeds` for which they were chosen.
      budget: the setting `budget` for which they were chosen.
      train_examples: number of training examples.
      eval_examples: number of examples to evaluate on.
      image_size: (height, width).
    """

    epochs: int
    batch_size: int
    seeds: int
    most_seeds: int | None
    budget: float | None
    train_examples: int
    eval_examples: int
    image_size: tuple[int, int]

    def is_for(self, config: CompareConfig) -> bool:
        """Whether the number of seeds was chosen for these settings."""
        return (self.budget, self.most_seeds) == (config.budget, config.seeds)


def run_study(
    config: CompareConfig,
    methods: Sequence[Method],
    report: Report,
    start: float,
    *,
    follows: bool = False,
) -> Plan:
    """Trains the runs that have no row yet, and says before what they will take.

    Args:
      config: the settings.
      methods: the methods, with the learning rates that they are to have.
      report: the folder of the rows, and the console.
      start: when the command began, as told by `time.monotonic`.
      follows: whether another process has made the plan.

    Returns:
      What was trained.

    Raises:
      UsageError: if the settings do not fit the data, or if the budget is too small.
    """
    plans = [_plan_from(record) for record in report.folder.read(PLANS)]
    old = plans[-1] if plans else None
    if old is not None and old.is_for(config) and not _missing(methods, report, old):
        return old

    progress = shown_on(report.console)
    dataset = config.data.load(config.task, progress)
    if old is not None:
        dataset = _with_fewer(dataset, old.train_examples)
    opened = OpenedStudy(config=config, methods=methods, dataset=dataset)
    if follows and old is not None:
        with report.folder.shared():
            _train_missing(opened, old, report, Reporter("", 0), {}, math.inf)
        return old

    opened, plan, seconds = _make_plan(opened, old, report, start, progress)
    missing = _missing(methods, report, plan)
    steps = sum(opened.compiled(method, plan.epochs).num_steps for _, method in missing)
    total = sum(seconds[method.name] for _, method in missing)
    report.console.print(
        f"{len(methods)} methods, {plan.seeds} seeds, epochs: {plan.epochs}; "
        f"{_fewer_images(config, plan)}"
        f"{len(missing)} runs to train, {steps:,} steps, about {in_words(total)}"
        f"{' by one process' if config.runners > 1 else ''}"
    )
    report.folder.start()
    report.folder.append(PLANS, dataclasses.asdict(plan))
    end = start + config.budget - _RESERVE if config.budget else math.inf
    shared = contextlib.nullcontext() if config.budget else report.folder.shared()
    with progress("training", steps) as reporter, shared:
        _train_missing(opened, plan, report, reporter, seconds, end)
    return plan


def _fewer_images(config: CompareConfig, plan: Plan) -> str:
    if config.budget is None:
        return ""
    return f"{plan.train_examples:,} training examples; "


def _make_plan(
    opened: "OpenedStudy",
    old: Plan | None,
    report: Report,
    start: float,
    progress: Progress,
) -> tuple["OpenedStudy", Plan, dict[str, float]]:
    """Chooses epochs and seeds, and compiles the methods of the runs that are missing.

    Returns:
      The study, with fewer examples if the budget needs it, the plan, and the seconds
      that a run of each method takes, by name.
    """
    config, methods = opened.config, opened.methods
    epochs = config.usual_epochs if old is None else old.epochs
    if old is None and config.budget:
        choice = _fitting(opened, epochs, start, progress)
        epochs = choice.epochs
        if choice.share < 1:
            few = math.ceil(choice.share * len(opened.dataset.split("train")))
            dataset = _with_fewer(opened.dataset, few)
            opened = OpenedStudy(config=config, methods=methods, dataset=dataset)
    dataset, split = opened.dataset, config.data.eval_split
    train, evaluated = (len(dataset.split(name)) for name in ("train", split))
    plan = Plan(
        epochs=epochs,
        batch_size=opened.batch_size,
        seeds=config.seeds or (_MOST_SEEDS if config.budget else _SEEDS),
        most_seeds=config.seeds,
        budget=config.budget,
        train_examples=train,
        eval_examples=evaluated,
        image_size=dataset.split("train").reader.size,
    )
    missing = _missing(methods, report, plan)
    seconds = opened.time_all(missing, epochs, progress)
    if config.budget:
        left = start + config.budget - _RESERVE - time.monotonic()
        seeds = _fitting_seeds(missing, seconds, left, most=plan.seeds)
        plan = dataclasses.replace(plan, seeds=seeds)
    return opened, plan, seconds


def _with_fewer(dataset: Dataset, train_examples: int) -> Dataset:
    """Returns the dataset with so many training examples, balanced over classes."""
    train = dataset.split("train")
    if len(train) <= train_examples:
        return dataset
    fewer = {"train": train.subset(train_examples)}
    return dataclasses.replace(dataset, splits={**dataset.splits, **fewer})


def _train_missing(
    opened: "OpenedStudy",
    plan: Plan,
    report: Report,
    reporter: Reporter,
    seconds: Mapping[str, float],
    end: float,
) -> None:
    """Trains the runs that have no row yet, together with other processes.

    Args:
      opened: compiles the methods.
      plan: what to train.
      report: the folder of the rows, and the console.
      reporter: shows the progress of all processes.
      seconds: how long a run of each method takes, if there is a budget.
      end: when no other seed is begun, as told by `time.monotonic`.
    """
    missing = _missing(opened.methods, report, plan)
    methods = {_run_name(method.name, seed): method for seed, method in missing}
    counted: set[str] = set()

    def train_one(name: str, seed: int) -> None:
        counted.add(name)
        method = methods[name]
        text = f"seed {seed + 1}/{plan.seeds}, {method.name}"
        row = train(opened.compiled(method, plan.epochs), seed, reporter, text)
        append(report.folder, ROWS, row)

    work = {
        name: functools.partial(train_one, name, seed)
        for name, (seed, _) in zip(methods, missing, strict=True)
    }

    def done() -> set[str]:
        rows = report.folder.read(ROWS)
        names = {_run_name(row["method"], row["seed"]) for row in rows}
        for name in (names & work.keys()) - counted:  # by another process
            counted.add(name)
            reporter.advance(opened.num_steps(methods[name], plan.epochs))
        return names

    if end == math.inf:
        share(report.folder, work, done)
        return
    for seed, runs in itertools.groupby(missing, key=lambda pair: pair[0]):
        names = [_run_name(method.name, seed) for _, method in runs]
        needed = sum(seconds[methods[name].name] for name in names)
        if seed >= LEAST_SEEDS and time.monotonic() + needed > end:
            report.console.print(f"the budget ends after {seed} seeds")
            break
        share(report.folder, {name: work[name] for name in names}, done)


def _plan_from(record: dict[str, Any]) -> Plan:
    return Plan(**{**record, "image_size": tuple(record["image_size"])})


def _run_name(method: str, seed: int) -> str:
    return f"{method}, seed {seed}"


def _missing(
    methods: Sequence[Method], report: Report, plan: Plan
) -> list[tuple[int, Method]]:
    """Returns the seeds and methods that have no row yet.

    Methods are the inner loop, so that a slow minute of the machine hits all of them.
    """
    done = {(row["method"], row["seed"]) for row in report.folder.read(ROWS)}
    return [
        (seed, method)
        for seed in range(plan.seeds)
        for method in methods
        if (method.name, seed) not in done
    ]


class OpenedStudy:
    """The data of a study, for which its methods are compiled.

    Attributes:
      config: the settings of the study.
      methods: the methods.
      dataset: the data.
    """

    def __init__(
        self, *, config: CompareConfig, methods: Sequence[Method], dataset: Dataset
    ):
        self.config, self.methods, self.dataset = config, methods, dataset
        self._compiled: dict[tuple[str, int], Compiled] = {}
        self._takes_images = False

    @property
    def batch_size(self) -> int:
        """That of the task, or less if an epoch would have few steps."""
        usual = self.config.usual_batch_size
        if self.config.batch_size is not None:
            return usual
        few = len(self.dataset.split("train")) // LEAST_STEPS
        return min(usual, max(2, few))

    def num_steps(self, method: Method, epochs: int) -> int:
        """Returns the number of steps of a run, if its method has been compiled."""
        found = self._compiled.get((method.name, epochs))
        return found.num_steps if found else 0

    def compiled(self, method: Method, epochs: int) -> Compiled:
        """Returns the compiled runs of a method; compiles them at the first call."""
        key = (method.name, epochs)
        if key not in self._compiled:
            self._compiled[key] = self.compile(method, epochs)
        return self._compiled[key]

    def compile(self, method: Method, epochs: int) -> Compiled:
        """Compiles the runs of a method."""
        run_config = self.config.run_config(method, epochs, self.batch_size)
        task = TASKS[self.config.task].create(run_config, self.dataset)
        if not self._takes_images:  # which is so for all methods or for none
            check_images(task, self.dataset)
            self._takes_images = True
        split = self.config.data.eval_split
        return Compiled(
            method=method,
            program=compile_program(task, run_config, self.dataset),
            task=self.config.study_task,
            worst=self.config.study_task.worst(self.dataset, split),
        )

    def time_all(
        self, missing: Sequence[tuple[int, Method]], epochs: int, progress: Progress
    ) -> dict[str, float]:
        """Compiles and times the methods of missing runs.

        Returns:
          The seconds that a run of each takes, by name.
        """
        names = {method.name for _, method in missing}
        methods = [method for method in self.methods if method.name in names]
        seconds: dict[str, float] = {}
        with progress("compiling", len(methods)) as reporter:
            for method in methods:
                reporter.describe(f"compiling and timing {method.name}")
                program = self.compiled(method, epochs).program
                if not seconds:
                    program.init_state(0)  # compiles what all methods share
                cost = measure(program, method.epochs_factor)
                seconds[method.name] = _MARGIN * cost.seconds(epochs)
                reporter.advance()
        return seconds


def _fitting(
    opened: OpenedStudy, most_epochs: int, start: float, progress: Progress
) -> Choice:
    """Returns what fits into the budget, as the first baseline tells.

    The epochs are part of a compiled step, as its learning rates depend on them. To
    time all methods first would mean to compile them twice.
    """
    config, methods = opened.config, opened.methods
    assert config.budget is not None
    with progress("compiling", 1) as reporter:
        reporter.describe(f"compiling and timing {methods[0].name}")
        program = opened.compile(methods[0], most_epochs).program
        program.init_state(0)  # compiles what all methods share
        measuring = time.monotonic()
        cost = measure(program, 1)
        measuring = time.monotonic() - measuring
        reporter.advance()
    gradients = [method.optimizer.gradients_per_step for method in methods]
    costs = [
        dataclasses.replace(
            cost, step=_MARGIN * count * cost.step, epochs_factor=method.epochs_factor
        )
        for count, method in zip(gradients, methods, strict=True)
    ]
    compiling = program.compile_seconds * sum(gradients) + measuring * len(costs)
    return choose(
        costs,
        budget=config.budget,
        spent=time.monotonic() - start + compiling + _RESERVE,
        most_epochs=most_epochs,
        most_seeds=config.seeds or _MOST_SEEDS,
    )


def _fitting_seeds(
    missing: Sequence[tuple[int, Method]],
    seconds: Mapping[str, float],
    left: float,
    *,
    most: int,
) -> int:
    """Returns how many seeds are finished in the time left, but at least 2."""
    for seed, method in missing:
        left -= seconds[method.name]
        if left < 0:
            return max(LEAST_SEEDS, seed)
    return most
