"""How fast training steps are: beside PyTorch's, with techniques, and in parts."""

import dataclasses
import functools
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import tyro

from benchmarks.compile import NONE
from benchmarks.report import ROWS, Report, Row, open_report, with_range
from benchmarks.step_times import (
    NETWORKS,
    TASKS,
    StepTime,
    measure_accumulation,
    measure_network,
    measure_task,
    measure_techniques,
)
from benchmarks.timing import Ratio
from train.output.run_folder import environment
from train.progress import shown_on
from train.settings import NameList, Positive, settings

TABLES = {
    "network": "networks beside PyTorch",
    "task": "steps of the tasks beside those of their networks alone",
    "technique": "steps with each technique",
    "accumulation": "steps whose gradients are added up in parts",
}
_WITH_TECHNIQUES = "resnet20"
_ACCUMULATED = [
    (network, technique)
    for network in ("resnet20", "unet_small")
    for technique in (NONE, "perturbed_unit_step")
]


@settings
class SpeedConfig:
    """Time training steps, beside PyTorch's and beside each other."""

    tables: Annotated[tuple[str, ...], NameList("table", TABLES)] = tuple(TABLES)
    """Tables to fill: network, task, technique, accumulation."""
    networks: Annotated[
        tuple[str, ...], NameList("network", dict.fromkeys(NETWORKS, ""))
    ] = tuple(NETWORKS)
    """Networks of the first table."""
    rounds: Positive[int] = 7
    """Number of rounds; everything runs once in a round."""
    torch_compile: bool = True
    """Whether to time torch.compile too, which needs a C++ compiler."""


def speed(
    config: Annotated[SpeedConfig, tyro.conf.OmitArgPrefixes],
    run_dir: Path | None = None,
) -> None:
    """Time training steps, beside PyTorch's and beside each other.

    Args:
      config: what to time.
      run_dir: folder of the results; a new one under runs/ if unset. If it holds a part
        of the same results, only what is missing is measured.
    """
    versions = _torch_version()
    described = dataclasses.asdict(config) | versions
    with open_report("speed", described, run_dir, resume=True) as report:
        if not versions:
            report.console.print(
                "PyTorch is not installed, so our steps are timed alone; to compare, "
                "run: pip install --group parity"
            )
        _measure_missing(config, versions, report)
        rows = [row for job in report.folder.read(ROWS) for row in job["rows"]]
        report.save_rows(rows)
        for table in config.tables:
            found = [cells(row) for row in rows if row["table"] == table]
            report.show(HEADERS[table], found, TABLES[table])


def _measure_missing(
    config: SpeedConfig, versions: dict[str, str], report: Report
) -> None:
    folder = report.folder
    done = {row["job"] for row in folder.read(ROWS)}
    jobs = _jobs(config, pytorch=bool(versions))
    missing = {name: measure for name, measure in jobs.items() if name not in done}
    folder.start()
    with shown_on(report.console)("measuring", len(missing)) as reporter:
        for name, measure in missing.items():
            reporter.describe(name)
            where = environment() | versions
            rows = [_flat(row) | where for row in measure()]
            folder.append(ROWS, {"job": name, "rows": rows})
            jax.clear_caches()
            reporter.advance()


def _jobs(
    config: SpeedConfig, *, pytorch: bool
) -> dict[str, Callable[[], Sequence[StepTime]]]:
    """Returns what to measure, by name; what is in one job takes turns."""
    jobs: dict[str, dict[str, Callable[[], Sequence[StepTime]]]] = {
        "network": {
            name: functools.partial(
                measure_network,
                name,
                config.rounds,
                pytorch=pytorch,
                compiled=config.torch_compile,
            )
            for name in config.networks
        },
        "task": {
            f"task, {name}": functools.partial(measure_task, name, config.rounds)
            for name in TASKS
        },
        "technique": {
            "techniques": functools.partial(
                measure_techniques, _WITH_TECHNIQUES, config.rounds
            )
        },
        "accumulation": {
            f"accumulation, {name}, {technique}": functools.partial(
                measure_accumulation, name, technique, config.rounds
            )
            for name, technique in _ACCUMULATED
        },
    }
    return {name: job for table in config.tables for name, job in jobs[table].items()}


def _torch_version() -> dict[str, str]:
    try:
        torch = importlib.import_module("torch")
    except ImportError:
        return {}
    return {"torch": torch.__version__}


def _flat(measured: StepTime) -> Row:
    row = dataclasses.asdict(measured)
    ratios = row.pop("ratio") or (None,) * len(Ratio._fields)
    names = (f"ratio_{name}" for name in Ratio._fields)
    return row | dict(zip(names, ratios, strict=True))


_OURS = ("ms", "of limit")
_LAST = ("ratio", "MB", "compile s")
HEADERS = {
    "network": ("network", "batch", *_OURS, "eager ms", "compiled ms", *_LAST),
    "task": ("network", "batch", *_OURS, *_LAST),
    "technique": ("technique", *_OURS, *_LAST),
    "accumulation": ("network", "technique", "parts", *_OURS, *_LAST),
}


def cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Returns a row of the table that it is in, under `HEADERS`.

    Our compilation time is followed by that of `torch.compile`.
    """

    def number(key: str, scale: float = 1.0) -> str:
        return f"{scale * float(row[key]):.0f}" if row[key] not in (None, "") else ""

    median, low, high = (row[f"ratio_{key}"] for key in ("median", "low", "high"))
    compile_seconds = (number("compile_seconds"), number("torch_compile_seconds"))
    by_name = {
        "network": row["network"],
        "batch": f"{row['batch_size']}x{row['image_size']}",
        "technique": row["technique"],
        "parts": str(row["grad_accum"]),
        "ms": number("seconds", 1000),
        "of limit": f"{float(row['share_of_limit']):.0%}",
        "eager ms": number("eager_seconds", 1000),
        "compiled ms": number("compiled_seconds", 1000),
        "ratio": with_range(float(median), float(low), float(high)) if low else "",
        "MB": number("step_bytes", 1e-6),
        "compile s": ", ".join(filter(None, compile_seconds)),
    }
    return tuple(by_name[name] for name in HEADERS[row["table"]])
