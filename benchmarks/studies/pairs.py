"""The command that compares finished run folders of `python -m train`, seed by seed."""

import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from benchmarks.report import make_table, with_range
from benchmarks.studies.statistics import effects_of
from benchmarks.studies.tasks import STUDY_TASKS, StudyTask
from train.errors import UsageError
from train.output.run_folder import CONFIG, RunFolder, read_summary
from train.progress import make_console
from train.run import EPOCHS

Settings = dict[str, Any]

# Runs that differ in these belong to one method.
_OF_A_RUN = (
    *("seed", "seeds", "log_every", "eval_every", "checkpoint_minutes"),
    *("data.data_dir", "data.loader", "data.num_workers"),
)
# Runs that differ in these cannot be compared.
_OF_THE_DATA = ("task", "data.dataset", "data.eval_split")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Runs:
    """Finished runs with the same settings.

    Attributes:
      settings: their settings by dotted names, without those of a single run.
      scores: the score after the last epoch, by seed.
      gradients: gradient evaluations of one run.
    """

    settings: Settings
    scores: dict[int, float]
    gradients: int


def pairs(runs: tyro.conf.Positional[tuple[Path, ...]]) -> None:
    """Compare finished runs with the first of them, seed by seed.

    Args:
      runs: run folders of `python -m train`, each with one seed or several. Those with
        the same settings are one method, and the first one is the baseline.
    """
    methods = group(runs)
    baseline, *others = methods
    if not others:
        raise UsageError(
            "all runs have the same settings: name runs that differ, the baseline first"
        )
    task = STUDY_TASKS[baseline.settings["task"]]
    seeds = sorted(set.intersection(*(set(m.scores) for m in methods)))
    if len(seeds) < 2:
        raise UsageError(
            f"the methods have too few seeds in common, {len(seeds)} of 2 at least: "
            "train each of them with the same --seed and --seeds"
        )
    effects = effects_of([_differences(m, baseline, seeds, task) for m in others])
    names = [_name(method, baseline) for method in others]
    console = make_console()
    console.print(f"baseline: {runs[0]}")
    rows = [("baseline", _mean(baseline, seeds), "", "1.00 x")]
    rows += [
        (
            name,
            _mean(method, seeds),
            with_range(*effect.interval, "+.2f"),
            f"{method.gradients / baseline.gradients:.2f} x",
        )
        for name, method, effect in zip(names, others, effects, strict=True)
    ]
    header = ("method", f"{task.title} %", "difference", "gradients")
    console.print(make_table(header, rows), soft_wrap=False)
    for name, effect in zip(names, effects, strict=True):
        console.print(f"{name}: {effect.verdict(' points')}")
    console.print(f"\nDifferences are paired over the seeds {seeds}.")


def group(folders: Sequence[Path]) -> list[Runs]:
    """Reads run folders, and puts those with the same settings together.

    Raises:
      UsageError: if a folder holds no finished run, if a seed occurs twice, or if runs
        differ in their data.
    """
    found: dict[str, Runs] = {}
    for folder in folders:
        runs = _read(folder)
        key = json.dumps(runs.settings, sort_keys=True)
        old = found.setdefault(key, dataclasses.replace(runs, scores={}))
        if twice := old.scores.keys() & runs.scores.keys():
            raise UsageError(
                f"seed {min(twice)} of these settings is in {folder} and in another "
                "folder: leave one of them out"
            )
        old.scores.update(runs.scores)
    methods = list(found.values())
    if not methods:
        raise UsageError("name the run folders to compare, the baseline first")
    for name in _OF_THE_DATA:
        values = [method.settings[name] for method in methods]
        if len(set(values)) > 1:
            raise UsageError(
                f"runs have different settings of {name}, {values[0]} and "
                f"{next(v for v in values if v != values[0])}: they are not comparable"
            )
    return methods


def _read(folder: Path) -> Runs:
    run = RunFolder(folder, {}, writes=False)
    if not run.is_finished():
        raise UsageError(f"{folder} holds no finished run of python -m train")
    config = json.loads((folder / CONFIG).read_text())["config"]
    score = STUDY_TASKS[config["task"]].score
    name = f"{config['data']['eval_split']}_{score}"
    last = [r for r in run.read(EPOCHS) if r["epoch"] == config["epochs"]]
    return Runs(
        settings={k: v for k, v in _flat(config) if k not in _OF_A_RUN},
        scores={int(record["seed"]): record[name] for record in last},
        gradients=read_summary(folder)["gradient_evaluations"],
    )


def _flat(settings: Settings, prefix: str = "") -> list[tuple[str, Any]]:
    flat = []
    for name, value in settings.items():
        if isinstance(value, dict):
            flat += _flat(value, f"{prefix}{name}.")
        else:
            flat.append((f"{prefix}{name}", value))
    return flat


def _name(method: Runs, baseline: Runs) -> str:
    """Returns what distinguishes a method from the baseline."""
    return ", ".join(
        f"{name.rpartition('.')[2]} {_text(value)}"
        for name, value in method.settings.items()
        if value != baseline.settings.get(name)
    )


def _text(value: Any) -> str:
    return (
        "+".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
    )


def _differences(
    method: Runs, baseline: Runs, seeds: Sequence[int], task: StudyTask
) -> list[float]:
    """Returns by how many points each seed is better than in the baseline."""
    return [
        100 * task.better(method.scores[seed], baseline.scores[seed]) for seed in seeds
    ]


def _mean(method: Runs, seeds: Sequence[int]) -> str:
    scores = [100 * method.scores[seed] for seed in seeds]
    return f"{statistics.mean(scores):.2f} ± {statistics.stdev(scores):.2f}"
