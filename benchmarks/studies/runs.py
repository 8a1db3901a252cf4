"""One run of a study: a method that is trained from a seed, as a row of results."""

import dataclasses
import statistics
from typing import Any

from benchmarks.report import Row
from benchmarks.studies.methods import Method
from benchmarks.studies.tasks import StudyTask
from train.errors import NonFiniteLossError
from train.output.run_folder import environment
from train.program import Program
from train.progress import Reporter
from train.run import Callbacks, train_seed
from train.step import Record, TrainState


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """A method and its compiled program.

    Attributes:
      method: the method.
      program: its program.
      task: the task of the study.
      worst: the score of a run that diverges.
    """

    method: Method
    program: Program
    task: StudyTask
    worst: float

    @property
    def num_steps(self) -> int:
        """Number of steps of a run."""
        return self.program.steps_before(self.program.config.epochs)


class _Curve(Callbacks):
    """Collects the learning curve of a run, and shows its progress.

    Attributes:
      points: a point for each epoch that was evaluated.
      seconds: time of each epoch.
    """

    def __init__(self, compiled: Compiled, reporter: Reporter, text: str):
        self.points: list[Record] = []
        self.seconds: list[float] = []
        self._gradients_per_step = compiled.method.optimizer.gradients_per_step
        self._task = compiled.task
        self._split = compiled.program.config.data.eval_split
        self._reporter, self._text = reporter, text

    def on_steps(self, state: TrainState, count: int, seconds: float) -> None:
        """Shows progress."""
        self._reporter.advance(count)

    def on_epoch(self, state: TrainState, record: Record) -> None:
        """Adds a point to the curve."""
        self.seconds.append(record["seconds"])
        score = record.get(f"{self._split}_{self._task.score}")
        if score is None:
            return
        self.points.append(
            {
                "epoch": record["epoch"],
                "gradient_evaluations": record["step"] * self._gradients_per_step,
                "seconds": sum(self.seconds),
                self._task.score: score,
            }
        )
        self._reporter.describe(f"{self._text}, {self._task.title} {score:.4f}")


def train(compiled: Compiled, seed: int, reporter: Reporter, text: str) -> Row:
    """Trains one method from one seed.

    A run that diverges has the worst score, and says why in the column "failure".

    Args:
      compiled: the method.
      seed: determines all that is random.
      reporter: shows progress.
      text: what it shows beside the score.
    """
    method, program = compiled.method, compiled.program
    curve = _Curve(compiled, reporter, text)
    failure = None
    try:
        train_seed(program, seed, curve)
        score = curve.points[-1][compiled.task.score]
    except NonFiniteLossError as error:
        failure, score = str(error), compiled.worst
    return {
        "method": method.name,
        "seed": seed,
        compiled.task.score: score,
        "ms_per_step": (
            1000 * statistics.median(curve.seconds) / program.steps_before(1)
            if curve.seconds
            else None
        ),
        "gradient_evaluations": (
            compiled.num_steps * method.optimizer.gradients_per_step
        ),
        "failure": failure,
        "environment": environment(),
        "curve": curve.points,
    }


def flat(row: Row) -> Row:
    """Returns a row of the CSV file."""
    flat: dict[str, Any] = {
        k: v for k, v in row.items() if k not in ("curve", "environment")
    }
    return flat | row["environment"]
