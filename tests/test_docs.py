"""What the pages of docs/ say is what the catalogue and the committed rows say."""

import csv
import re
from pathlib import Path

import jax
import pytest

import models
from benchmarks import networks

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/networks.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)


def markdown(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def catalogue(task):
    """The table of the networks for a task."""
    rows = []
    for name in models.names(task=task):
        entry = models.describe(name)
        authors, year, link = entry.paper.rsplit(", ", 2)
        rows.append(
            (
                f"`{name}`",
                entry.description,
                f"[{authors}, {year}]({link})",
                f"{entry.num_parameters:,}",
                "x".join(map(str, entry.input_shape)),
            )
        )
    return markdown(("name", "network", "paper", "parameters", "input"), rows)


def results(path):
    """The table of a benchmark's rows."""
    with path.open() as file:
        rows = [
            {key: number(value) for key, value in row.items()}
            for row in csv.DictReader(file)
        ]
    assert [row["network"] for row in rows] == list(models.names())
    return markdown(networks.HEADER, [networks.cells(row) for row in rows])


def number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


@pytest.mark.parametrize("task", ["classification", "segmentation", "translation"])
def test_the_tables_of_networks_are_the_catalogue(task):
    assert catalogue(task) in PAGE


def test_the_table_of_costs_is_that_of_the_committed_rows():
    assert results(ROOT / "benchmarks/results/networks_cpu.csv") in PAGE


def test_every_option_is_explained():
    options = {o for name in models.names() for o in models.describe(name).options}
    explained = set(re.findall(r"^\| `(\w+)` \|", PAGE, flags=re.MULTILINE))
    assert options == explained - set(models.names())


def test_what_has_been_trained_is_that_of_the_committed_rows():
    page = (ROOT / "docs/training.md").read_text()
    commands = page.replace("\\\n    ", "")
    with (ROOT / "benchmarks/results/training_cpu.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        score, seconds = float(row["score"]), float(row["train_seconds"])
        time = f"{seconds:.0f} s" if seconds < 180 else f"{seconds / 60:.0f} min"
        line = (
            rf"\| .*{row['data']}.* \| `{row['network']}` "
            rf"\| {row['metric']} {score:.3f} \| .* "
            rf"\| {int(row['steps']):,} of {row['batch_size']} .* \| {time} \|"
        )
        assert re.search(line, page), line
        assert row["command"] in commands


@pytest.mark.parametrize("example", EXAMPLES, ids=["create", "weights"])
def test_example_runs(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    with jax.numpy_rank_promotion("allow"):  # as it is for the reader
        exec(example, names)
    assert names["logits"].shape == names["expected"]
