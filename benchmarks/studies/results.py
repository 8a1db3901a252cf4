"""What the rows of a study show: means, differences and verdicts."""

import dataclasses
import math
import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from benchmarks.report import Row, with_range
from benchmarks.studies.methods import Method, compared
from benchmarks.studies.statistics import Effect, effects_of
from benchmarks.studies.tasks import StudyTask

# At equal gradients, a technique is compared with what its cost could buy instead.
_WORTH = {"helps": "worth its cost", "hurts": "not worth its cost"}


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A method beside another one.

    Attributes:
      against: the name of the other method.
      equal: what both have the same number of, epochs or gradients.
      effect: what the paired differences show, in points of percent.
      seconds_ratio: training time of the method divided by that of the other one.
    """

    against: str
    equal: str
    effect: Effect
    seconds_ratio: float

    @property
    def verdict(self) -> str:
        """The result in words."""
        verdict = self.effect.verdict(" points")
        if self.equal == "gradients":
            return _WORTH.get(verdict, verdict)
        return verdict


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """The results of a method over all seeds; scores are in percent.

    Attributes:
      method: the method.
      mean: mean score.
      std: standard deviation of the score.
      failures: number of runs that diverged.
      ms_per_step: median time of a step in milliseconds.
      comparisons: with its baseline first; none for a baseline.
    """

    method: Method
    mean: float
    std: float
    failures: int
    ms_per_step: float
    comparisons: tuple[Comparison, ...]


def complete_seeds(rows: Sequence[Row], methods: Sequence[Method]) -> list[int]:
    """Returns the seeds that all methods have a row of, in increasing order."""
    seeds = [{r["seed"] for r in rows if r["method"] == m.name} for m in methods]
    return sorted(set.intersection(*seeds))


def summarize(
    rows: Sequence[Row], methods: Sequence[Method], task: StudyTask
) -> list[Summary]:
    """Returns means, standard deviations and paired differences over the seeds.

    Seeds that a method has no row of are left out.
    """
    found: dict[str, list[Row]] = defaultdict(list)
    for seed in complete_seeds(rows, methods):
        for row in rows:
            if row["seed"] == seed:
                found[row["method"]].append(row)

    def scores(name: str) -> list[float]:
        return [100 * row[task.score] for row in found[name]]

    times = {m.name: _training_ms(m, found[m.name]) for m in methods}
    pairs = list(compared(methods))
    effects = effects_of(
        [
            list(map(task.better, scores(method.name), scores(against)))
            for method, against, _ in pairs
        ]
    )
    comparisons: dict[str, list[Comparison]] = defaultdict(list)
    for (method, against, equal), effect in zip(pairs, effects, strict=True):
        comparisons[method.name].append(
            Comparison(
                against=against,
                equal=equal,
                effect=effect,
                seconds_ratio=times[method.name] / times[against],
            )
        )
    return [
        Summary(
            method=method,
            mean=statistics.mean(scores(method.name)),
            std=statistics.stdev(scores(method.name)),
            failures=sum(r["failure"] is not None for r in found[method.name]),
            ms_per_step=_median([row["ms_per_step"] for row in found[method.name]]),
            comparisons=tuple(comparisons[method.name]),
        )
        for method in methods
    ]


def _training_ms(method: Method, rows: Sequence[Row]) -> float:
    """Returns the time that the steps of a run take, in milliseconds."""
    gradients = rows[0]["gradient_evaluations"]
    steps = gradients / method.optimizer.gradients_per_step
    return steps * _median([row["ms_per_step"] for row in rows])


def _median(values: Sequence[float | None]) -> float:
    """Returns the median of what was measured; NaN if nothing was."""
    return statistics.median([x for x in values if x is not None] or [math.nan])


def curves_of(rows: Sequence[Row], task: StudyTask) -> dict[str, list[Any]]:
    """Returns the learning curves of each method, without runs that diverged.

    Their points have a "score" that is 1 at best.
    """
    curves = defaultdict(list)
    for row in rows:
        if row["failure"] is None:
            curves[row["method"]].append(
                [p | {"score": 1 - task.error(p[task.score])} for p in row["curve"]]
            )
    return curves


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ToTarget:
    """What the runs of a method need to reach the target of a study.

    The target is the worst final score of the first baseline, so all runs of that reach
    it. It is looked for at each point of the learning curves. A run that does not reach
    it counts as infinity.

    Attributes:
      method: the method.
      reached: number of runs that reach the target.
      runs: number of runs.
      gradients: median number of gradient evaluations.
      seconds: median training time.
    """

    method: Method
    reached: int
    runs: int
    gradients: float
    seconds: float


def to_target(
    rows: Sequence[Row], methods: Sequence[Method], task: StudyTask
) -> tuple[float, list[ToTarget]]:
    """Returns the target of a study, and what each method needs to reach it."""
    seeds = complete_seeds(rows, methods)
    rows = [row for row in rows if row["seed"] in seeds]
    finals = [row[task.score] for row in rows if row["method"] == methods[0].name]
    target = max(finals) if task.lower_is_better else min(finals)
    never = {"gradient_evaluations": math.inf, "seconds": math.inf}
    found = []
    for method in methods:
        first = [
            next(
                (p for p in row["curve"] if task.better(p[task.score], target) >= 0),
                never,
            )
            for row in rows
            if row["method"] == method.name
        ]
        found.append(
            ToTarget(
                method=method,
                reached=sum(point is not never for point in first),
                runs=len(first),
                gradients=statistics.median(p["gradient_evaluations"] for p in first),
                seconds=statistics.median(point["seconds"] for point in first),
            )
        )
    return target, found


######## As text ######################################################################


def header(task: StudyTask) -> tuple[str, ...]:
    """Returns the header of the table of methods."""
    return (
        "method",
        "grads/step",
        f"{task.title} %",
        "against its baseline",
        "ms/step",
    )


def cells_of(summary: Summary) -> tuple[str, ...]:
    """Returns the row of a method in the table of methods."""
    method = summary.method
    failed = f" ({summary.failures} diverged)" if summary.failures else ""
    against = "baseline"
    if summary.comparisons:
        against = difference(summary.comparisons[0])
    return (
        method.name,
        str(method.optimizer.gradients_per_step),
        f"{summary.mean:.2f} ± {summary.std:.2f}{failed}",
        against,
        f"{summary.ms_per_step:.1f}",
    )


VERDICT_HEADER = (
    *("technique", "against", "at equal", "difference", "p (Holm)", "p (sign flips)"),
    *("seeds better", "time", "verdict"),
)


def verdict_cells(summary: Summary) -> list[tuple[str, ...]]:
    """Returns the rows of a method in the table of verdicts."""
    return [
        (
            summary.method.name,
            comparison.against,
            comparison.equal,
            difference(comparison),
            _p_value(comparison.effect.p_value),
            _p_value(comparison.effect.p_sign_flips),
            f"{100 * comparison.effect.improved:.0f} %",
            f"{comparison.seconds_ratio:.2f} x",
            comparison.verdict,
        )
        for comparison in summary.comparisons
    ]


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "< 0.001"


def verdict_lines(summary: Summary) -> list[str]:
    """Returns a sentence for each comparison of a method."""
    return [
        f"{summary.method.name}: {comparison.verdict}\n"
        f"  {difference(comparison)} against {comparison.against}, at equal "
        f"{comparison.equal} and {comparison.seconds_ratio:.2f} times the time"
        for comparison in summary.comparisons
    ]


def difference(comparison: Comparison) -> str:
    """Returns the mean difference with its interval, in points."""
    return with_range(*comparison.effect.interval, "+.2f")


def about_differences(seeds: int, task: StudyTask) -> str:
    """Returns what the numbers of the tables are."""
    better = "a lower error" if task.lower_is_better else "a higher score"
    return (
        f"Differences are points of {task.title}, paired over {seeds} seeds, with 95 % "
        f"intervals (Student's t); above zero is {better}. Verdicts count all "
        "comparisons of the study (Holm's correction), so in at least 19 of 20 studies "
        "without any effect none is found. Runs that diverged count."
    )


TARGET_HEADER = ("method", "runs that reach it", "steps", "gradients", "seconds")


def target_cells(found: ToTarget) -> tuple[str, ...]:
    """Returns the row of a method in the table of what the target takes."""
    steps = found.gradients / found.method.optimizer.gradients_per_step
    return (
        found.method.name,
        f"{found.reached} of {found.runs}",
        _count(steps),
        _count(found.gradients),
        _count(found.seconds, ",.1f"),
    )


def _count(value: float, spec: str = ",.0f") -> str:
    return format(value, spec) if math.isfinite(value) else "never"


def about_target(target: float, task: StudyTask) -> str:
    """Returns what the target is, in words."""
    side = "at most" if task.lower_is_better else "at least"
    return (
        f"The target is {task.title} of {side} {100 * target:.2f} %, which every run "
        "of the first baseline has at its end. Medians over the seeds; a run that does "
        "not reach the target counts as infinity."
    )
