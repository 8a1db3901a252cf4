"""Trials of learning rates: which are tried, which is chosen, and on what."""

import json

import numpy as np
import pytest

from benchmarks.studies import tuning
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.tuning import best_rates, rates_to_try
from train.errors import UsageError


def config(task="classification", **options):
    return CompareConfig(task=task, **options)


def test_rates_fill_the_range_evenly_and_more_go_on():
    rates = rates_to_try(0.3, 100)
    assert rates[0] == 0.3
    assert rates_to_try(0.3, 7) == rates[:7]
    exponents = np.log(np.array(rates) / 0.3) / np.log(30)
    counts, _ = np.histogram(exponents, bins=10, range=(-1, 1))
    assert counts.sum() == 100
    assert set(counts) <= {9, 10, 11}


def trial(method, rate, score, name="accuracy"):
    return {"method": method, "learning_rate": rate, name: score}


def test_the_best_mean_over_the_seeds_is_chosen():
    trials = [
        *(trial("sgd", 0.1, score) for score in (0.9, 0.5)),
        *(trial("sgd", 0.3, score) for score in (0.75, 0.75)),
        # Equally good: the smaller one.
        *(trial("sam", rate, 0.8) for rate in (3.0, 0.3, 1.0)),
    ]
    assert best_rates(trials, config()) == {"sgd": 0.3, "sam": 0.3}
    errors = [trial("adam", 0.1, 0.2, "l1"), trial("adam", 0.01, 0.1, "l1")]
    assert best_rates(errors, config("translation")) == {"adam": 0.01}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": 0.1}, "trials and learning_rate exclude each other"),
        ({"budget": 60.0}, "trials and budget exclude each other: it has no room"),
        ({"eval_split": "validation"}, "leave eval_split out"),
    ],
)
def test_what_excludes_trials_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        config(trials=2, **options)
    with pytest.raises(UsageError, match="trials must be"):
        config(trials=1)


@pytest.mark.slow
@pytest.mark.usefixtures("one_device", "thin")
def test_trials_choose_on_validation_examples_and_are_run_once(
    run, monkeypatch, tmp_path
):
    splits, folder = [], tmp_path / "study"
    train = tuning.train

    def count(compiled, seed, *others):
        splits.append(compiled.program.config.data.eval_split)
        assert seed >= 1_000_000
        return train(compiled, seed, *others)

    monkeypatch.setattr(tuning, "train", count)
    arguments = ("compare", "classification", "--epochs", 1, "--trials", 2)
    arguments += ("--seeds", 2, "--techniques", "centralize", "--run-dir", folder)
    run(*arguments)
    lines = (folder / "trials.jsonl").read_text().splitlines(keepends=True)
    trials = list(map(json.loads, lines))
    # Two methods, two rates and two seeds.
    assert splits == ["validation"] * 8
    tried = {(t["method"], t["learning_rate"]) for t in trials}
    assert tried == {(m, r) for m in ("sgd", "centralize") for r in (0.3, 0.055)}
    page = (folder / "report.html").read_text()
    for method, rate in best_rates(trials, config()).items():
        assert f"<td>{method}</td><td>sgd</td><td>{rate:g}</td>" in page
    assert "the best of 2 for each method" in page

    # A trial that is lost runs again, and nothing else.
    (folder / "trials.jsonl").write_text("".join(lines[:-1]))
    rows = (folder / "rows.jsonl").read_bytes()
    splits.clear()
    run(*arguments)
    assert len(splits) == 1
    assert (folder / "rows.jsonl").read_bytes() == rows
