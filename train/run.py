"""One run of one task, from its config to all that it leaves behind."""

import contextlib
import dataclasses
import math
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from train.checkpoints import Checkpoints
from train.config import TrainingConfig
from train.data import Dataset
from train.data._dataset import describe
from train.parallel import make_mesh
from train.errors import UsageError
from train.events import Events
from train.figures import save_curves
from train.loop import NonFiniteLossError, Report, fit, groups_of
from train.preemption import PreemptedError, preemption
from train.program import Program
from train.progress import Progress, shown_on, silent
from train.run_folder import RunFolder, open_run_folder
from train.statistics import mean_interval
from train.step import Record, TrainState, Tree, evaluation_models

EPOCHS = "metrics.jsonl"
STEPS = "steps.jsonl"
SUMMARY = "summary.json"
DATASET = "dataset.json"
CURVES = "curves.png"
CHECKPOINTS = "checkpoints"

# Examples whose predictions are drawn.
_SAMPLES = 6


class Layout(NamedTuple):
    """How the seeds of a run are laid out.

    Attributes:
      mesh: the devices.
      width: seeds that are trained together.
    """

    mesh: Mesh
    width: int


def layout_of(config: TrainingConfig) -> Layout:
    """One seed after the other, all stacked, or stacked and spread over devices.

    Auto is one after the other: measured on CPUs (docs/loop.md), where stacking
    turns convolutions into grouped ones without gain, and kept for other backends
    until it is measured there.
    """
    match config.seed_strategy:
        case "vmap":
            return Layout(make_mesh(), config.seeds)
        case "devices":
            return Layout(
                make_mesh(math.gcd(config.seeds, jax.device_count())), config.seeds
            )
        case _:
            return Layout(make_mesh(), 1)


def build(
    module: types.ModuleType, config: TrainingConfig, progress: Progress = silent
) -> tuple[Program, Dataset]:
    """Loads the data and compiles the run that a config describes.

    Args:
      module: of `train.tasks`.
      config: the task's.
      progress: shows what takes time.

    Raises:
      UsageError: if something in the config does not fit the data or the devices.
    """
    task, dataset = module.open_task(config, progress)
    mesh, width = layout_of(config)
    train, test = config.data.open(dataset, mesh, progress)
    if train.seeds_axes is None and (width > 1 or (config.steps_per_call or 1) > 1):
        raise UsageError(
            "a stream feeds one seed, one step at a time: --input resident, or "
            "--seed-strategy sequential and --steps-per-call 1"
        )
    with progress("compiling", 1):
        program = Program(
            task,
            config,
            train=train,
            test=test,
            mesh=mesh,
            width=width,
            # More were measured on CPUs and are slower there; see docs/loop.md.
            steps_per_call=config.steps_per_call or 1,
        )
    return program, dataset


def train(
    module: types.ModuleType,
    config: TrainingConfig,
    *,
    run_dir: Path | None,
    resume: bool,
    console: Console,
) -> list[Record]:
    """Trains as configured, and writes metrics, checkpoints, figures and a summary.

    Args:
      module: of `train.tasks`.
      config: the task's.
      run_dir: where to write; None for a new folder under runs/.
      resume: whether a folder that holds a run of the same config goes on.
      console: where to show progress and result.

    Returns:
      A record for each epoch and seed, as in `metrics.jsonl`.

    Raises:
      RunFolderError: before training, if the folder cannot be used.
      CheckpointError: if a checkpoint cannot be written, or none can be read.
      NonFiniteLossError: if the loss stops being a number.
      PreemptedError: if the process was told to end.
    """
    is_first = jax.process_index() == 0
    if run_dir is None and jax.process_count() > 1:
        raise UsageError("several processes need one --run-dir, which they all see")
    described = {"task": module.NAME, **dataclasses.asdict(config)}
    with open_run_folder(
        run_dir,
        f"{module.NAME}-{config.data.dataset}",
        described,
        resume=resume,
        writes=is_first,
    ) as folder:
        if (folder.path / SUMMARY).exists():
            console.print(f"{folder.path} holds this run already, finished")
            return folder.read(EPOCHS)
        shown = shown_on(console) if is_first else silent
        program, dataset = build(module, config, shown)
        folder.start()
        folder.write(DATASET, describe(dataset))
        with Checkpoints(folder.path / CHECKPOINTS) as checkpoints:
            run = _Run(module, program, dataset, folder, checkpoints)
            try:
                run.train(shown, warn=console.print)
            except NonFiniteLossError:
                checkpoints.wait()
                saved = checkpoints.steps()
                if saved:
                    console.print(
                        f"the last good state is kept: checkpoint {saved[-1]} in "
                        f"{folder.path}"
                    )
                raise
        run.finish(console)
        return run.records


class _Run:
    """A run while it lasts, with all that it writes to."""

    def __init__(
        self,
        module: types.ModuleType,
        program: Program,
        dataset: Dataset,
        folder: RunFolder,
        checkpoints: Checkpoints,
    ):
        self.module = module
        self.program = program
        self.config = program.config
        self.dataset = dataset
        self.folder = folder
        self.checkpoints = checkpoints
        self.seeds = range(self.config.seed, self.config.seed + self.config.seeds)
        self.records: list[Record] = []
        self.taken = 0  # steps of all seeds together
        self._saved = time.monotonic()

    def train(self, shown: Progress, warn: Callable[[str], None]) -> None:
        """Trains to the end, from the last checkpoint on if there is one."""
        states = self._restore(warn)
        total = self.config.seeds * self.program.steps_before(self.config.epochs)
        finished = len(self.records) // self.config.seeds
        seeds = self.seeds if self.folder.writes else ()
        with contextlib.ExitStack() as stack:
            reporter = stack.enter_context(shown("training", total))
            preempted = stack.enter_context(preemption())
            first_step = self.program.steps_before(finished)
            events = Events(self.folder.path, seeds, first_step=first_step)
            stack.enter_context(events)
            reporter.advance(self.taken)
            for report in fit(
                self.program, self.seeds, states=states, finished_epochs=finished
            ):
                self.taken += report.steps
                self._write(report, events)
                if report.epoch:
                    reporter.describe(self._line(report.epoch))
                reporter.advance(report.steps)
                self._save(report, preempted())
            if len(self.records) > finished * self.config.seeds:
                self._draw(report, events)
        self.checkpoints.wait()

    def _restore(self, warn: Callable[[str], None]) -> tuple[TrainState, ...]:
        """The states to start or to go on from, and the records up to there."""
        groups = groups_of(self.program, self.seeds)
        like = (self.program.abstract_state,) * len(groups)
        found = self.checkpoints.restore(like, warn=warn)
        steps = dict.fromkeys(self.seeds, 0)
        if found:
            for group, state in zip(groups, found[1], strict=True):
                step = int(np.ravel(jax.device_get(state.step))[0])
                steps |= dict.fromkeys(group, step)
        for name in (EPOCHS, STEPS):
            records = self.folder.read(name)
            kept = [r for r in records if r["step"] <= steps.get(r["seed"], 0)]
            self.folder.keep(name, kept)
            if name == EPOCHS:
                self.records = kept
        self.taken = sum(steps.values())
        return found[1] if found else tuple(map(self.program.init, groups))

    def _write(self, report: Report, events: Events) -> None:
        for name, kind, records in (
            (STEPS, "step", report.logs),
            (EPOCHS, "epoch", report.epoch),
        ):
            for record in records:
                self.folder.append(name, record)
                if self.folder.writes:
                    events.add(kind, record)
        self.records += report.epoch

    def _save(self, report: Report, is_preempted: bool) -> None:
        """Saves a checkpoint if it is time for one."""
        is_last = report.epoch and report.epoch[0]["epoch"] == self.config.epochs
        waited = time.monotonic() - self._saved
        is_due = report.epoch and waited >= 60 * self.config.checkpoint_minutes
        # The clocks of processes differ.
        is_due = multihost_utils.broadcast_one_to_all(np.array(bool(is_due)))
        if is_last or is_due or is_preempted:
            self.checkpoints.save(self.taken, report.states)
            self._saved = time.monotonic()
        if is_preempted and not is_last:
            self.checkpoints.wait()
            raise PreemptedError(
                f"told to end: saved after {self.taken} steps to {self.folder.path}; "
                "the same command goes on from there"
            )

    def _line(self, records: Sequence[Record]) -> str:
        """What the progress line says at the end of an epoch."""
        epoch = int(records[0]["epoch"])
        steps = self.program.steps_before(epoch) - self.program.steps_before(epoch - 1)
        seconds = sum(record["seconds"] for record in records) / self.program.width
        speed = steps * self.program.config.batch_size * len(records) / seconds
        losses = [
            f"{name.removeprefix('train_')} {_mean(records, name):.4f}"
            for name in records[0]
            if name.startswith("train_") and name.endswith("loss")
        ]
        return " ".join(
            (
                f"epoch {epoch}/{self.config.epochs}",
                *losses,
                self._score(records),
                f"{speed:,.0f} images/s",
            )
        )

    def _score(self, records: Sequence[Record]) -> str:
        """The metric of each seed, with mean and interval if there are several."""
        name = f"{self.config.data.evaluate_on}_{self.module.METRIC}"
        values = [record[name] for record in records if name in record]
        if not values:
            return ""
        if len(values) == 1:
            return f"{self.module.METRIC} {values[0]:.4f}"
        mean, low, high = mean_interval(values)
        each = " ".join(f"{value:.4f}" for value in values)
        return f"{self.module.METRIC} {mean:.4f} [{low:.4f}, {high:.4f}] of {each}"

    def _draw(self, report: Report, events: Events) -> None:
        """Draws the curves, and what the task has to show of the first seed."""
        program, split = self.program, self.config.data.evaluate_on
        networks = program.networks(report.states[0])
        if not self.folder.writes:
            return
        examples = self.dataset.split(split)
        batch = examples.read(range(min(_SAMPLES, len(examples))))
        images = batch.get("image", batch.get("input"))

        @jax.jit
        def predict(networks: Tree, images: jax.Array) -> jax.Array:
            models = evaluation_models(program.graphdefs, *networks)
            return program.task.predict(models, images)

        folder = self.folder.path
        save_curves(self.records, self.module.METRIC, folder / CURVES, split=split)
        predictions = np.asarray(predict(networks, images))
        program.task.save_figures(folder, report.totals[0], batch, predictions)
        step = program.steps_before(self.config.epochs)
        events.add_figures(self.config.seed, step, sorted(folder.glob("*.png")))

    def finish(self, console: Console) -> None:
        """Writes the summary and says how it went."""
        last = self.records[-self.config.seeds :]
        seconds = sum(record["seconds"] for record in self.records)
        seconds /= self.program.width
        steps = self.program.steps_before(self.config.epochs)
        means = {k: _mean(last, k) for k in last[0] if k not in ("seconds", "seed")}
        summary = {
            **means,
            "gradient_evaluations": steps * self.config.optimizer.gradients_per_step,
            "train_seconds": seconds,
            "compile_seconds": self.program.compile_seconds,
        }
        if len(last) > 1:
            summary["seeds"] = last
            summary["intervals"] = {
                name: mean_interval([record[name] for record in last])
                for name in means
                if name.startswith(self.config.data.evaluate_on)
            }
        self.folder.write(SUMMARY, summary)
        if self.folder.writes:
            console.print(
                f"{self.config.data.evaluate_on} {self._score(last)} after {steps} "
                f"steps in {seconds:.1f} s (compiled in "
                f"{self.program.compile_seconds:.1f} s); written to {self.folder.path}"
            )


def _mean(records: Sequence[Record], name: str) -> float:
    return float(np.mean([record[name] for record in records]))
