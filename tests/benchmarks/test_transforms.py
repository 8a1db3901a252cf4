import csv
import math
import sys

import jax
import pytest

import benchmarks.__main__ as command_line
from benchmarks import transforms
from train.errors import UsageError


def _leaves(shapes):
    return jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))


def test_the_tree_is_that_of_a_resnet50():
    shapes = _leaves(transforms.resnet50_shapes())
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
    assert len(shapes) == 161


def test_the_benchmark_runs_and_writes_its_rows(monkeypatch, tmp_path, capsys):
    small = {"conv": {"kernel": (3, 3, 4, 8)}, "head": {"kernel": (8, 2), "bias": (2,)}}
    monkeypatch.setattr(transforms, "resnet50_shapes", lambda: small)
    folder = tmp_path / "times"
    arguments = ["transforms", "--rounds", "2", "--batch-size", "2", "--run-dir"]
    monkeypatch.setattr(sys, "argv", ["benchmarks", *arguments, str(folder)])
    command_line.main()
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    assert "perturbed_unit, linear" in printed
    assert "…" not in printed  # 80 columns hold the tables
    for row in rows:
        low, median, high = (
            float(row[f"ratio_{name}"]) for name in ("low", "median", "high")
        )
        assert 0 < low <= median <= high
        if row["name"] == row["reference"]:
            assert median == 1.0
    updates = [row for row in rows if row["gigabytes_moved"]]
    assert len(updates) >= 10
    # Nothing can move less than every input read and every output written.
    for row in updates:
        if row["name"] in ("copy", "sgd", "centralize", "centralize, sgd"):
            assert float(row["gigabytes_moved"]) >= float(row["gigabytes_least"])


def test_bad_numbers_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least 1, got 0 and 64"):
        transforms.transforms(rounds=0, run_dir=tmp_path)
