"""The command that says which technique helps."""

import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.report import ROWS, Report, markdown, open_report
from benchmarks.studies import page
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import Method
from benchmarks.studies.results import (
    TARGET_HEADER,
    VERDICT_HEADER,
    about_differences,
    about_target,
    cells_of,
    complete_seeds,
    curves_of,
    header,
    summarize,
    target_cells,
    to_target,
    verdict_cells,
    verdict_lines,
)
from benchmarks.studies.runners import runners
from benchmarks.studies.runs import flat
from benchmarks.studies.study import Plan, run_study
from benchmarks.studies.tuning import about_trials, tuned_methods
from train import plots
from train.output.run_folder import new_path

_CURVES = "learning_curves.png"


def compare(
    config: Annotated[CompareConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Train a baseline and each technique over the same seeds, and say which helped.

    Args:
      config: settings of the study.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same study, only the missing runs are trained.
    """
    start = time.monotonic()
    run_dir = run_dir or new_path(f"compare-{config.task}-{config.data.dataset}")
    with _open(config, run_dir) as report, runners(config, run_dir, join):
        methods = tuned_methods(config, report)
        plan = run_study(config, methods, report, start)
        _write_results(config, methods, plan, report)


def join(config: CompareConfig, run_dir: Path) -> None:
    """Trains runs of a study that another process has planned."""
    with _open(config, run_dir, quiet=True) as report:
        methods = tuned_methods(config, report)
        run_study(config, methods, report, time.monotonic(), follows=True)


def _open(
    config: CompareConfig, run_dir: Path, *, quiet: bool = False
) -> contextlib.AbstractContextManager[Report]:
    share = config.budget is None  # which is for one process
    return open_report(
        "", config.described(), run_dir, resume=True, quiet=quiet, share=share
    )


def _write_results(
    config: CompareConfig, methods: Sequence[Method], plan: Plan, report: Report
) -> None:
    """Writes rows, figure, tables and page, and prints what they show."""
    task, rows = config.study_task, report.folder.read(ROWS)
    summaries = summarize(rows, methods, task)
    seeds = complete_seeds(rows, methods)
    cells = [cells_of(summary) for summary in summaries]
    lines = [line for summary in summaries for line in verdict_lines(summary)]
    verdicts = [row for summary in summaries for row in verdict_cells(summary)]
    about = about_differences(len(seeds), task)
    target, needed = to_target(rows, methods, task)
    times, about_times = list(map(target_cells, needed)), about_target(target, task)

    report.save_rows([flat(row) for row in rows])
    plots.save_learning_curves(
        curves_of(rows, task),
        report.folder.path / _CURVES,
        score="score",
        ylabel=f"{config.data.eval_split} {task.error_title} (%)",
        baselines=[m.name for m in methods if m.baseline is None],
    )
    report.folder.write_text(
        "table.md",
        f"{markdown(header(task), cells)}\n{markdown(VERDICT_HEADER, verdicts)}\n"
        f"{about}\n\n{markdown(TARGET_HEADER, times)}\n{about_times}\n",
    )
    report.folder.write_text(
        "report.html",
        page.render(
            title=f"Which technique helps {config.task} on {config.data.dataset}?",
            summaries=summaries,
            task=task,
            subtitle=f"{len(methods)} methods, {len(seeds)} seeds each; "
            f"{task.title} on {plan.eval_examples:,} {config.data.eval_split} examples",
            settings=_settings(config, methods[0], plan, len(seeds)),
            about=about,
            times=times,
            about_times=about_times,
            figure=(report.folder.path / _CURVES).read_bytes(),
            environment=rows[-1]["environment"],
            command=shlex.join(["python", "-m", "benchmarks", *sys.argv[1:]]),
        ),
    )
    report.show(header(task), cells)
    report.console.print("\n".join(["", *lines, "", about]))


def _settings(
    config: CompareConfig, method: Method, plan: Plan, seeds: int
) -> dict[str, str]:
    """Returns the settings of a study, in words."""
    run = config.run_config(method, plan.epochs, plan.batch_size)
    return {
        "dataset": run.data.dataset,
        "network": str(getattr(run, config.study_task.network)),
        "image size": "{} x {}".format(*plan.image_size),
        "training examples": f"{plan.train_examples:,}",
        f"{config.data.eval_split} examples": f"{plan.eval_examples:,}",
        "seeds": f"{seeds}, the same for all methods",
        "epochs": str(plan.epochs),
        "batch size": str(plan.batch_size),
        "augmentation": ", ".join(run.data.augment) or "none",
        "learning rates": about_trials(config),
    }
