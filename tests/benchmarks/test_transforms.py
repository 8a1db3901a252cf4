"""The benchmark of the transforms, on small arrays."""

import csv
import math

import jax
import pytest

from benchmarks import transforms
from benchmarks.studies.methods import OURS
from benchmarks.transforms import TransformsConfig
from train.errors import UsageError


def _leaves(shapes):
    return jax.tree.leaves(shapes, is_leaf=lambda node: isinstance(node, tuple))


def test_the_tree_is_that_of_a_resnet50():
    shapes = _leaves(transforms.resnet50_shapes())
    assert sum(math.prod(shape) for shape in shapes) == 25_557_032
    assert len(shapes) == 161


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_its_rows(run, monkeypatch, tmp_path, capsys):
    small = {"conv": {"kernel": (3, 3, 4, 8)}, "head": {"kernel": (8, 2), "bias": (2,)}}
    monkeypatch.setattr(transforms, "resnet50_shapes", lambda: small)
    folder = tmp_path / "times"
    run("transforms", "--rounds", 2, "--run-dir", folder)
    with (folder / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    printed = capsys.readouterr().out
    table = [line for line in printed.splitlines() if " [" in line]
    references = {(row["part"], row["reference"]) for row in rows}
    assert len(table) == len(rows) + len(references)  # with headers, each on one line
    assert max(map(len, table)) <= 80
    for row in rows:
        assert row["name"] in printed
    names = " ".join(row["name"] for row in rows)
    for technique in (*OURS, "sam"):
        assert technique in names
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


def test_bad_numbers_are_refused_from_python_too():
    with pytest.raises(UsageError, match="rounds must be greater than 0, got 0"):
        TransformsConfig(rounds=0)
