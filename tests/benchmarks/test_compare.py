"""The study as its user runs it, as small as it can be."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import optax_tricks
from benchmarks import compare
from benchmarks.compare import METHODS, CompareConfig, conclusion, summarize
from benchmarks.report import make_table
from tests.shared import printed_lines
from train.errors import UsageError
from train.optim.techniques import TECHNIQUES
from train.progress import Reporter
from train.run import NonFiniteLossError

ROOT = Path(__file__).parents[2]
SMALL = ("compare", "classification", "--dataset", "digits", "--epochs", "1")
METHOD_NAMES = [method.name for method in METHODS]

pytestmark = pytest.mark.usefixtures("one_device")


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
    compared = [m for m in METHODS if m.optimizer.techniques]
    names = [name for name in TECHNIQUES if name in optax_tricks.__all__]
    assert len(names) >= 4
    assert [m.optimizer.techniques for m in compared] == [(name,) for name in names]
    assert [m.name for m in compared] == names
    for method in compared:
        baseline = by_name[method.baseline]
        assert not baseline.optimizer.techniques
        assert baseline.epochs_factor == 1
        if method.optimizer.gradients_per_step == 2:
            assert by_name[method.equal_gradients].epochs_factor == 2


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_a_study_is_run_once_and_finished_where_it_stopped(
    run, monkeypatch, tmp_path, capsys
):
    compiled = []
    open_program = compare.open_program

    def count(config):
        compiled.append(config.optimizer.techniques)
        return open_program(config)

    monkeypatch.setattr(compare, "open_program", count)
    folder = tmp_path / "study"
    arguments = (*SMALL, "--seeds", "2", "--run-dir", folder)
    run(*arguments)
    printed = capsys.readouterr().out
    first = rows(folder)
    assert len(first) == 3 * 2
    # Each method is compiled once for all seeds.
    assert compiled == [(), (), ("perturbed_unit_step",)]
    for name in ("sgd, 2x epochs", "perturbed_unit_step", "paired over 2 seeds"):
        assert name in printed
    table = [line for line in printed.splitlines() if " ± " in line]
    assert len(table) == 3
    assert max(map(len, table)) <= 80
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
    run(*arguments)
    second = rows_without_broken(folder)
    assert [(r["method"], r["seed"]) for r in second] == [
        (r["method"], r["seed"]) for r in first
    ]
    assert second[:4] == first[:4]
    assert [r["accuracy"] for r in second] == [r["accuracy"] for r in first]

    # Finished: nothing is trained, the table comes at once.
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(compare, "open_program", None)
    monkeypatch.setattr(compare, "train_seed", None)
    run(*arguments)
    assert (folder / "rows.jsonl").read_bytes() == before

    # Another study does not go into the folder.
    with pytest.raises(SystemExit, match="epochs: 1 in the folder, now 2"):
        run(*arguments, "--epochs", 2)


def rows_without_broken(folder):
    text = (folder / "rows.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


@pytest.mark.usefixtures("quick")
def test_a_folder_that_cannot_be_written_fails_before_training(
    run, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(compare, "open_program", None)
    with pytest.raises(SystemExit, match="cannot write to run folder"):
        run(*SMALL, "--run-dir", tmp_path / "file" / "study")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": 1}, "seeds must be greater than or equal to 2, got 1"),
        ({"epochs": 0}, "epochs must be greater than 0, got 0"),
        ({"batch_size": 0}, "batch_size must be greater than 0, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"model": "resnet9"}, "unknown model 'resnet9'; known: "),
        ({"eval_split": "train"}, "eval_split must be 'test' or 'validation', got "),
    ],
)
def test_wrong_settings_are_refused_from_python_too(setting, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        CompareConfig(**setting)


def test_a_learning_rate_replaces_that_of_every_method():
    for method in METHODS:
        own = CompareConfig().task_config(method).optimizer
        assert own == method.optimizer
        changed = CompareConfig(learning_rate=0.7).task_config(method).optimizer
        assert changed.learning_rate == 0.7
        assert changed.techniques == own.techniques


class Finished:
    """A program whose steps cost nothing."""

    def __init__(self, config):
        self.config = config

    def steps_before(self, epoch):
        return 10 * epoch


def test_a_curve_counts_gradients_and_seconds_from_the_start(monkeypatch):
    method = METHODS[-1]
    assert method.optimizer.gradients_per_step == 2
    program = Finished(CompareConfig(epochs=3).task_config(method))
    compiled = compare._Compiled(method=method, program=program, num_classes=10)

    def train_seed(program, seed, callbacks):
        for epoch, seconds in enumerate((1.0, 2.0, 6.0), start=1):
            callbacks.on_steps(None, 10, seconds)
            accuracy = {"test_accuracy": 0.1 * epoch}
            record = {"epoch": epoch, "step": 10 * epoch, "seconds": seconds}
            callbacks.on_epoch(None, record | accuracy)

    monkeypatch.setattr(compare, "train_seed", train_seed)
    reporter = Reporter("", 30)
    row = compare._run(compiled, 4, reporter, "seed 5")
    assert reporter.done == 30
    assert reporter.text == "seed 5, accuracy 0.3000"
    assert [point["epoch"] for point in row["curve"]] == [1, 2, 3]
    assert [p["gradient_evaluations"] for p in row["curve"]] == [20, 40, 60]
    assert [point["seconds"] for point in row["curve"]] == [1.0, 3.0, 9.0]
    assert (row["method"], row["seed"], row["failure"]) == (method.name, 4, None)
    assert (row["accuracy"], row["gradient_evaluations"]) == (0.1 * 3, 60)
    assert row["ms_per_step"] == pytest.approx(200)  # the median epoch


def test_a_run_that_diverges_has_the_accuracy_of_guessing(monkeypatch):
    method = METHODS[0]
    program = Finished(CompareConfig().task_config(method))
    compiled = compare._Compiled(method=method, program=program, num_classes=4)

    def train_seed(program, seed, callbacks):
        raise NonFiniteLossError(seed, step=3, epoch=1)

    monkeypatch.setattr(compare, "train_seed", train_seed)
    row = compare._run(compiled, 0, Reporter("", 0), "")
    assert row["accuracy"] == 0.25
    assert "not finite at step 3" in row["failure"]
    assert (row["curve"], row["ms_per_step"]) == ([], None)
    assert compare._curves([row]) == {}


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
    assert "(2 diverged)" in compare.cells_of(summary)[2]


def test_80_columns_hold_the_table():
    names = {m.name: ([0.9811, 0.9922, 0.9788], None) for m in METHODS}
    cells = [compare.cells_of(s) for s in summarize(made_up_rows(**names))]
    lines = printed_lines(make_table(compare.HEADER, cells), width=80)
    assert len(lines) == 2 + len(METHODS)
    for line, method in zip(lines[2:], METHODS, strict=True):
        assert line.startswith(method.name)


# The process is killed while it writes a row, when three are written.
_KILLED = """
import os, signal
from train.output.run_folder import RunFolder
import benchmarks.__main__ as command_line

append, count = RunFolder.append, 0

def append_or_die(folder, name, record):
    global count
    if count == 3:
        with (folder.path / name).open("a") as file:
            file.write('{"method": ')
        os.kill(os.getpid(), signal.SIGKILL)
    count += 1
    append(folder, name, record)

RunFolder.append = append_or_die
command_line.main()
"""


@pytest.mark.slow
def test_a_study_that_was_killed_is_finished_by_the_same_command(run, tmp_path, capsys):
    folder = tmp_path / "study"
    arguments = (*SMALL, "--seeds", "2", "--run-dir", str(folder))
    command = [sys.executable, "-c", _KILLED, *arguments]
    process = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    kept = rows_without_broken(folder)
    assert [row["method"] for row in kept] == METHOD_NAMES[:3]
    assert not (folder / "table.md").exists()

    run(*arguments)
    finished = rows_without_broken(folder)
    assert finished[:3] == kept
    assert [(row["method"], row["seed"]) for row in finished] == [
        (name, seed) for seed in range(2) for name in METHOD_NAMES
    ]
    printed = capsys.readouterr().out
    table = (folder / "table.md").read_text()
    for name in METHOD_NAMES:
        assert name in printed
        assert f"| {name} |" in table
