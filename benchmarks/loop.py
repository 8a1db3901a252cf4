"""What the training loop costs beside its steps, and what its settings change.

Epochs of `train.loop.fit`, on data in the device's memory, are held against as many
steps of the same compiled program with nothing between them. Then ways to train from
several seeds, steps taken in one call, and the techniques in the full loop are each
held against the plainest of them.
"""

import contextlib
import copy
import csv
import dataclasses
import functools
import itertools
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich import box
from rich.table import Table
from train.loop import fit, groups_of

from benchmarks.timing import Ratio, interleave, ratio
from train.data import Dataset, open_prepared
from train.data.config import DataConfig
from train.errors import UsageError
from train.optim.optimizer import OptimizerConfig
from train.optim.techniques import TECHNIQUES
from train.output.checkpoints import Checkpoints
from train.output.run_folder import RunFolder, environment, open_run_folder
from train.output.tensorboard import Events
from train.program import Program
from train.progress import make_console, shown_on
from train.run import _Run, layout_of
from train.step import TrainState
from train.tasks import classification
from train.tasks.classification import ClassificationConfig

Call = Callable[[], Any]

# More than are ever trained.
_EPOCHS = 1_000_000

# In an epoch, and examples for as many to evaluate on. Epochs of real datasets are
# longer, so that what happens once in each weighs less there.
_STEPS = 10

_SEEDS = range(4)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Something to train.

    Attributes:
      dataset: name of a prepared dataset; its first examples are taken.
      model: the network.
      batch_size: images in a step.
      rounds: how often each function is timed.
      seed_steps: that each seed takes, where several are timed.
      steps_per_call: that are timed, for as many steps as the largest.
      tricks: techniques that are timed.
    """

    dataset: str
    model: str
    batch_size: int
    rounds: int
    seed_steps: int
    steps_per_call: tuple[int, ...]
    tricks: tuple[str, ...] = ()


def _subjects(cifar10: str, rounds: int) -> list[Subject]:
    return [
        Subject(
            dataset="digits",
            model="resnet8",
            batch_size=100,
            rounds=rounds,
            seed_steps=16,
            steps_per_call=(1, 4, 16),
            techniques=tuple(TECHNIQUES),
        ),
        # A step takes many times as long, and varies less.
        Subject(
            dataset=cifar10,
            model="resnet20",
            batch_size=32,
            rounds=math.ceil(rounds / 4),
            seed_steps=2,
            steps_per_call=(1, 4),
        ),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A function to be timed.

    Attributes:
      call: the function.
      steps: that it takes, of all seeds together.
      program: that it runs.
    """

    call: Call
    steps: int
    program: Program


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results; seconds are of one step of one seed."""

    part: str
    dataset: str
    model: str
    batch_size: int
    name: str
    reference: str
    rounds: int
    seconds: float
    ratio: Ratio
    compile_seconds: float


def _config(
    subject: Subject, data_dir: Path | None, **changes: Any
) -> ClassificationConfig:
    """A run that neither evaluates nor saves."""
    return ClassificationConfig(
        data=DataConfig(dataset=subject.dataset, input="memory", data_dir=data_dir),
        model=subject.model,
        batch_size=subject.batch_size,
        epochs=_EPOCHS,
        eval_every=_EPOCHS,
        checkpoint_minutes=math.inf,
        **changes,
    )


def _load(config: ClassificationConfig) -> Dataset:
    """The first examples of every split."""
    dataset = config.data.load(classification.NAME)
    examples = _STEPS * config.batch_size
    splits = {name: s.part(0, examples) for name, s in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def _compile(config: ClassificationConfig, dataset: Dataset) -> Program:
    mesh, width = layout_of(config)
    train, test = config.data.open(dataset, mesh)
    return Program(
        classification.make_task(config, dataset),
        config,
        train=train,
        test=test,
        mesh=mesh,
        width=width,
        steps_per_call=config.steps_per_call or 1,
    )


def _changed(program: Program, **changes: Any) -> Program:
    """The same compiled program, told otherwise what to do between its steps."""
    program = copy.copy(program)
    program.config = dataclasses.replace(program.config, **changes)
    return program


def _steps(program: Program, steps: int, seeds: Sequence[int] = (0,)) -> Timed:
    """Steps with nothing between them, and one wait for each group of seeds."""
    groups = groups_of(program, seeds)
    states = [program.init(group) for group in groups]
    feeds = [next(program.feeds(group, 0)) for group in groups]

    def call() -> list[TrainState]:
        for i, feed in enumerate(feeds):
            for _ in range(steps // program.steps_per_call):
                states[i] = program.train(states[i], feed, program.steps_per_call)
            jax.block_until_ready(states[i])
        return states

    return Timed(call=call, steps=steps * len(seeds), program=program)


def _epoch(program: Program) -> Timed:
    """An epoch of the loop that all tasks share."""
    states = (report.states for report in fit(program, (0,)) if report.epoch)
    return _next_of(states, program)


def _next_of(epochs: Iterator[Any], program: Program) -> Timed:
    call = functools.partial(next, epochs)
    return Timed(call=call, steps=program.steps_before(1), program=program)


def _epoch_of_run(
    program: Program, dataset: Dataset, path: Path, stack: contextlib.ExitStack
) -> Timed:
    """An epoch with what a run writes: metrics, events and, if it is due, its state."""
    folder = RunFolder(path, {})
    path.mkdir()
    checkpoints = stack.enter_context(Checkpoints(path / "checkpoints"))
    run = _Run(classification, program, dataset, folder, checkpoints)
    events = stack.enter_context(Events(path, run.seeds, first_step=0))

    def epochs() -> Iterator[Any]:
        for report in fit(program, run.seeds):
            run.taken += report.steps
            run._write(report, events)
            run._save(report, is_preempted=False)
            if report.epoch:
                checkpoints.wait()  # else it would be written while others are timed
                yield report.states

    return _next_of(epochs(), program)


def measure_loop(
    subject: Subject, program: Program, dataset: Dataset, folder: Path
) -> list[Measurement]:
    """Times epochs beside as many steps."""
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        steps = program.steps_before(1)
        saving = _changed(program, checkpoint_minutes=0)
        timed = {
            "steps": _steps(program, steps),
            "steps, again": _steps(program, steps),
            "epoch": _epoch(program),
            "epoch, evaluated": _epoch(_changed(program, eval_every=1)),
            "epoch, logged": _epoch_of_run(program, dataset, path / "logged", stack),
            "epoch, logged, saved": _epoch_of_run(
                saving, dataset, path / "saved", stack
            ),
        }
        return _measure("loop", subject, timed)


def measure_seeds(
    subject: Subject, program: Program, dataset: Dataset
) -> list[Measurement]:
    """Times ways to train from several seeds."""
    programs = {"sequential": program}
    for strategy in ("vmap", *["devices"] * (jax.device_count() > 1)):
        config = dataclasses.replace(
            program.config, seeds=len(_SEEDS), seed_strategy=strategy
        )
        programs[strategy] = _compile(config, dataset)
    timed = {
        name: _steps(program, subject.seed_steps, _SEEDS)
        for name, program in programs.items()
    }
    return _measure(f"{len(_SEEDS)} seeds", subject, timed)


def measure_calls(
    subject: Subject, program: Program, dataset: Dataset
) -> list[Measurement]:
    """Times steps that are taken in one call."""
    # On CPUs convolutions in a loop take many times as long.
    subject = dataclasses.replace(subject, rounds=math.ceil(subject.rounds / 4))
    timed = {}
    for count in subject.steps_per_call:
        config = dataclasses.replace(program.config, steps_per_call=count)
        found = program if count == 1 else _compile(config, dataset)
        timed[f"{count} in a call"] = _steps(found, max(subject.steps_per_call))
    return _measure("steps per call", subject, timed)


def measure_tricks(
    subject: Subject, program: Program, dataset: Dataset
) -> list[Measurement]:
    """Times epochs with each technique beside plain SGD."""
    timed = {"sgd": _epoch(program)}
    for trick in subject.tricks:
        optimizer = OptimizerConfig(techniques=(trick,))
        config = dataclasses.replace(program.config, optimizer=optimizer)
        timed[trick] = _epoch(_compile(config, dataset))
    return _measure("techniques in the loop", subject, timed)


def _measure(
    part: str, subject: Subject, timed: Mapping[str, Timed]
) -> list[Measurement]:
    """Times functions side by side, by the step; the first is the reference."""
    calls = {name: t.call for name, t in timed.items()}
    seconds = {
        name: [s / timed[name].steps for s in times]
        for name, times in interleave(calls, subject.rounds).items()
    }
    reference = next(iter(timed))
    return [
        Measurement(
            part=part,
            dataset=subject.dataset,
            model=subject.model,
            batch_size=subject.batch_size,
            name=name,
            reference=reference,
            rounds=subject.rounds,
            seconds=statistics.median(seconds[name]),
            ratio=ratio(seconds[name], seconds[reference]),
            compile_seconds=t.program.compile_seconds,
        )
        for name, t in timed.items()
    ]


def measure(
    subject: Subject, data_dir: Path | None, folder: Path
) -> Iterator[list[Measurement]]:
    """Measures all there is on one subject, part by part."""
    config = _config(subject, data_dir)
    dataset = _load(config)
    program = _compile(config, dataset)
    yield measure_loop(subject, program, dataset, folder)
    yield measure_seeds(subject, program, dataset)
    yield measure_calls(subject, program, dataset)
    if subject.tricks:
        yield measure_tricks(subject, program, dataset)


def loop(
    cifar10: str = "image_folder/cifar10",
    rounds: int = 20,
    data_dir: Path | None = None,
    run_dir: Path | None = None,
) -> None:
    """Time the training loop beside its bare steps, and what its settings change.

    Args:
      cifar10: name of a prepared dataset of small images, for a ResNet-20; left out if
        it is not prepared.
      rounds: how often each is timed, and a quarter as often on the ResNet-20.
      data_dir: folder of prepared datasets; $TFDS_DATA_DIR if unset.
      run_dir: folder for the results; a new one under runs/ if unset.
    """
    if rounds < 1:
        raise UsageError(f"rounds must be at least 1, got {rounds}")
    console = make_console()
    subjects = _subjects(cifar10, rounds)
    try:
        open_prepared(cifar10, data_dir=data_dir)
    except UsageError as error:
        console.print(f"without {cifar10}: {error}")
        subjects = subjects[:1]
    config = {"subjects": [dataclasses.asdict(subject) for subject in subjects]}
    with open_run_folder(run_dir, "loop", config, resume=False) as folder:
        folder.start()
        measurements = []
        parts = sum(3 + bool(subject.tricks) for subject in subjects)
        with shown_on(console)("timing", parts) as reporter:
            for subject in subjects:
                reporter.describe(f"timing {subject.model} on {subject.dataset}")
                for found in measure(subject, data_dir, folder.path):
                    measurements += found
                    reporter.advance()
        _write(folder.path / "rows.csv", measurements)
        for title, found in itertools.groupby(measurements, _title):
            console.print(_table(title, found), soft_wrap=False)
        console.print(f"Written to {folder.path}")


def _title(m: Measurement) -> str:
    return f"{m.part}: {m.dataset}, {m.model}"


def _table(title: str, measurements: Iterable[Measurement]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    for name in ("name", "ms/step", "time to first [10 %, 90 %]", "compile s"):
        table.add_column(name, no_wrap=True)
    for m in measurements:
        table.add_row(
            m.name,
            f"{1000 * m.seconds:.1f}",
            f"{m.ratio.median:.3f} [{m.ratio.low:.3f}, {m.ratio.high:.3f}]",
            f"{m.compile_seconds:.1f}",
        )
    return table


def _write(path: Path, measurements: Sequence[Measurement]) -> None:
    where = environment()
    rows = [dataclasses.asdict(m) | where for m in measurements]
    for row in rows:
        row |= {f"ratio_{k}": v for k, v in row.pop("ratio")._asdict().items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
