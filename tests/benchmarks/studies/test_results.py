"""Rows, tables and verdicts, from runs that cost nothing."""

import math

import pytest

from benchmarks.report import make_table
from benchmarks.studies import runs
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import methods_of
from benchmarks.studies.results import (
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
from benchmarks.studies.tasks import STUDY_TASKS
from tests.shared import printed_lines
from train import data
from train.progress import Reporter
from train.run import NonFiniteLossError

DIGITS = STUDY_TASKS["classification"]
METHODS = methods_of(DIGITS)
CENTRALIZE = methods_of(DIGITS, ["centralize"])


class Finished:
    """A program whose steps cost nothing."""

    def __init__(self, config):
        self.config = config

    def steps_before(self, epoch):
        return 10 * epoch


def compiled(method, *, epochs=3, worst=0.1):
    config = CompareConfig(task="classification")
    program = Finished(config.run_config(method, epochs, 100))
    return runs.Compiled(method=method, program=program, task=DIGITS, worst=worst)


def test_a_curve_counts_gradients_and_seconds_from_the_start(monkeypatch):
    method = METHODS[-1]
    assert method.optimizer.gradients_per_step == 2

    def train_seed(program, seed, callbacks):
        for epoch, seconds in enumerate((1.0, 2.0, 6.0), start=1):
            callbacks.on_steps(None, 10, seconds)
            accuracy = {"test_accuracy": 0.1 * epoch}
            record = {"epoch": epoch, "step": 10 * epoch, "seconds": seconds}
            callbacks.on_epoch(None, record | accuracy)

    monkeypatch.setattr(runs, "train_seed", train_seed)
    reporter = Reporter("", 30)
    row = runs.train(compiled(method), 4, reporter, "seed 5")
    assert reporter.done == 30
    assert reporter.text == "seed 5, accuracy 0.3000"
    assert [point["epoch"] for point in row["curve"]] == [1, 2, 3]
    assert [p["gradient_evaluations"] for p in row["curve"]] == [20, 40, 60]
    assert [point["seconds"] for point in row["curve"]] == [1.0, 3.0, 9.0]
    assert (row["method"], row["seed"], row["failure"]) == (method.name, 4, None)
    assert (row["accuracy"], row["gradient_evaluations"]) == (0.1 * 3, 60)
    assert row["ms_per_step"] == pytest.approx(200)  # the median epoch


def test_a_run_that_diverges_has_the_worst_score(monkeypatch):
    def train_seed(program, seed, callbacks):
        raise NonFiniteLossError(seed, step=3, epoch=1)

    monkeypatch.setattr(runs, "train_seed", train_seed)
    row = runs.train(compiled(METHODS[0], worst=0.25), 0, Reporter("", 0), "")
    assert row["accuracy"] == 0.25
    assert "not finite at step 3" in row["failure"]
    assert (row["curve"], row["ms_per_step"]) == ([], None)
    assert curves_of([row], DIGITS) == {}


def test_the_worst_scores_are_those_of_who_learns_nothing():
    digits = data.load("digits")
    assert DIGITS.worst(digits, "test") == 0.1
    assert STUDY_TASKS["translation"].worst(digits, "test") == 1.0
    # Of all labels as pixels: the commonest class alone is found.
    counts = digits.class_counts["test"]
    expected = counts.max() / counts.sum() / 10
    found = STUDY_TASKS["segmentation"].worst(digits, "test")
    assert found == pytest.approx(expected)


def made_up_rows(scores, *, score="accuracy", failure=None, ms_per_step=1.0):
    return [
        {
            "method": name,
            "seed": seed,
            score: value,
            "ms_per_step": ms_per_step,
            "gradient_evaluations": 60,
            "failure": failure,
        }
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]


def test_the_verdict_follows_the_figures():
    rows = made_up_rows({"sgd": [0.90, 0.91, 0.92], "centralize": [0.80, 0.81, 0.83]})
    _, centralize = summarize(rows, CENTRALIZE, DIGITS)
    assert centralize.mean == pytest.approx(81.333, abs=1e-3)
    assert centralize.std == pytest.approx(1.5275, abs=1e-3)
    (comparison,) = centralize.comparisons
    assert comparison.effect.interval.mean == pytest.approx(-29 / 3)
    assert (comparison.against, comparison.equal) == ("sgd", "epochs")
    assert comparison.seconds_ratio == 1
    (line,) = verdict_lines(centralize)
    assert line.startswith("centralize: hurts\n  -9.67 [-11.10, -8.23] against sgd, at")
    (cells,) = verdict_cells(centralize)
    assert cells[3:] == (
        *("-9.67 [-11.10, -8.23]", "0.001", "0.250", "0 %", "1.00 x", "hurts"),
    )
    assert "paired over 3 seeds" in about_differences(3, DIGITS)


def test_a_lower_error_is_better():
    task = STUDY_TASKS["translation"]
    methods = methods_of(task, ["centralize"])
    scores = {"adam": [0.20, 0.21, 0.22], "centralize": [0.10, 0.11, 0.13]}
    _, summary = summarize(made_up_rows(scores, score="l1"), methods, task)
    assert summary.mean == pytest.approx(34 / 3)
    assert summary.comparisons[0].effect.interval.mean == pytest.approx(29 / 3)
    assert summary.comparisons[0].verdict == "helps"
    assert "above zero is a lower error" in about_differences(3, task)


def test_two_gradients_per_step_are_compared_twice():
    names = ("sgd", "sgd, 2x epochs", "perturbed_unit_step")
    values = ([0.90, 0.91, 0.92], [0.94, 0.96, 0.97], [0.95, 0.955, 0.975])
    rows = made_up_rows(dict(zip(names, values, strict=True)))
    methods = methods_of(DIGITS, ["perturbed_unit_step"])
    *_, pugd = summarize(rows, methods, DIGITS)
    found = [(c.against, c.equal) for c in pugd.comparisons]
    assert found == [("sgd", "epochs"), ("sgd, 2x epochs", "gradients")]
    verdicts = [c.verdict.partition(";")[0] for c in pugd.comparisons]
    assert verdicts == ["helps", "no difference found"]
    assert {c.effect.comparisons for c in pugd.comparisons} == {2}
    # As many gradients in half as many steps, each of which took as long.
    assert [c.seconds_ratio for c in pugd.comparisons] == [0.5, 0.5]


def test_a_seed_that_is_not_finished_is_left_out():
    rows = made_up_rows({"sgd": [0.9, 0.8, 0.7], "centralize": [0.9, 0.8]})
    assert complete_seeds(rows, CENTRALIZE) == [0, 1]
    sgd, _ = summarize(rows, CENTRALIZE, DIGITS)
    assert sgd.mean == pytest.approx(85)


def test_runs_that_diverged_stay_in_the_table():
    good = made_up_rows({"sgd": [0.9, 0.8]})
    bad = made_up_rows(
        {"centralize": [0.1, 0.1]}, failure="not finite", ms_per_step=None
    )
    _, centralize = summarize(good + bad, CENTRALIZE, DIGITS)
    assert centralize.failures == 2
    assert cells_of(centralize)[2] == "10.00 ± 0.00 (2 diverged)"
    assert cells_of(centralize)[-1] == "nan"
    assert centralize.comparisons[0].effect.interval.mean == pytest.approx(-75)


def test_80_columns_hold_the_table():
    rows = made_up_rows({m.name: [0.9811, 0.9922, 0.9788] for m in METHODS})
    cells = [cells_of(summary) for summary in summarize(rows, METHODS, DIGITS)]
    lines = printed_lines(make_table(header(DIGITS), cells), width=80)
    assert len(lines) == 2 + len(METHODS)
    for line, method in zip(lines[2:], METHODS, strict=True):
        assert line.startswith(method.name)


def target_row(method, seed, scores, name="accuracy"):
    curve = [
        {"epoch": i, "gradient_evaluations": 10 * i, "seconds": 2.0 * i, name: score}
        for i, score in enumerate(scores, start=1)
    ]
    last = scores[-1] if scores else 0.1
    return {"method": method, "seed": seed, "curve": curve, name: last}


def test_the_target_is_what_every_run_of_the_baseline_reaches():
    rows = [
        *(target_row("sgd", i, s) for i, s in enumerate([[0.5, 0.9], [0.8, 0.7]])),
        target_row("centralize", 0, [0.7, 0.1]),  # it counts when it is reached
        target_row("centralize", 1, [0.6, 0.69]),
        target_row("centralize", 2, [0.9]),  # the baseline has no such seed
    ]
    target, (sgd, centralize) = to_target(rows, CENTRALIZE, DIGITS)
    assert target == 0.7
    assert (sgd.reached, sgd.runs, sgd.gradients, sgd.seconds) == (2, 2, 15, 3.0)
    assert target_cells(sgd) == ("sgd", "2 of 2", "15", "15", "3.0")
    assert (centralize.reached, centralize.gradients) == (1, math.inf)
    assert target_cells(centralize)[1:] == ("1 of 2", "never", "never", "never")
    assert "accuracy of at least 70.00 %" in about_target(target, DIGITS)


def test_a_target_of_errors_is_reached_from_above_and_steps_take_two_gradients():
    task = STUDY_TASKS["translation"]
    methods = methods_of(task, ["sam"])
    rows = [
        target_row(m.name, i, [0.3, 0.2 - 0.01 * i], "l1")
        for m in methods
        for i in (0, 1)
    ]
    target, (_, _, sam) = to_target(rows, methods, task)
    assert target == 0.2
    assert target_cells(sam) == ("sam", "2 of 2", "10", "20", "4.0")


def test_a_run_that_diverged_does_not_reach_the_target():
    rows = [target_row(m.name, i, [0.5]) for m in CENTRALIZE for i in (0, 1)]
    rows[-1] |= {"curve": [], "accuracy": 0.1}
    _, (_, centralize) = to_target(rows, CENTRALIZE, DIGITS)
    assert centralize.reached == 1
