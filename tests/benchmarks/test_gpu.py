"""The measurements for a GPU, rehearsed at small sizes on a CPU."""

import csv
import dataclasses
import subprocess
import sys
import time
import venv
from pathlib import Path

import jax.numpy as jnp
import pytest

import models
from benchmarks import canary, gpu
from benchmarks.canary import Check
from benchmarks.compile import NONE
from benchmarks.gpu import FULL, PARTS, REHEARSAL, GpuConfig, Part, Subject
from train.errors import UsageError
from train.optim.techniques import TECHNIQUES

SCRIPT = Path(__file__).parents[2] / "benchmarks/gpu.sh"
THIN = dataclasses.replace(
    REHEARSAL,
    steps={
        "resnet18": Subject(network="resnet8", batch_size=2, seconds=0),
        "pix2pix": Subject(network="unet64_small", batch_size=1, seconds=0),
    },
    techniques=Subject(network="resnet8", batch_size=2, seconds=0),
    rounds=2,
)


def rows_of(folder, name):
    with (folder / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def part(name="some", seconds=0.0, measure=lambda write: None):
    return Part(name=name, seconds=seconds, measure=measure)


@pytest.mark.slow
@pytest.mark.usefixtures("thin", "one_device")
def test_everything_is_rehearsed_without_pytorch(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "REHEARSAL", THIN)
    monkeypatch.setattr(canary, "NETWORKS", ("resnet8", "unet64_small"))
    monkeypatch.setattr(gpu, "torch_mode", lambda **_: "")
    folder = tmp_path / "gpu"
    run("gpu", "--rehearse", "--run-dir", folder)
    assert "our steps are timed alone" in capsys.readouterr().out
    parts = {row["part"]: row["outcome"] for row in rows_of(folder, "parts")}
    measured = {"canary", "resnet18", "pix2pix", "techniques", "training"}
    assert parts == dict.fromkeys((p for p in PARTS if p in measured), "done")
    checks = rows_of(folder, "canary")
    assert {row["passed"] for row in checks} == {"True"}
    assert {row["precision"] for row in checks} == {"float32", "tf32", "bfloat16"}
    names = {row["name"] for row in checks}
    assert names >= {f"updates of {name}" for name in TECHNIQUES}
    assert names >= {f"training step of {name}" for name in canary.NETWORKS}
    steps = rows_of(folder, "steps")
    assert [row["network"] for row in steps] == ["resnet8", "unet64_small"]
    for row in steps:
        assert float(row["seconds"]) > 0
        assert float(row["share_of_limit"]) > 0
        assert row["torch_seconds"] == row["ratio_median"] == ""
    techniques = rows_of(folder, "techniques")
    assert [row["technique"] for row in techniques] == [NONE, *TECHNIQUES]
    for row in techniques:
        two = row["gradients_per_step"] == "2" and row["technique"] != "sam"
        assert row["reference"] == ("sam" if two else NONE)
    (epoch,) = rows_of(folder, "training")
    assert float(epoch["images_per_second"]) > 0
    assert 0 < float(epoch["accuracy"]) < 1
    for row in [*checks, *steps, *techniques, epoch]:
        assert row["device"]
        assert row["commit"]
        assert {"driver", "torch", "jax"} <= set(row)


@pytest.mark.slow
def test_a_step_is_timed_beside_pytorch():
    pytest.importorskip("torch")
    rows = []
    for precision, products in (("bfloat16", "bfloat16"), ("float32", "tf32")):
        subject = Subject(
            network="resnet20", batch_size=2, precision=precision, seconds=0
        )
        gpu.measure_step(subject, "eager", THIN, lambda name, row: rows.append(row))
        assert rows[-1].products == products
    for row in rows:
        assert row.ratio_low <= row.ratio_median <= row.ratio_high
        assert row.torch_seconds > 0
        assert row.torch_peak_bytes is None
        assert "in PyTorch" in str(row)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arguments"),
    [
        ("supervised_step", ("resnet20", 2, 32, 10)),
        ("supervised_step", ("unet_small", 1, 32, 11)),
        ("supervised_step", ("pspnet50", 2, 32, 21)),
        ("pix2pix_step", ("unet128", "patchgan16", 1, 128)),
    ],
)
def test_steps_in_pytorch_train_all_parameters(make, arguments):
    torch = pytest.importorskip("torch")
    from benchmarks.pytorch import steps

    networks = []

    class Setup(steps.Setup):
        def network(self, name):
            networks.append(super().network(name))
            return networks[-1]

    setup = Setup(compiled=False, bfloat16=False)
    step = getattr(steps, make)(*arguments, setup)
    before = [[x.detach().clone() for x in n.parameters()] for n in networks]
    for _ in range(2):
        step()
    for network, old in zip(networks, before, strict=True):
        for (name, new), x in zip(network.named_parameters(), old, strict=True):
            assert not torch.equal(new, x), name
            assert new.isfinite().all(), name


@pytest.mark.usefixtures("thin")
def test_a_step_is_timed_if_pytorch_fails(monkeypatch, capsys):
    def fail(subject, mode):
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(gpu, "_torch_step", fail)
    rows = []
    subject = Subject(network="resnet8", batch_size=2, seconds=0)
    gpu.measure_step(subject, "compiled", THIN, lambda name, row: rows.append(row))
    assert "CUDA out of memory" in capsys.readouterr().err
    (row,) = rows
    assert row.seconds > 0
    assert row.torch_seconds is None
    assert str(row).endswith("; PyTorch failed")


def test_parts_are_of_networks_of_the_catalogue():
    for scale in (FULL, REHEARSAL):
        assert set(scale.steps) <= set(PARTS)
        networks = {subject.network for subject in scale.steps.values()}
        assert networks <= set(models.names())
    assert set(FULL.steps) == set(PARTS) - {"canary", "techniques", "training"}


def test_a_gpu_is_needed(tmp_path):
    with pytest.raises(UsageError, match=r"JAX finds no GPU, but cpu: .* --rehearse"):
        gpu.gpu(GpuConfig(), run_dir=tmp_path / "gpu")
    assert not (tmp_path / "gpu").exists()


def test_a_part_is_skipped_if_the_time_does_not_suffice():
    rows = []
    outcome = gpu.run_part(part(seconds=60.0), 59.0, rows.append)
    assert outcome.outcome == "skipped"
    assert outcome.reason == "it needs about 60 s, 59 s are left"
    assert gpu.run_part(part(seconds=60.0), 60.0, rows.append).outcome == "done"


def test_a_part_without_its_dataset_is_skipped(tmp_path):
    config = gpu.training_config("cifar10", tmp_path, REHEARSAL)
    training = part(measure=lambda write: gpu.measure_training(config, write))
    outcome = gpu.run_part(training, 60.0, print)
    assert outcome.outcome == "skipped"
    assert outcome.reason.startswith("cifar10 is not prepared in ")


def measured_parts(monkeypatch, parts, folder):
    """Runs the command with such parts, and returns what became of them."""
    monkeypatch.setattr(gpu, "_parts", lambda config, mode: parts)
    try:
        gpu.gpu(GpuConfig(rehearse=True), run_dir=folder)
        error = ""
    except UsageError as raised:
        error = str(raised)
    return [row["outcome"] for row in rows_of(folder, "parts")], error


def test_a_part_that_fails_does_not_end_the_others(monkeypatch, tmp_path, capsys):
    def fail(write):
        raise RuntimeError("RESOURCE_EXHAUSTED")

    parts = [part("one"), part("two", measure=fail), part("three")]
    outcomes, error = measured_parts(monkeypatch, parts, tmp_path / "gpu")
    assert outcomes == ["done", "failed", "done"]
    assert error == "failed: two; see above"
    assert "RuntimeError: RESOURCE_EXHAUSTED" in capsys.readouterr().err


def test_nothing_is_timed_after_wrong_numbers(monkeypatch, tmp_path, capsys):
    right = Check(
        name="sum",
        precision="float32",
        reference="CPU",
        error=0.0,
        tolerance=1e-6,
        passed=True,
    )
    wrong = dataclasses.replace(right, error=0.5, passed=False)
    monkeypatch.setattr(gpu, "check_numbers", lambda small: iter([right, wrong, right]))
    parts = [
        part("canary", measure=lambda write: gpu.measure_numbers(write, small=True)),
        part("other"),
    ]
    outcomes, error = measured_parts(monkeypatch, parts, tmp_path / "gpu")
    assert outcomes == ["failed"]
    assert error == "failed: canary; see above"
    printed = capsys.readouterr().out
    assert "WRONG: sum, float32, is 5.0e-01 off (CPU), where 1e-06 is" in printed
    assert "The numbers are not known to be right, so nothing is timed;" in printed
    assert len(rows_of(tmp_path / "gpu", "canary")) == 3


def test_numbers_that_differ_are_noticed(monkeypatch):
    actual = canary._products

    def products(x):
        found = actual(x)
        if x["images"].dtype == jnp.float32:  # as on the device, not in the reference
            name = "convolution 1x1"
            result, *gradients = found[name]
            found[name] = (result, gradients[0], 1.001 * gradients[1])
        return found

    monkeypatch.setattr(canary, "_products", products)
    checks = list(canary._check_operations(4))
    wrong = [(check.name, check.precision) for check in checks if not check.passed]
    assert wrong == [("convolution 1x1", "float32")]  # TF32 is less precise than that


def test_numbers_that_are_nan_are_noticed():
    nan, one = jnp.float32("nan"), jnp.float32(1)
    for found in ((nan, one), (one, nan)):
        check = canary._check("sum", "float32", found, (one, one), 1e-6, "CPU")
        assert not check.passed


def test_turns_are_as_long_for_fast_steps_as_for_slow_ones(monkeypatch):
    clock, counts = [0.0], {"slow": [], "fast": []}
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def take(name, seconds):
        def call(times):
            counts[name].append(times)
            clock[0] += times * seconds

        return call

    scale = dataclasses.replace(THIN, turn=0.25)
    seconds = gpu._take_turns(
        {"slow": take("slow", 0.5), "fast": take("fast", 0.125)}, scale
    )
    assert counts["slow"][-scale.rounds :] == [1, 1]  # it takes longer than a turn
    assert counts["fast"][-scale.rounds :] == [2, 2]
    assert seconds == {"slow": [0.5, 0.5], "fast": [0.125, 0.125]}  # of one step


def script(python, tmp_path, *arguments):
    return subprocess.run(
        [SCRIPT, *arguments],
        env={"PATH": "/usr/bin:/bin", "PYTHON": python, "OUT": tmp_path / "out"},
        capture_output=True,
        text=True,
    )


def test_the_script_keeps_a_log(tmp_path):
    found = script(sys.executable, tmp_path, "--parts", "canary")
    assert found.returncode == 1
    assert found.stdout.startswith("error: JAX finds no GPU, but cpu: install its")
    assert (tmp_path / "out/log.txt").read_text() == found.stdout


def test_the_script_names_what_is_missing(tmp_path):
    venv.create(tmp_path / "venv", with_pip=False)
    found = script(tmp_path / "venv/bin/python", tmp_path)
    assert found.returncode != 0
    first, *_ = found.stdout.splitlines()
    assert first.startswith("missing packages: absl-py filelock flax grain ")
    assert first.endswith(" tyro")
    assert "No module named pip" in found.stdout
