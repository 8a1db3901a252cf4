"""Finished run folders side by side."""

import dataclasses
import json

import pytest

from benchmarks.studies.pairs import pairs
from train.errors import UsageError
from train.optim.config import OptimizerConfig
from train.output.run_folder import RunFolder
from train.tasks.classification import ClassificationConfig


def finished(path, scores, *techniques, dataset="digits", finish=True, **settings):
    """A finished run with a score for each seed, as `python -m train` writes it."""
    config = ClassificationConfig(
        epochs=2,
        seed=min(scores),
        seeds=len(scores),
        optimizer=OptimizerConfig(techniques=techniques, **settings),
    )
    data = dataclasses.replace(config.data, dataset=dataset)
    config = dataclasses.replace(config, data=data)
    path.mkdir()
    content = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    folder = RunFolder(path, {"task": "classification", **content})
    folder.start()
    for epoch in (1, 2):
        for seed, score in scores.items():
            accuracy = score if epoch == 2 else 0.1
            folder.append(
                "metrics.jsonl",
                {"seed": seed, "epoch": epoch, "test_accuracy": accuracy},
            )
    if finish:
        gradients = 20 * config.optimizer.gradients_per_step
        folder.finish({"gradient_evaluations": gradients})
    return path


SGD = {0: 0.90, 1: 0.91, 2: 0.92, 3: 0.91}
BETTER = {seed: score + 0.03 + seed / 1000 for seed, score in SGD.items()}


def test_runs_are_paired_by_their_seeds(tmp_path, capsys):
    runs = (
        finished(tmp_path / "a", {0: 0.90, 1: 0.91}),
        finished(tmp_path / "b", {2: 0.92, 3: 0.91}),  # the same settings
        finished(tmp_path / "c", BETTER, "sam"),
        finished(tmp_path / "d", {**SGD, 4: 0.1}, learning_rate=0.2),
    )
    pairs(runs)
    printed = capsys.readouterr().out
    assert "91.00 ± 0.82" in printed
    assert "94.15 ± 0.9" in printed
    assert "+3.15 [+2.94, +3.36]" in printed
    assert "2.00 x" in printed
    assert "techniques sam: helps" in printed
    assert "learning_rate 0.2: no difference found; all seeds differ by" in printed
    assert "paired over the seeds [0, 1, 2, 3]" in printed


@pytest.mark.faults
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: (), "name the run folders to compare"),
        (lambda path: (path,), "holds no finished run"),
        (lambda path: (path / "missing",), "holds no finished run"),
        (lambda path: (finished(path / "a", SGD),), "have the same settings"),
        (
            lambda path: (finished(path / "a", SGD), finished(path / "b", SGD)),
            "seed 0 of these settings is in .*b and in another folder",
        ),
        (
            lambda path: (
                finished(path / "a", SGD),
                finished(path / "b", {3: 0.9, 4: 0.9}, "sam"),
            ),
            "too few seeds in common, 1 of 2",
        ),
        (
            lambda path: (
                finished(path / "a", SGD),
                finished(path / "b", SGD, dataset="cifar10"),
            ),
            "different settings of data.dataset, digits and cifar10",
        ),
        (
            lambda path: (
                finished(path / "a", SGD),
                finished(path / "b", SGD, "sam", finish=False),
            ),
            "b holds no finished run",
        ),
    ],
)
def test_what_cannot_be_paired_is_refused(tmp_path, make, message):
    with pytest.raises(UsageError, match=message):
        pairs(make(tmp_path))
