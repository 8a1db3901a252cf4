"""Trains from settings, and writes metrics, checkpoints, figures and a summary.

`run` opens the run folder, loads the data, compiles the step, trains one seed after the
other, draws figures and writes a summary. `train_seed` is the training loop. It writes
nothing, but calls its `Callbacks`.
"""

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from train import plots
from train.config import TrainingConfig
from train.data import Dataset
from train.data.dataset import describe
from train.errors import NonFiniteLossError, UsageError, see
from train.intervals import mean_interval
from train.output.checkpoints import CheckpointWriter, checkpoint_steps, find_checkpoint
from train.output.run_folder import RunFolder, open_run_folder
from train.output.tensorboard import TensorBoard
from train.parallel import check_same_settings
from train.program import STEPS_IN_FLIGHT, Program, open_program
from train.progress import Reporter, make_console, shown_on, silent
from train.signals import StoppedError, graceful
from train.step import Record, TrainState
from train.tasks.base import Sums

EPOCHS = "metrics.jsonl"
STEPS = "steps.jsonl"
CURVES = "curves.png"

# The number of examples whose predictions are drawn.
_NUM_SAMPLES = 6


def checkpoint_folder(folder: Path, seed: int) -> Path:
    """Returns the folder that holds the checkpoints of a seed."""
    return folder / "checkpoints" / f"seed{seed}"


def checkpoint_seeds(folder: Path) -> list[int]:
    """Returns the seeds that have a folder of checkpoints, in increasing order."""
    names = [path.name for path in (folder / "checkpoints").glob("seed*")]
    numbers = [name.removeprefix("seed") for name in names]
    return sorted(int(number) for number in numbers if number.isdecimal())


######## The training loop of one seed ################################################


class Callbacks:
    """The methods that the training loop calls; those of this base class do nothing.

    The next step donates the arrays of the state, so a method that keeps them must copy
    them.
    """

    def on_steps(self, state: TrainState, count: int, seconds: float) -> None:
        """Called after every few steps.

        Args:
          state: the state after these steps.
          count: number of steps since the last call.
          seconds: time that the steps of the epoch have taken so far, in seconds.
        """

    def on_log(self, record: Record) -> None:
        """Called with the metrics of every step that is logged."""

    def on_epoch(self, state: TrainState, record: Record) -> None:
        """Called with the metrics of every epoch, after its evaluation."""


def train_seed(
    program: Program,
    seed: int,
    callbacks: Callbacks | None = None,
    *,
    state: TrainState | None = None,
    finished_epochs: int = 0,
    seconds: float = 0.0,
) -> tuple[TrainState, Sums | None]:
    """Trains one seed to the last epoch.

    Args:
      program: the compiled run.
      seed: determines parameters, order of examples, augmentation and random factors.
      callbacks: called during training; if unset, nothing is called.
      state: the state to continue from; the one before the first step if unset.
      finished_epochs: number of epochs that are complete and were passed to
        `callbacks.on_epoch`.
      seconds: time that the steps of the epoch in progress have taken so far, in
        seconds.

    Returns:
      The last state, and the sums of the last evaluation. The sums are None if all
      epochs were finished before.

    Raises:
      NonFiniteLossError: if the loss or the parameters become NaN or infinite. It is
        raised at the next logged step.
    """
    config, callbacks = program.config, callbacks or Callbacks()
    state = program.init_state(seed) if state is None else state
    step, steps_in_flight, sums = int(state.step), 1, None
    with contextlib.closing(program.feeds(seed, step)) as feeds:
        for epoch in range(finished_epochs + 1, config.epochs + 1):
            start_of_epoch, end_of_epoch = map(program.steps_before, (epoch - 1, epoch))
            if step == start_of_epoch:
                state, seconds = program.clear_log(state), 0.0
            while step < end_of_epoch:
                steps_to_log = config.log_every - step % config.log_every
                count = min(steps_in_flight, steps_to_log, end_of_epoch - step)
                start = time.perf_counter()
                for feed in itertools.islice(feeds, count):
                    state = program.train_step(state, feed)
                jax.block_until_ready(state.step)
                elapsed = time.perf_counter() - start
                step, seconds = step + count, seconds + elapsed
                if count == steps_to_log or step == end_of_epoch:
                    callbacks.on_log(_step_record(program, state, seed, step, epoch))
                callbacks.on_steps(state, count, seconds)
                steps_in_flight = _next_steps_in_flight(count, elapsed)
            if epoch % config.eval_every == 0 or epoch == config.epochs:
                sums = program.evaluate(state)
                scores = program.task.scores(sums)
            else:
                scores = {}
            record = _epoch_record(program, state, seed, epoch, scores, seconds)
            callbacks.on_epoch(state, record)
    return state, sums


def _next_steps_in_flight(count: int, seconds: float) -> int:
    """Returns how many steps take about a second, so that progress is visible."""
    steps = max(1, min(STEPS_IN_FLIGHT, 2 * count, int(count / seconds)))
    # The clocks of processes differ, and all have to report after the same steps.
    return int(multihost_utils.broadcast_one_to_all(np.int32(steps)))


def _step_record(
    program: Program, state: TrainState, seed: int, step: int, epoch: int
) -> Record:
    """Returns the metrics of the latest step."""
    log = jax.device_get(state.log)
    if log.bad_step >= 0:
        raise NonFiniteLossError(seed, int(log.bad_step), epoch)
    return {
        "seed": seed,
        "epoch": epoch,
        "step": step,
        **_learning_rates(program, step),
        **{
            f"train_{key}": float(x)
            for key, x in log.latest.items()
            if key not in log.sums or not np.isnan(x)  # a mean of nothing, no labels
        },
    }


def _epoch_record(
    program: Program,
    state: TrainState,
    seed: int,
    epoch: int,
    scores: dict[str, float],
    seconds: float,
) -> Record:
    """Returns the mean metrics of an epoch and the scores of its evaluation."""
    log = jax.device_get(state.log)
    step, split = program.steps_before(epoch), program.config.data.eval_split
    means = {k: total / count for k, (total, count) in log.sums.items() if count}
    latest = {k: x for k, x in log.latest.items() if k not in log.sums}
    return {
        "seed": seed,
        "epoch": epoch,
        "step": step,
        **_learning_rates(program, step),
        **{f"train_{key}": float(x) for key, x in (latest | means).items()},
        **{f"{split}_{key}": float(x) for key, x in scores.items()},
        "seconds": seconds,
    }


def _learning_rates(program: Program, step: int) -> Record:
    """Returns the learning rate of each network in the latest of `step` steps."""
    rates = {name: float(f(step - 1)) for name, f in program.schedules.items()}
    if len(rates) == 1:
        return {"learning_rate": next(iter(rates.values()))}
    return {f"{name}_learning_rate": rate for name, rate in rates.items()}


######## A run with its folder ########################################################


def run(
    config: TrainingConfig,
    *,
    run_dir: Path | None = None,
    resume: bool = True,
    console: Console | None = None,
) -> list[Record]:
    """Trains all seeds, and writes metrics, checkpoints, figures and a summary.

    Args:
      config: the settings of a task, such as a `ClassificationConfig`.
      run_dir: the folder to write to; None for a new folder under runs/.
      resume: whether to continue the run in `run_dir`, if it has the same settings.
      console: where to show progress and results; standard output if unset.

    Returns:
      A record for each seed and epoch, as in `metrics.jsonl`, ordered by epoch.

    Raises:
      UsageError: if the settings do not fit the data or the devices, or if several
        processes have no `run_dir`.
      RunFolderError: if the folder cannot be used; raised before training.
      CheckpointError: if a checkpoint cannot be written, or none can be read.
      NonFiniteLossError: if the loss is no longer finite.
      StoppedError: if a signal told the process to end.
    """
    is_first = jax.process_index() == 0
    console = console or make_console(quiet=not is_first)
    progress = shown_on(console) if is_first else silent
    if run_dir is None and jax.process_count() > 1:
        raise UsageError(
            "run_dir must be set for several processes, to a folder that all can see"
            + see("machines.md#one-run-on-all-of-them")
        )
    settings = {"task": config.task, **dataclasses.asdict(config)}
    check_same_settings(settings | {"run_dir": run_dir, "resume": resume})

    # Open the folder.
    with open_run_folder(
        run_dir,
        f"{config.task}-{config.data.dataset}",
        settings,
        resume=resume,
        writes=is_first,
    ) as folder:
        if folder.is_finished():
            console.print(f"{folder.path} already holds this run, finished")
            return _by_epoch(folder.read(EPOCHS))

        # Load the data and compile the step.
        program, dataset = open_program(config, progress)

        # Train one seed after the other.
        outputs: list[SeedOutput] = []
        described = describe(dataset)
        total = config.seeds * program.steps_before(config.epochs)
        with progress("training", total) as reporter, graceful() as stopped:
            for seed in config.all_seeds:
                output = SeedOutput(program, described, seed, folder, reporter, stopped)
                has_begun = output.restore(console.print)
                if folder.is_started and not has_begun and not outputs:
                    console.print(f"seed {seed} has no checkpoint yet: it starts anew")
                outputs.append(output)
                if seed == config.seed:  # whatever may be wrong has been seen by now
                    folder.start()
                folder.replace(EPOCHS, [r for each in outputs for r in each.epochs])
                folder.replace(STEPS, [r for each in outputs for r in each.steps])
                state, sums = output.train(console.print)
                if seed == config.seed:
                    first_state, first_sums = state, sums
        records = [record for output in outputs for record in output.epochs]

        # Draw the curves of all seeds, and predictions of the first one.
        _draw(program, dataset, folder, records, first_state, first_sums)

        # Summarize.
        if folder.writes:
            summary = summarize(program, records)
            folder.finish(summary)
            console.print(
                f"{config.data.eval_split} {_score(program, _last(records))} "
                f"after {program.steps_before(config.epochs)} steps in "
                f"{summary['train_seconds']:.1f} s (compiled in "
                f"{program.compile_seconds:.1f} s); written to {folder.path}"
            )
        return _by_epoch(records)


def _by_epoch(records: Sequence[Record]) -> list[Record]:
    return sorted(records, key=lambda record: (record["epoch"], record["seed"]))


class SeedOutput(Callbacks):
    """Trains one seed, writes its metrics and checkpoints, and shows its progress.

    Where the seed stands is what its last checkpoint says. The records in the run
    folder are written for people to read, and made again from the checkpoint.

    Attributes:
      epochs: the metrics of its epochs so far.
      steps: the metrics of its logged steps so far.
    """

    def __init__(
        self,
        program: Program,
        described: Mapping[str, Any],
        seed: int,
        folder: RunFolder,
        reporter: Reporter,
        stopped: Callable[[], int],
    ):
        """Opens nothing yet.

        Args:
          program: the compiled run.
          described: the description of the dataset, for checkpoints.
          seed: the seed to train.
          folder: the run folder to write to.
          reporter: shows progress.
          stopped: returns the number of the signal that told the process to end, or 0.
        """
        self.epochs: list[Record] = []
        self.steps: list[Record] = []
        self._program, self._config = program, program.config
        self._described = described
        self._seed, self._folder = seed, folder
        self._reporter, self._stopped = reporter, stopped
        self._seconds = 0.0
        self._state: TrainState | None = None
        self._checkpoint: int | None = None
        self._tensorboard: TensorBoard | None = None

    def restore(self, show: Callable[[str], None]) -> bool:
        """Reads the last checkpoint, or makes the state before the first step.

        Args:
          show: called with a line about where training goes on, and with a line for
            each warning.

        Returns:
          Whether there is a checkpoint.
        """
        name = f"seed {self._seed}"
        identity = {"config": self._folder.config, "seed": self._seed}
        found = find_checkpoint(self._checkpoints, warn=show, identity=identity)
        if found is None:
            is_first = self._seed == self._config.seed  # of seeds with the same weights
            self._state = self._program.init_state(
                self._seed, show if is_first else lambda _: None
            )
            return False
        total = self._program.steps_before(self._config.epochs)
        show(f"{name} goes on from step {found.step} of {total}")
        self._state = found.read(self._program.abstract_state)
        self._checkpoint = found.step
        self.epochs, self.steps = found.about["epochs"], found.about["steps"]
        self._seconds = found.about["seconds"]
        self._reporter.advance(found.step)
        return True

    def train(self, warn: Callable[[str], None]) -> tuple[TrainState, Sums | None]:
        """Trains to the last epoch, after `restore`.

        Args:
          warn: called with a line for each warning.

        Returns:
          The last state and the sums of the last evaluation, as from `train_seed`.
        """
        path = self._folder.path
        self._writer = CheckpointWriter(self._checkpoints, saved=self._checkpoint)
        self._last_save = time.monotonic()
        with contextlib.ExitStack() as stack:
            if self._folder.writes:
                first_step = self._program.steps_before(len(self.epochs))
                tensorboard = TensorBoard(path, self._seed, first_step=first_step)
                self._tensorboard = stack.enter_context(tensorboard)
            state, self._state = self._state, None  # it is donated
            try:
                return train_seed(
                    self._program,
                    self._seed,
                    self,
                    state=state,
                    finished_epochs=len(self.epochs),
                    seconds=self._seconds,
                )
            except NonFiniteLossError:
                for step in checkpoint_steps(self._checkpoints)[-1:]:
                    warn(f"the last good state is kept: checkpoint {step} in {path}")
                raise

    @property
    def _checkpoints(self) -> Path:
        return checkpoint_folder(self._folder.path, self._seed)

    def on_steps(self, state: TrainState, count: int, seconds: float) -> None:
        """Shows progress, and saves if the process was told to end."""
        self._reporter.advance(count)
        self._end_if_stopped(state, seconds)

    def on_log(self, record: Record) -> None:
        """Writes the metrics of a step."""
        self.steps.append(record)
        self._write(STEPS, "step", record)

    def on_epoch(self, state: TrainState, record: Record) -> None:
        """Writes and shows the metrics of an epoch, and saves when it is due."""
        self.epochs.append(record)
        self._write(EPOCHS, "epoch", record)
        self._reporter.describe(_progress_line(self._program, record))
        waited = time.monotonic() - self._last_save
        is_due = waited >= 60 * self._config.checkpoint_minutes
        is_due |= record["epoch"] == self._config.epochs
        # The clocks of processes differ.
        if multihost_utils.broadcast_one_to_all(np.array(is_due)):
            self._save(state, record["seconds"])
        self._end_if_stopped(state, record["seconds"])

    def _write(self, name: str, kind: str, record: Record) -> None:
        self._folder.append(name, record)
        if self._tensorboard:
            self._tensorboard.add(kind, record)

    def _save(self, state: TrainState, seconds: float) -> None:
        about = {
            "config": self._folder.config,
            "seed": self._seed,
            "dataset": self._described,
            "seconds": seconds,
            "epochs": self.epochs,
            "steps": self.steps,
        }
        self._writer.save(int(state.step), state, about)
        self._last_save = time.monotonic()

    def _end_if_stopped(self, state: TrainState, seconds: float) -> None:
        # Every process checks, so that all end at the same step.
        signal = self._stopped()
        if not signal or len(self.epochs) == self._config.epochs:
            return
        self._save(state, seconds)
        raise StoppedError(
            f"told to end: saved seed {self._seed} after {int(state.step)} steps to "
            f"{self._folder.path}; the same command goes on from there",
            signal,
        )


######## Summary and figures ##########################################################


def summarize(program: Program, records: Sequence[Record]) -> dict[str, Any]:
    """Returns the content of `summary.json`: the last epoch, and totals of the run.

    Args:
      program: the compiled run.
      records: the records of all epochs and seeds.
    """
    config = program.config
    last = _last(records)
    names = set.intersection(*map(set, last)) - {"seconds", "seed"}
    means = {name: _mean(last, name) for name in last[0] if name in names}
    steps = program.steps_before(config.epochs)
    summary: dict[str, Any] = {
        **means,
        "gradient_evaluations": steps * config.optimizer.gradients_per_step,
        "train_seconds": sum(record["seconds"] for record in records),
        "compile_seconds": program.compile_seconds,
    }
    if len(last) > 1:
        summary["seeds"] = last
        summary["intervals"] = {
            name: mean_interval([record[name] for record in last])
            for name in means
            if name.startswith(config.data.eval_split)
        }
    return summary


def _last(records: Sequence[Record]) -> list[Record]:
    """Returns the records of the last epoch, one for each seed."""
    return [r for r in records if r["epoch"] == records[-1]["epoch"]]


def _mean(records: Sequence[Record], name: str) -> float:
    return float(np.mean([record[name] for record in records]))


def _progress_line(program: Program, record: Record) -> str:
    """Returns the text of the progress line at the end of an epoch."""
    config, epoch = program.config, int(record["epoch"])
    steps = program.steps_before(epoch) - program.steps_before(epoch - 1)
    losses = [
        f"{name} {record[f'train_{name}']:.4f}"
        for name in program.names_of("loss")
        if f"train_{name}" in record
    ]
    speed = steps * config.batch_size / record["seconds"]
    return " ".join(
        (
            *([f"seed {int(record['seed'])}"] if config.seeds > 1 else []),
            f"epoch {epoch}/{config.epochs}",
            *losses,
            _score(program, [record]),
            f"{speed:,.0f} images/s",
        )
    )


def _score(program: Program, records: Sequence[Record]) -> str:
    """Returns the metric of each seed, with mean and interval if there are several."""
    metric = program.task.metric
    name = f"{program.config.data.eval_split}_{metric}"
    values = [record[name] for record in records if name in record]
    if not values:
        return ""
    if len(values) == 1:
        return f"{metric} {values[0]:.4f}"
    mean, low, high = mean_interval(values)
    each = " ".join(f"{value:.4f}" for value in values)
    return f"{metric} {mean:.4f} [{low:.4f}, {high:.4f}] of {each}"


def _draw(
    program: Program,
    dataset: Dataset,
    folder: RunFolder,
    records: Sequence[Record],
    state: TrainState,
    sums: Sums | None,
) -> None:
    """Draws the curves of all seeds, and the task's figures of the first one."""
    task, config = program.task, program.config
    split_name = config.data.eval_split
    split = dataset.split(split_name)
    batch = split.read(range(min(_NUM_SAMPLES, len(split))))
    # All processes evaluate and predict together; one of them draws.
    sums = program.evaluate(state) if sums is None else sums
    predictions = program.predict(state, batch[task.input_name])
    if not folder.writes:
        return
    plots.save_curves(
        records,
        folder.path / CURVES,
        losses=program.names_of("loss"),
        metrics=program.names_of(task.metric),
        split=split_name,
    )
    task.save_figures(folder.path, sums, batch, predictions)
    with TensorBoard(folder.path, config.seed) as tensorboard:
        step = program.steps_before(config.epochs)
        tensorboard.add_figures(step, sorted(folder.path.glob("*.png")))
