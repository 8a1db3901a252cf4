"""The benchmark of networks, on the smallest of them."""

import csv
import json
import sys
from pathlib import Path

import jax
import pytest
from flax import nnx
from rich.console import Console

import benchmarks.__main__ as command_line
import models
from benchmarks import networks

RESULTS = Path(__file__).parents[2] / "benchmarks/results/networks_cpu.csv"
SMALL = ("resnet8", "pixelgan")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "networks", *map(str, arguments)])
    command_line.main()


def test_the_published_counts_are_of_the_same_forms():
    assert set(networks.PUBLISHED_MULTIPLY_ADDS) <= set(models.names())
    for name in ("resnet18", "mobilenet_v2", "vit_b_16"):
        entry = models.describe(name)
        model = nnx.eval_shape(
            lambda name=name: models.create(name, rngs=nnx.Rngs(0), num_classes=1000)
        )
        graphdef, state = nnx.split(model)
        images = jax.ShapeDtypeStruct((1, *entry.input_shape), "float32")
        lowered = jax.jit(
            lambda state, images, graphdef=graphdef: nnx.merge(graphdef, state)(images)
        ).lower(state, images)
        counted = lowered.cost_analysis()["flops"] / 1e9
        published = 2 * networks.PUBLISHED_MULTIPLY_ADDS[name]
        assert counted == pytest.approx(published, rel=0.1)


@pytest.mark.slow
def test_networks_are_measured_once_and_the_rest_where_it_stopped(
    monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "run"
    arguments = ("--names", *SMALL, "--rounds", 3, "--run-dir", folder)
    run(monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "resnet8" in printed
    assert "…" not in printed  # 80 columns hold the table
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["network"] for row in rows] == list(SMALL)
    for row in rows:
        entry = models.describe(row["network"])
        assert row["parameters"] == entry.num_parameters
        assert row["published_gflop"] is None
        assert row["device_peak_bytes"] is None  # a CPU does not count them
        assert row["commit"]
        for part in ("forward", "step"):
            low, median, high = (
                row[f"{part}_seconds{end}"] for end in ("_low", "", "_high")
            )
            assert 0 < low <= median <= high
            assert row[f"{part}_compile_seconds"] > 0
        # Parameters and momenta at least, where a forward has parameters alone.
        assert row["step_bytes"] > row["forward_bytes"] > 4 * row["parameters"]
        assert row["step_bytes"] > 8 * row["parameters"]
    # Three 1x1 convolutions of every pixel, and little besides.
    multiply_adds = 256 * 256 * (6 * 64 + 64 * 128 + 128)
    assert rows[1]["forward_gflop"] * 1e9 == pytest.approx(2 * multiply_adds, rel=0.1)

    # One row lost and one cut off: these are measured again, the first stays.
    (folder / "rows.jsonl").write_text(lines[0] + lines[1][:40])
    measured = []

    def measure(name, *settings):
        measured.append((name, *settings))
        values = {k: rows[1][k] for k in networks.Measurement.__dataclass_fields__}
        return networks.Measurement(**values)

    monkeypatch.setattr(networks, "measure", measure)
    run(monkeypatch, *arguments)
    assert measured == [("pixelgan", "float32", 2, 3)]
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == list(SMALL)


def test_80_columns_hold_the_largest_networks():
    with RESULTS.open() as file:
        rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(networks._table("float32", rows))
    assert "resnext101_32x4d" in captured.get()
    assert "…" not in captured.get()


def number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


def test_bfloat16_is_compared_with_what_the_device_can_do(monkeypatch):
    kind = jax.devices()[0].device_kind
    assert networks._share_of_peak("bfloat16", 1e12) is None
    monkeypatch.setitem(networks.PEAK_FLOPS, kind, 4e12)
    assert networks._share_of_peak("bfloat16", 1e12) == 0.25
    assert networks._share_of_peak("float32", 1e12) is None


def test_wrong_settings_are_refused_in_a_line(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    for arguments, message in (
        (("--rounds", 0), "at least 1, got 0 and 2"),
        (("--batch-size", 0), "at least 1, got 5 and 0"),
        (("--names", "resnet8", "alexnet*"), r"no network is named 'alexnet\*'; known"),
    ):
        with pytest.raises(SystemExit, match=message):
            run(monkeypatch, *arguments, "--run-dir", folder)
    assert not folder.exists()
