"""The benchmark of training steps, on small ones."""

import csv
import functools

import pytest

import models
from benchmarks import speed, step_times
from benchmarks.compile import NONE
from benchmarks.networks import Program
from benchmarks.speed import SpeedConfig
from benchmarks.step_times import (
    measure_accumulation,
    measure_network,
    measure_task,
    measure_techniques,
)
from train.errors import UsageError
from train.optim.techniques import TECHNIQUES

SMALL = {"resnet8": (2, 8), "unet64_small": (1, 64)}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(step_times, "NETWORKS", SMALL)
    monkeypatch.setattr(speed, "NETWORKS", SMALL)


def test_steps_are_of_networks_of_the_catalogue():
    assert set(step_times.NETWORKS) == set(models.names())
    assert set(step_times.TASKS) <= set(models.names())


def test_unknown_networks_and_tables_are_refused():
    with pytest.raises(UsageError, match=r"unknown network 'resnet'.* resnet8, "):
        SpeedConfig(networks=("resnet",))
    with pytest.raises(UsageError, match=r"'tasks'.*task"):
        SpeedConfig(tables=("tasks",))


@pytest.mark.slow
def test_steps_are_timed_without_pytorch(small, run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(speed, "_torch_version", dict)
    arguments = ["speed", "--tables", "network", "--networks", *SMALL, "--rounds", 2]
    arguments += ["--run-dir", tmp_path / "a"]
    run(*arguments)
    assert "pip install --group parity" in capsys.readouterr().out
    with (tmp_path / "a/rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["network"] for row in rows] == list(SMALL)
    for row in rows:
        assert float(row["seconds"]) > 0
        assert float(row["share_of_limit"]) > 0
        assert row["eager_seconds"] == row["ratio_median"] == ""
        assert speed.cells(row)[4:7] == ("", "", "")

    # What was measured is not measured again.
    monkeypatch.setattr(speed, "measure_network", pytest.fail)
    run(*arguments)


@pytest.mark.slow
def test_steps_are_timed_beside_pytorch(monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setattr(step_times, "NETWORKS", {"resnet20": (2, 8)})
    (found,) = measure_network("resnet20", 3, pytorch=True, compiled=False)
    assert found.eager_seconds > 0
    assert found.compiled_seconds is None
    assert found.ratio.low <= found.ratio.median <= found.ratio.high
    assert found.reference == "PyTorch"
    assert speed._flat(found)["ratio_median"] == found.ratio.median


@pytest.mark.filterwarnings("ignore:dynamo_pgo force disabled")
def test_pytorch_compiles_every_network_of_a_process(monkeypatch):
    torch = pytest.importorskip("torch")
    compiled = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compiled)
    limits = {"recompile_limit": 1, "fail_on_recompile_limit_hit": True}
    with torch._dynamo.config.patch(limits):
        for network in ("resnet8", "resnet20"):
            step_times._torch_step(network, 2, 8, 3, compiled=True)()


def test_compilation_of_pytorch_is_not_read_from_a_cache(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.compiler.config, "force_disable_caches", False)
    without_caches = []

    def compile_network(network):
        without_caches.append(torch.compiler.config.force_disable_caches)
        return network

    monkeypatch.setattr(torch, "compile", compile_network)
    step_times._torch_step("resnet8", 2, 8, 3, compiled=True)
    assert without_caches == [True]


def test_ratio_is_to_the_faster_of_both(small, monkeypatch):
    ticks = {"ours": 2.0, "limit": 1.0, "eager": 4.0, "compiled": 1.0}
    step = Program(run=None, compile_seconds=3, flop=2e9, bytes=5)
    monkeypatch.setattr(step_times, "training_step", lambda *_: (step, None))
    monkeypatch.setattr(step_times, "_torch_step", lambda *_, **__: lambda: None)
    monkeypatch.setattr(
        step_times,
        "interleave",
        lambda calls, rounds: {call: [ticks[call]] * rounds for call in calls},
    )
    for compiled, expected in ((False, 0.5), (True, 2.0)):
        (found,) = measure_network("resnet8", 2, pytorch=True, compiled=compiled)
        assert found.ratio.median == expected
    # A product of two matrices takes a second.
    assert found.share_of_limit == pytest.approx(1e9 / (2 * 2048**3))


@pytest.fixture
def ticks(monkeypatch):
    """Lets a step take as many seconds as it has images, for each gradient.

    Steps in parts take a quarter more, and steps of a network alone a half less.
    """

    def compile_step(step):
        plain = step.technique == NONE
        gradients = 1 if plain else TECHNIQUES[step.technique].gradients_per_step
        factor = 1.25 if step.grad_accum > 1 else 1.0
        program = Program(run=None, compile_seconds=1, flop=1e9, bytes=7)
        return program, lambda: factor * gradients * step.batch_size

    def interleave(calls, rounds):
        return {name: [call()] * rounds for name, call in calls.items()}

    def training_step(network, shape):
        return None, lambda: 0.5 * shape[0]

    monkeypatch.setattr(step_times._Step, "compile", compile_step)
    monkeypatch.setattr(step_times, "_matrix_product", lambda: lambda: 1.0)
    monkeypatch.setattr(step_times, "interleave", interleave)
    monkeypatch.setattr(step_times, "training_step", training_step)


def test_ratios_are_to_the_step_beside(ticks):
    (row,) = measure_task("resnet20", 2)
    assert (row.reference, row.ratio.median) == ("the network alone", 2.0)
    (row,) = measure_task("unet64_small", 2)
    assert (row.reference, row.ratio) == ("", None)
    rows = measure_techniques("resnet20", 2)
    for row in rows:
        assert row.reference == NONE
        assert row.ratio.median == (
            1 if row.technique == NONE else TECHNIQUES[row.technique].gradients_per_step
        )
    assert [row.technique for row in rows] == [NONE, *TECHNIQUES]
    rows = measure_accumulation("unet_small", "sam", 2)
    assert [(r.grad_accum, r.ratio.median) for r in rows] == [
        (1, 1.0),
        (2, 1.25),
        (4, 1.25),
    ]
    assert all(row.reference == "its parts" for row in rows)
    assert speed.cells(speed._flat(rows[1]))[:3] == ("unet_small", "sam", "2")


@pytest.mark.slow
@pytest.mark.parametrize("technique", [NONE, "perturbed_unit_step"])
def test_steps_in_parts_are_timed(technique, monkeypatch):
    monkeypatch.setattr(step_times, "TASKS", {"resnet8": 4})
    monkeypatch.setattr(step_times, "_PARTS", (1, 2))
    for row in measure_accumulation("resnet8", technique, 2):
        assert row.seconds > 0
        assert row.step_bytes > 0
