"""The tables of the pages show the committed rows."""

import csv
import dataclasses
import statistics
from pathlib import Path

from benchmarks import compile as compile_
from benchmarks import speed
from benchmarks.report import markdown, with_range
from benchmarks.step_times import NETWORKS, TASKS
from benchmarks.studies import results
from benchmarks.studies.methods import OURS, methods_of
from benchmarks.studies.results import (
    VERDICT_HEADER,
    cells_of,
    summarize,
    verdict_cells,
)
from benchmarks.studies.tasks import STUDY_TASKS

ROOT = Path(__file__).parents[2]
DIGITS = STUDY_TASKS["classification"]
METHODS = methods_of(DIGITS)


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
    numbers = ("accuracy", "ms_per_step", "gradient_evaluations")
    return [
        row
        | {key: float(row[key]) for key in numbers}
        | {"seed": int(row["seed"]), "failure": row["failure"] or None}
        for row in rows_of(name)
    ]


def test_the_table_of_the_study():
    summaries = summarize(study_rows("digits_cpu"), METHODS, DIGITS)
    assert [s.method.name for s in summaries] == [m.name for m in METHODS]
    table = markdown(results.header(DIGITS), list(map(cells_of, summaries)))
    assert table in page("docs/digits.md")


def test_the_verdicts_of_the_study():
    summaries = summarize(study_rows("digits_cpu"), METHODS, DIGITS)
    cells = [cells for summary in summaries for cells in verdict_cells(summary)]
    assert markdown(VERDICT_HEADER, cells) in page("docs/digits.md")


def test_the_differences_at_equal_gradients():
    text = " ".join(page("docs/digits.md").split())
    for summary in summarize(study_rows("digits_cpu"), METHODS, DIGITS):
        for comparison in summary.comparisons[1:]:
            assert comparison.equal == "gradients"
            difference = with_range(*comparison.effect.interval, "+.2f")
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
    for row in parts["loop"]:
        ms = 1000 * float(row["seconds"])
        assert f"| `{row['name']}` | {ms:.1f} | {ratio_of(row, '.3f')} |" in lines


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
    assert len(rows) == 13
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


def compile_rows(**columns):
    """The rows of compiled steps with such values, numbers as numbers."""
    rows = [{k: number(v) for k, v in row.items()} for row in rows_of("compile")]
    return [r for r in rows if all(r[k] == v for k, v in columns.items())]


def number(text):
    if text.isdecimal():
        return int(text)
    try:
        return float(text)
    except ValueError:
        return {"": None, "True": True, "False": False}.get(text, text)


def test_the_tables_of_compiled_steps():
    text = page("docs/compile.md")
    groups = {}
    for row in compile_rows():
        groups.setdefault((row["target"], row["batch_size"]), []).append(row)
    other = []
    for (_, batch_size), rows in groups.items():
        if len({row["technique"] for row in rows}) > 1:
            table = markdown(compile_.HEADER, list(map(compile_.cells, rows)))
            assert table in text
        elif batch_size != 2048:  # they are in the table of chips
            other += rows
    cells = [
        (
            row["target"],
            row["network"],
            f"{row['batch_size']}",
            f"{row['compile_seconds']:.0f}",
            f"{row['needed_bytes'] / 1e9:.1f} of {row['memory_bytes'] / 1e9:.1f}",
            f"{row['fusions']}",
            f"{row['native_convolutions']}/{row['other_convolutions']}",
            f"{row['all_reduces']}",
            f"{row['collective_bytes'] / 1e6:.1f}",
        )
        for row in other
    ]
    header = (
        *("target", "network", "images", "s", "GB of", "fusions", "conv."),
        *("all-reduces", "MB sent"),
    )
    assert markdown(header, cells) in text
    assert {row["technique"] for row in other} == {"none"}
    assert {row["precision"] for row in compile_rows()} == {"bfloat16"}
    assert all(row["bfloat16_convolutions"] for row in compile_rows())
    assert {row["other_convolutions"] for row in compile_rows()} == {0}


def test_the_table_of_chips():
    table = []
    for row in compile_rows(network="resnet8", batch_size=2048):
        table.append(
            (
                row["target"],
                f"{row['chips']:.0f}",
                "yes" if row["shard_params"] else "no",
                f"{row['needed_bytes'] / 1e6:.0f}",
                f"{row['gflop']:.2f}",
                f"{row['all_reduces']:.0f}",
                f"{row['collective_permutes'] + row['all_gathers']:.0f}",
                f"{row['collective_bytes'] / 1e6:.2f}",
            )
        )
    header = (
        "target",
        "chips",
        "sharded",
        "MB",
        "GFLOP",
        "all-reduces",
        "others",
        "MB sent",
    )
    assert markdown(header, table) in page("docs/compile.md")


def test_the_kernels_of_the_techniques():
    text = page("docs/compile.md")
    fusions = {
        row["technique"]: row["fusions"]
        for row in compile_rows(network="resnet18_cifar", target="h100")
    }
    assert {"none", "sam", *OURS} <= set(fusions)
    for name, to in (
        ("scale_by_random", "none"),
        ("centralize", "none"),
        ("perturbed_unit_step", "sam"),
        ("barzilai_borwein_step", "sam"),
    ):
        more = fusions[name] - fusions[to]
        ratio = fusions[name] / fusions[to]
        assert (
            f"| `{name}` | {fusions[name]:.0f} | `{to}` | {more:+.0f} | {ratio:.3f} |"
            in (text)
        )


def test_how_many_networks_are_nearly_as_fast_as_those_of_pytorch():
    ratios = [
        float(row["ratio_median"])
        for row in rows_of("speed_cpu")
        if row["table"] == "network"
    ]
    few, more, most = (sum(r <= limit for r in ratios) for limit in (1.1, 1.3, 1.65))
    assert (
        f"Of the {len(ratios)} networks, {few} take at most 1.1 times as long as "
        f"PyTorch's, {more} at most 1.3 times, and {most} at most 1.65 times."
    ) in " ".join(page("docs/speed.md").split())


def test_the_tables_of_speed():
    rows = rows_of("speed_cpu")
    text = page("docs/speed.md")
    assert {row["network"] for row in rows} == {*NETWORKS, *TASKS}
    for table, header in speed.HEADERS.items():
        found = [speed.cells(row) for row in rows if row["table"] == table]
        assert found
        assert markdown(header, found) in text
