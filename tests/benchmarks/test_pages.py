"""The tables of the pages show the committed rows."""

import csv
import dataclasses
import statistics
from pathlib import Path

import pytest

from benchmarks import compare
from benchmarks.compare import METHODS, summarize
from benchmarks.report import markdown, with_range
from train.optim.techniques import TECHNIQUES

ROOT = Path(__file__).parents[2]


def page(name):
    return (ROOT / name).read_text()


def rows_of(name):
    with (ROOT / f"benchmarks/results/{name}.csv").open() as file:
        return list(csv.DictReader(file))


def ratio_of(row, spec):
    limits = (float(row[f"ratio_{name}"]) for name in ("median", "low", "high"))
    return with_range(*limits, spec)


def study_rows(name):
    """The rows of a study, as it reads them itself."""
    numbers = ("accuracy", "ms_per_step")
    return [
        row
        | {key: float(row[key]) for key in numbers}
        | {"seed": int(row["seed"]), "failure": row["failure"] or None}
        for row in rows_of(name)
    ]


@pytest.mark.parametrize("name", ["README.md", "docs/digits.md"])
def test_the_table_of_the_study(name):
    summaries = summarize(study_rows("digits_cpu"))
    assert [s.method.name for s in summaries] == [m.name for m in METHODS]
    table = markdown(compare.HEADER, list(map(compare.cells_of, summaries)))
    assert table in page(name)


def test_the_differences_at_equal_gradients():
    text = " ".join(page("docs/digits.md").split())
    for summary in summarize(study_rows("digits_cpu")):
        if interval := summary.versus_equal_gradients:
            difference = with_range(*interval, "+.2f")
            assert f"`{summary.method.name}` {difference}" in text


def test_the_learning_rates_are_the_best_of_the_table():
    rows = rows_of("digits_validation_cpu")
    rates = sorted({float(row["learning_rate"]) for row in rows})
    table = []
    for method in METHODS:
        found = {
            rate: [
                100 * float(row["accuracy"])
                for row in rows
                if row["method"] == method.name and float(row["learning_rate"]) == rate
            ]
            for rate in rates
        }
        assert {len(accuracies) for accuracies in found.values()} == {3}
        # The smaller rate where two are equal.
        best = max(rates, key=lambda rate: round(statistics.mean(found[rate]), 6))
        assert method.optimizer.learning_rate == best
        cells = {
            rate: f"{statistics.mean(found[rate]):.2f} ± "
            f"{statistics.stdev(found[rate]):.2f}"
            for rate in rates
        }
        cells[best] = f"**{cells[best]}**"
        table.append((method.name, *cells.values()))
    header = ("method", *(f"{rate:g}" for rate in rates))
    assert markdown(header, table) in page("docs/digits.md")


def test_the_tables_of_the_loop():
    text = page("docs/loop.md")
    lines = text.splitlines()
    parts = {}
    for row in rows_of("loop_cpu"):
        parts.setdefault(row["part"], []).append(row)
    for row in parts["loop"] + parts["techniques in the loop"]:
        name = "none" if row["name"] == "sgd" else f"`{row['name']}`"
        ms = 1000 * float(row["seconds"])
        start = f"| {name} | {ms:.1f} | {ratio_of(row, '.3f')} |"
        assert [line for line in lines if line.startswith(start)], start
    compiled = {row["name"]: row for row in parts["techniques in the loop"]}
    assert set(TECHNIQUES) <= set(compiled)
    for name in TECHNIQUES:
        seconds = float(compiled[name]["compile_seconds"])
        assert f"| `{name}` | {seconds:.1f} s | |" in lines


def test_the_reasons_of_what_was_removed():
    text = " ".join(page("docs/loop.md").split())
    found = {
        (row["model"], row["name"]): float(row["ratio_median"])
        for row in rows_of("loop_cpu")
    }
    vmap = [found[model, "vmap"] for model in ("resnet8", "resnet20")]
    assert (
        f"{vmap[0]:.2f} times as long as one seed after the other on ResNet-8, and "
        f"{vmap[1]:.2f} times on ResNet-20"
    ) in text
    four, sixteen = (found["resnet8", f"{count} in a call"] for count in (4, 16))
    large = found["resnet20", "4 in a call"]
    assert (
        f"{four:.1f} times (4 steps) and {sixteen:.1f} times (16 steps) as long on "
        f"ResNet-8, and {large:.1f} times (4 steps) on ResNet-20"
    ) in text


def test_the_tables_of_the_cost():
    lines = page("docs/cost.md").splitlines()
    rows = rows_of("transforms_cpu")
    assert len(rows) == 13 + 6
    for row in rows:
        ms, moved = float(row["ms"]), row["gigabytes_moved"]
        cells = [f"`{row['name']}`", f"{ms:.1f}" if moved else f"{ms:.0f}"]
        cells += [ratio_of(row, ".2f"), row["reference"]]
        if moved:
            cells.append(f"{float(moved):.2f} / {float(row['gigabytes_least']):.2f}")
        assert f"| {' | '.join(cells)} |" in lines


def test_the_table_of_the_input():
    lines = page("docs/data.md").splitlines()
    found = {
        (row["dataset"], row["part"], row["name"]): row for row in rows_of("input_cpu")
    }
    datasets = list(dict.fromkeys(dataset for dataset, _, _ in found))
    for name in dict.fromkeys(n for _, part, n in found if part == "input alone"):
        cells = [name]
        for dataset in datasets:
            speed = float(found[dataset, "input alone", name]["images_per_second"])
            step = found.get((dataset, "training step", name))
            cells += [f"{speed:,.0f}", ratio_of(step, ".2f") if step else ""]
        assert f"| {' | '.join(cells)} |" in lines


def test_the_rows_name_the_techniques_as_the_benchmarks_do():
    from benchmarks import transforms

    names = {row["name"] for row in rows_of("transforms_cpu")}
    assert {subject.name for subject in transforms._subjects()} <= names
    fields = {field.name for field in dataclasses.fields(transforms.Measurement)}
    assert fields - {"ratio"} <= set(rows_of("transforms_cpu")[0])
