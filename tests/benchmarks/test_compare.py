"""The study as its user runs it, as small as it can be."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import benchmarks.__main__ as command_line
from benchmarks import compare
from benchmarks.compare import METHODS, CompareConfig, conclusion, summarize
from train.errors import UsageError

ROOT = Path(__file__).parents[2]
SMALL = ("compare", "classification", "--dataset", "digits", "--epochs", "1")
METHOD_NAMES = [method.name for method in METHODS]

pytestmark = pytest.mark.usefixtures("one_device")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", *map(str, arguments)])
    command_line.main()


def rows(folder):
    return [json.loads(x) for x in (folder / "rows.jsonl").read_text().splitlines()]


@pytest.fixture
def quick(monkeypatch):
    """Three methods instead of all, since each takes seconds to compile."""
    few = [
        m for m in METHODS if m.name in ("sgd", "sgd, 2x epochs", "perturbed_unit_step")
    ]
    monkeypatch.setattr(compare, "METHODS", few)


def test_every_technique_has_a_baseline_that_differs_by_it_alone():
    by_name = {method.name: method for method in METHODS}
    compared = [m for m in METHODS if m.optimizer.tricks]
    assert {m.optimizer.tricks for m in compared} == {
        ("scale_by_random",),
        ("centralize",),
        ("barzilai_borwein_step",),
        ("perturbed_unit_step",),
    }
    for method in compared:
        baseline = by_name[method.baseline]
        assert not baseline.optimizer.tricks
        assert baseline.epochs_factor == 1
        if method.optimizer.gradients_per_step == 2:
            assert by_name[method.equal_gradients].epochs_factor == 2


@pytest.mark.usefixtures("quick")
def test_a_study_is_run_once_and_finished_where_it_stopped(
    monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "study"
    arguments = (*SMALL, "--seeds", "2", "--run-dir", folder)
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    first = rows(folder)
    assert len(first) == 3 * 2
    for name in ("sgd, 2x epochs", "perturbed_unit_step", "paired over 2 seeds"):
        assert name in printed
    assert "…" not in printed  # 80 columns hold the table
    assert (folder / "learning_curves.png").stat().st_size > 10_000
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in first]
    assert all(0 < float(row["accuracy"]) <= 1 for row in table)
    assert {row["gradient_evaluations"] for row in table} == {"10", "20"}
    assert all(row["jax"] and row["device"] and row["commit"] for row in table)

    # Two rows lost, one cut off in the middle: only these run again, to the same end.
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    run(monkeypatch, *arguments)
    second = rows_without_broken(folder)
    assert [(r["method"], r["seed"]) for r in second] == [
        (r["method"], r["seed"]) for r in first
    ]
    assert second[:4] == first[:4]
    assert [r["accuracy"] for r in second] == [r["accuracy"] for r in first]

    # Finished: nothing is trained, the table comes at once.
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(compare, "fit", None)
    run(monkeypatch, *arguments)
    assert (folder / "rows.jsonl").read_bytes() == before

    # Another study does not go into the folder.
    with pytest.raises(SystemExit, match="epochs: 1 there, 2 here"):
        run(monkeypatch, *arguments, "--epochs", 2)


def rows_without_broken(folder):
    text = (folder / "rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_written_fails_before_training(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(compare, "build", None)
    with pytest.raises(SystemExit, match="cannot write to run folder"):
        run(monkeypatch, *SMALL, "--run-dir", tmp_path / "file" / "study")


def test_too_few_seeds_are_refused():
    with pytest.raises(UsageError, match="at least 2 to compare, got 1"):
        CompareConfig(seeds=1)


def made_up_rows(**accuracies):
    return [
        {"method": name, "seed": seed, "accuracy": a, "ms_per_step": 1.0, "failure": f}
        for name, (values, f) in accuracies.items()
        for seed, a in enumerate(values)
    ]


def test_the_verdict_follows_the_figures():
    found = made_up_rows(
        sgd=([0.90, 0.91, 0.92], None),
        centralize=([0.80, 0.81, 0.83], None),
    )
    centralize = summarize(found)[1]
    assert centralize.mean == pytest.approx(81.333, abs=1e-3)
    assert centralize.std == pytest.approx(1.5275, abs=1e-3)
    assert centralize.versus_baseline.mean == pytest.approx(-29 / 3)
    assert "centralize: worse against sgd" in conclusion(summarize(found), 3)


def test_runs_that_diverged_stay_in_the_table():
    found = made_up_rows(sgd=([0.9, 0.1], "not finite"))
    summary = summarize(found)[0]
    assert summary.failures == 2
    assert "(2 diverged)" in compare._cells(summary)[2]


@pytest.mark.slow
def test_a_study_killed_at_any_moment_is_finished_by_the_same_command(tmp_path):
    folder = tmp_path / "study"
    command = [sys.executable, "-m", "benchmarks", *SMALL, "--seeds", "2"]
    command += ["--run-dir", str(folder)]

    def start():
        return subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, env=os.environ, text=True
        )

    process = start()
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        done = rows_without_broken(folder) if (folder / "rows.jsonl").exists() else []
        if len(done) >= 3:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = rows_without_broken(folder)
    assert 3 <= len(kept) < 2 * len(METHODS)
    assert not (folder / "table.md").exists()

    output, _ = start().communicate(timeout=300)
    finished = rows_without_broken(folder)
    assert finished[: len(kept)] == kept
    assert {(r["method"], r["seed"]) for r in finished} == {
        (name, seed) for name in METHOD_NAMES for seed in range(2)
    }
    assert len(finished) == 2 * len(METHODS)
    for name in METHOD_NAMES:
        assert name in output
