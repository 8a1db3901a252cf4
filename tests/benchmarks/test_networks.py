"""The benchmark of networks, on the smallest of them."""

import csv
import json
from pathlib import Path

import jax
import pytest
from flax import nnx

import models
from benchmarks import networks
from benchmarks.networks import NetworksConfig
from benchmarks.report import make_table
from tests.shared import printed_lines
from train.errors import UsageError

RESULTS = Path(__file__).parents[2] / "benchmarks/results/networks_cpu.csv"
SMALL = ("resnet8", "pixelgan")


def test_the_published_counts_are_of_the_same_forms():
    assert set(networks.PUBLISHED_MULTIPLY_ADDS) <= set(models.names())
    for name in ("resnet18", "mobilenet_v2", "vit_b_16"):
        entry = models.describe(name)
        model = nnx.eval_shape(
            lambda name=name: models.create(name, rngs=nnx.Rngs(0), num_classes=1000)
        )
        graphdef, state = nnx.split(model)
        images = jax.ShapeDtypeStruct((1, *entry.input_shape), "float32")
        traced = jax.jit(
            lambda state, images, graphdef=graphdef: nnx.merge(graphdef, state)(images)
        ).trace(state, images)
        # On CPUs, some forms take fewer.
        lowered = traced.lower(lowering_platforms=("tpu",))
        counted = lowered.cost_analysis()["flops"] / 1e9
        published = 2 * networks.PUBLISHED_MULTIPLY_ADDS[name]
        assert counted == pytest.approx(published, rel=0.1)


@pytest.mark.slow
def test_networks_are_compiled_once_and_the_rest_where_it_stopped(
    run, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "run"
    arguments = ("networks", "--names", *SMALL, "--run-dir", folder)
    run(*arguments)
    printed = capsys.readouterr().out
    assert "resnet8" in printed
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines]
    assert [row["network"] for row in rows] == list(SMALL)
    for row in rows:
        entry = models.describe(row["network"])
        assert row["parameters"] == entry.num_parameters
        assert row["published_gflop"] is None
        assert row["commit"]
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
    run(*arguments)
    assert measured == [("pixelgan", 2)]
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["network"] for row in table] == list(SMALL)


def test_80_columns_hold_the_largest_networks():
    with RESULTS.open() as file:
        rows = [{k: number(v) for k, v in row.items()} for row in csv.DictReader(file)]
    cells = list(map(networks.cells, rows))
    table = make_table(networks.HEADER, cells)
    lines = printed_lines(table, width=80)
    assert len(lines) == 2 + len(rows)
    for line, row in zip(lines[2:], rows, strict=True):
        assert line.startswith(row["network"])


def number(text):
    try:
        return float(text)
    except ValueError:
        return text or None


def test_names_are_patterns_in_the_order_of_the_catalogue():
    config = NetworksConfig(names=("vit_*", "resnet8", "resnet*"))
    assert config.networks[0] == "resnet8"
    assert len(config.networks) == len(set(config.networks))
    assert set(config.networks) == set(models.names("vit_*") + models.names("resnet*"))
    assert NetworksConfig().networks == list(models.names())
    with pytest.raises(UsageError, match=r"no network is named 'alexnet\*'; known: "):
        NetworksConfig(names=("alexnet*",))


def test_flops_are_counted_where_jax_can(monkeypatch):
    """JAX refuses to count them for a GPU, even of a program for another platform."""
    devices = []

    def cost_analysis(lowered):
        devices.append(jax.config.jax_default_device)
        return {"flops": 7.0}

    monkeypatch.setattr(jax.stages.Lowered, "cost_analysis", cost_analysis)
    matrix = jax.ShapeDtypeStruct((4, 4), "float32")
    found = networks.compile_function(lambda x: x @ x, matrix)
    assert found.flop == 7.0
    assert devices == jax.devices("cpu")[:1]
