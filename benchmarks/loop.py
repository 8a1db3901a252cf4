"""What the training loop costs beside its steps.

Epochs of the loop, on data in the memory of the device, are compared with as many steps
of the same compiled program with nothing between them.
"""

import contextlib
import copy
import dataclasses
import itertools
import math
import queue
import statistics
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import jax
import tyro

from benchmarks.report import open_report, rows_of, with_range
from benchmarks.timing import Ratio, interleave, ratio
from train.data import Dataset, open_prepared
from train.data.config import DataConfig
from train.errors import UsageError
from train.output.run_folder import RunFolder
from train.program import Program, compile_program
from train.progress import Reporter, shown_on
from train.run import Callbacks, SeedOutput, train_seed
from train.settings import Positive, settings
from train.step import Record, TrainState
from train.tasks.classification import Classification, ClassificationConfig

Call: TypeAlias = Callable[[], Any]

# More than are ever trained, so that no epoch is the last one.
_EPOCHS = 1_000_000

# In an epoch, and examples for as many to evaluate on. Epochs of real datasets are
# longer, so that what happens once in each weighs less there.
_STEPS = 10


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """A network and the data that it trains on.

    Attributes:
      dataset: name of a prepared dataset; its first examples are taken.
      model: the network.
      batch_size: images in a step.
      rounds: number of rounds.
    """

    dataset: str
    model: str
    batch_size: int
    rounds: int


def _subjects(cifar10: str, rounds: int) -> list[Subject]:
    return [
        Subject(
            dataset="digits",
            model="resnet8",
            batch_size=100,
            rounds=rounds,
        ),
        # A step takes many times as long, and varies less.
        Subject(
            dataset=cifar10,
            model="resnet20",
            batch_size=32,
            rounds=math.ceil(rounds / 4),
        ),
    ]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Timed:
    """A function to time.

    Attributes:
      call: the function.
      steps: number of steps that it takes.
      program: the program that it runs.
    """

    call: Call
    steps: int
    program: Program


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One row of the results; seconds are per step."""

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


def _config(subject: Subject, data_dir: Path | None) -> ClassificationConfig:
    """Returns the settings of a run that neither evaluates nor saves."""
    return ClassificationConfig(
        data=DataConfig(dataset=subject.dataset, loader="memory", data_dir=data_dir),
        model=subject.model,
        batch_size=subject.batch_size,
        epochs=_EPOCHS,
        eval_every=_EPOCHS,
        checkpoint_minutes=math.inf,
    )


def _load(config: ClassificationConfig) -> Dataset:
    """Loads the first examples of every split."""
    dataset = config.data.load(config.task)
    examples = _STEPS * config.batch_size
    splits = {name: s.part(0, examples) for name, s in dataset.splits.items()}
    return dataclasses.replace(dataset, splits=splits)


def _changed(program: Program, **changes: Any) -> Program:
    """Returns the same compiled program with other settings for the loop."""
    program = copy.copy(program)
    program.config = dataclasses.replace(program.config, **changes)
    return program


######## Functions to time ############################################################


def _steps(program: Program) -> Timed:
    """Returns a function that takes an epoch of steps, and waits once at the end."""
    steps = program.steps_before(1)
    state, feed = program.init_state(0), next(program.feeds(0))

    def call() -> TrainState:
        nonlocal state
        for _ in range(steps):
            state = program.train_step(state, feed)
        jax.block_until_ready(state)
        return state

    return Timed(call=call, steps=steps, program=program)


def _epoch(program: Program, stack: contextlib.ExitStack) -> Timed:
    """Returns a function that trains for one epoch and writes nothing."""

    class Pause(Callbacks):
        def __init__(self, pause: Call):
            self._pause = pause

        def on_epoch(self, state: TrainState, record: Record) -> None:
            self._pause()

    def train(pause: Call) -> None:
        train_seed(program, 0, Pause(pause))

    return _timed_epoch(program, train, stack)


def _epoch_of_run(program: Program, path: Path, stack: contextlib.ExitStack) -> Timed:
    """Returns a function that trains for one epoch and writes what a run writes.

    These are metrics, TensorBoard events and, if it is due, a checkpoint.
    """

    class Output(SeedOutput):
        def __init__(self, pause: Call):
            path.mkdir()
            reporter = Reporter("", 0)
            folder = RunFolder(path, {})
            super().__init__(program, {}, 0, folder, reporter, lambda: 0)
            self._pause = pause

        def on_epoch(self, state: TrainState, record: Record) -> None:
            super().on_epoch(state, record)
            self._pause()

    def train(pause: Call) -> None:
        output = Output(pause)
        output.restore(print)
        output.train(print)

    return _timed_epoch(program, train, stack)


def _timed_epoch(
    program: Program, train: Callable[[Call], None], stack: contextlib.ExitStack
) -> Timed:
    call = stack.enter_context(epoch_by_epoch(train))
    return Timed(call=call, steps=program.steps_before(1), program=program)


@contextlib.contextmanager
def epoch_by_epoch(train: Callable[[Call], None]) -> Iterator[Call]:
    """Yields a function that lets a training loop run for one epoch.

    The loop itself calls back at the end of an epoch. To pause it there while others
    are timed, it runs in its own thread.

    Args:
      train: trains without end, and calls its argument at the end of every epoch.
    """
    turns, epochs = threading.Semaphore(0), queue.SimpleQueue[BaseException | None]()
    closing = threading.Event()

    class Closed(BaseException):
        """Ends the loop."""

    def wait() -> None:
        turns.acquire()
        if closing.is_set():
            raise Closed

    def pause() -> None:
        epochs.put(None)
        wait()

    def run() -> None:
        try:
            wait()
            train(pause)
            raise RuntimeError("training came to its end")
        except Closed:
            pass
        except BaseException as error:
            epochs.put(error)

    def next_epoch() -> None:
        turns.release()
        if error := epochs.get():
            raise error

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield next_epoch
    finally:
        closing.set()
        turns.release()
        thread.join()


######## Measurements #################################################################


def measure_loop(subject: Subject, program: Program, folder: Path) -> list[Measurement]:
    """Times epochs beside as many steps."""
    with contextlib.ExitStack() as stack:
        path = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        evaluating = _changed(program, eval_every=1)
        saving = _changed(program, checkpoint_minutes=0)
        timed = {
            "steps": _steps(program),
            "steps, again": _steps(program),
            "epoch": _epoch(program, stack),
            "epoch, evaluated": _epoch(evaluating, stack),
            "epoch, logged": _epoch_of_run(program, path / "logged", stack),
            "epoch, logged, saved": _epoch_of_run(saving, path / "saved", stack),
        }
        return _measure("loop", subject, timed)


def _measure(
    part: str, subject: Subject, timed: Mapping[str, Timed]
) -> list[Measurement]:
    """Times functions side by side, per step; the first one is the reference."""
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


def measure(subject: Subject, data_dir: Path | None, folder: Path) -> list[Measurement]:
    """Measures one subject."""
    config = _config(subject, data_dir)
    dataset = _load(config)
    task = Classification.create(config, dataset)
    return measure_loop(subject, compile_program(task, config, dataset), folder)


@settings
class LoopConfig:
    """Time the training loop against its bare steps."""

    cifar10: str = "image_folder/cifar10"
    """Name of a prepared dataset of small images for a ResNet-20; left out if it is not
    prepared."""
    rounds: Positive[int] = 20
    """Number of rounds; a quarter of them for the ResNet-20."""
    data_dir: Path | None = None
    """Folder of prepared datasets; $TFDS_DATA_DIR or ~/tensorflow_datasets if unset."""


def loop(
    config: Annotated[LoopConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Time the training loop against its bare steps.

    Args:
      config: what to time.
      run_dir: folder of the results; a new one under runs/ if unset.
    """
    subjects, note = _subjects(config.cifar10, config.rounds), None
    try:
        open_prepared(config.cifar10, data_dir=config.data_dir)
    except UsageError as error:
        subjects, note = subjects[:1], f"without {config.cifar10}: {error}"
    described = {"subjects": [dataclasses.asdict(subject) for subject in subjects]}
    with open_report("loop", described, run_dir) as report:
        if note:
            report.console.print(note)
        report.folder.start()
        measurements = []
        with shown_on(report.console)("timing", len(subjects)) as reporter:
            for subject in subjects:
                reporter.describe(f"timing {subject.model} on {subject.dataset}")
                measurements += measure(subject, config.data_dir, report.folder.path)
                reporter.advance()
        report.save_rows(rows_of(measurements))
        for title, group in itertools.groupby(measurements, _title):
            report.show(_HEADER, list(map(_cells, group)), title)


def _title(m: Measurement) -> str:
    return f"{m.part}: {m.dataset}, {m.model}"


_HEADER = ("name", "ms/step", "time to first [10 %, 90 %]", "compile s")


def _cells(m: Measurement) -> tuple[str, ...]:
    return (
        m.name,
        f"{1000 * m.seconds:.1f}",
        with_range(*m.ratio, ".3f"),
        f"{m.compile_seconds:.1f}",
    )
