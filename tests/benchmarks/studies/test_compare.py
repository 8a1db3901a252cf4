"""The study as its user runs it, as small as it can be."""

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest
from PIL import Image

from benchmarks.studies import study
from benchmarks.studies.config import CompareConfig
from benchmarks.studies.methods import OURS
from benchmarks.studies.plan import Cost
from benchmarks.studies.tasks import STUDY_TASKS
from train import data
from train.errors import UsageError
from train.tasks.recipes import RECIPES

ROOT = Path(__file__).parents[3]
SMALL = ("compare", "classification", "--dataset", "digits", "--epochs", "1")
THREE = ("--techniques", "perturbed_unit_step")  # with two baselines
NAMES = ["sgd", "sgd, 2x epochs", "perturbed_unit_step"]

pytestmark = pytest.mark.usefixtures("one_device", "thin")


def rows(folder):
    """The rows of a study, without one that was cut off."""
    lines = (folder / "rows.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]


def runs(folder):
    return [(row["method"], row["seed"]) for row in rows(folder)]


@pytest.fixture
def compiled(monkeypatch):
    """The techniques of the programs that are compiled."""
    found = []
    compile_program = study.compile_program

    def count(task, config, dataset):
        found.append(config.optimizer.techniques)
        return compile_program(task, config, dataset)

    monkeypatch.setattr(study, "compile_program", count)
    return found


@pytest.mark.slow
def test_a_study_is_run_once_and_finished_where_it_stopped(
    run, compiled, monkeypatch, tmp_path, capsys
):
    folder = tmp_path / "study"
    arguments = (*SMALL, *THREE, "--run-dir", folder)
    run(*arguments, "--seeds", 2)
    printed = capsys.readouterr().out
    first = rows(folder)
    assert len(first) == 3 * 2
    # Each method is compiled once for all seeds.
    assert compiled == [(), (), ("perturbed_unit_step",)]
    assert "3 methods, 2 seeds, epochs: 1; 6 runs to train, 80 steps, about" in printed
    for name in ("sgd, 2x epochs", "perturbed_unit_step", "paired over 2 seeds"):
        assert name in printed
    table = [line for line in printed.splitlines() if " ± " in line]
    assert len(table) == 3
    assert max(map(len, table)) <= 80
    assert (folder / "learning_curves.png").stat().st_size > 10_000
    page = (folder / "report.html").read_text()
    assert "python -m benchmarks compare classification --dataset digits" in page
    with (folder / "rows.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["method"] for row in table] == [row["method"] for row in first]
    assert all(0 < float(row["accuracy"]) <= 1 for row in table)
    assert {row["gradient_evaluations"] for row in table} == {"10", "20"}
    assert all(row["jax"] and row["device"] and row["commit"] for row in table)

    # Two rows lost, one cut off in the middle: only these run again, to the same end.
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:4]) + lines[4][:50])
    run(*arguments, "--seeds", 2)
    second = rows(folder)
    assert second[:4] == first[:4]
    for key in ("method", "seed", "accuracy"):
        assert [row[key] for row in second] == [row[key] for row in first]

    # One more seed takes the rows that are there.
    run(*arguments, "--seeds", 3)
    assert rows(folder)[:6] == second
    assert [row["seed"] for row in rows(folder)] == [0, 0, 0, 1, 1, 1, 2, 2, 2]

    # Finished: nothing is trained, the table comes at once, of all seeds there are.
    before = (folder / "rows.jsonl").read_bytes()
    monkeypatch.setattr(study, "compile_program", None)
    monkeypatch.setattr(study, "train", None)
    capsys.readouterr()
    run(*arguments, "--seeds", 2)
    assert (folder / "rows.jsonl").read_bytes() == before
    assert "paired over 3 seeds" in capsys.readouterr().out

    # Another study does not go into the folder.
    with pytest.raises(SystemExit, match="epochs: 1 in the folder, now 2"):
        run(*arguments, "--epochs", 2)


def test_a_folder_that_cannot_be_written_fails_before_training(
    run, monkeypatch, tmp_path
):
    (tmp_path / "file").touch()
    monkeypatch.setattr(study, "compile_program", None)
    with pytest.raises(SystemExit, match="cannot write to run folder"):
        run(*SMALL, "--run-dir", tmp_path / "file" / "study")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"seeds": 1}, "seeds must be greater than or equal to 2, got 1"),
        ({"epochs": 0}, "epochs must be greater than 0, got 0"),
        ({"batch_size": 0}, "batch_size must be greater than 0, got 0"),
        ({"learning_rate": 0.0}, "learning_rate must be greater than 0, got 0.0"),
        ({"budget": 0.0}, "budget must be greater than 0, got 0.0"),
        ({"model": "resnet9"}, "unknown model 'resnet9'; did you mean resnet8"),
        ({"model": "unet_small"}, "unknown model 'unet_small'; "),
        ({"eval_split": "train"}, "eval_split must be 'test' or 'validation', got "),
        ({"task": "detection"}, "unknown task 'detection'; known: classification, "),
        ({"techniques": ("sam", "sam")}, "technique 'sam' is named twice"),
        ({"base_optimizer": "adm"}, "unknown optimizer 'adm'; did you mean adam"),
        ({"optimizers": ("adm",)}, "unknown optimizer 'adm'; did you mean adam"),
        ({"optimizers": ("sgd",)}, "optimizer 'sgd' is named twice"),
        (
            {"optimizers": ("adam",), "learning_rate": 0.1},
            "optimizers and learning_rate exclude each other",
        ),
        ({"momentum": 1.0}, "momentum must be less than 1, got 1.0"),
        ({"recipe": "pix2pix"}, "unknown recipe 'pix2pix'; did you mean pix2pix_maps"),
        ({"recipe": "pix2pix_maps"}, "recipe pix2pix_maps is not for classification"),
        ({"task": "translation", "weights": "w.safetensors"}, "weights are not for tr"),
        ({"techniques_on": "both"}, "techniques_on is for translation alone"),
        ({"budget": 60.0, "runners": 2}, "a budget is for one process"),
        ({"ray": "auto"}, "ray needs the number of runners"),
    ],
)
def test_wrong_settings_are_refused_from_python_too(setting, message):
    with pytest.raises(UsageError, match=f"^{message}"):
        CompareConfig(**{"task": "classification"} | setting)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--techniques", "centralise"), "unknown technique 'centralise'; did you"),
        (("--techniques", "centralize,sam,centralize"), "'centralize' is named twice"),
        (("--budget", "10"), "budget must be a time above 0 with a unit"),
        pytest.param(
            ("--budget", "1s"),
            "a budget of 1 s is too small: one epoch and 2 seeds of 7 methods take",
            marks=pytest.mark.slow,
        ),
        (("--dataset", "digitz"), "digitz"),
        (("--batch-size", "2000"), "2000"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_it_is(
    run, monkeypatch, tmp_path, capsys, arguments, message
):
    monkeypatch.setattr(study, "train", None)
    with pytest.raises(SystemExit) as error:
        run("compare", "classification", "--run-dir", tmp_path / "study", *arguments)
    (line,) = f"{error.value} {capsys.readouterr().err}".strip().splitlines()[-1:]
    assert re.search(message, line)
    assert not (tmp_path / "study").exists()


def test_a_learning_rate_replaces_that_of_every_method():
    own = CompareConfig(task="classification").methods
    changed = CompareConfig(task="classification", learning_rate=0.7).methods
    for method, before in zip(changed, own, strict=True):
        assert method.optimizer.learning_rate == 0.7
        assert method.optimizer.techniques == before.optimizer.techniques


def method_named(config, name):
    (method,) = (method for method in config.methods if method.name == name)
    return method


def test_no_method_is_named_after_a_momentum_that_it_does_not_have():
    named = "sgd, momentum 0.5"
    for momentum, expected in (
        (None, [named, "scale_by_random"]),
        (0.9, ["sgd", "scale_by_random"]),
    ):
        config = CompareConfig(
            task="classification", techniques=("scale_by_random",), momentum=momentum
        )
        assert [method.name for method in config.methods] == expected
        assert {m.optimizer.momentum for m in config.methods} == {momentum or 0.5}


def test_momentum_and_decay_are_those_of_all_methods_but_step_tuned_sgd():
    options = {"techniques": OURS, "optimizers": ("adam",)}
    for recipe in (None, "rg_cifar10_resnet34"):
        config = CompareConfig(
            task="classification",
            recipe=recipe,
            momentum=0.75,
            weight_decay=0.25,
            **options,
        )
        assert len(config.methods) >= 7
        for method in config.methods:
            step_tuned = method.name == "barzilai_borwein_step"
            assert method.optimizer.momentum == (0 if step_tuned else 0.75)
            assert method.optimizer.weight_decay == 0.25
    # It takes the steps that its baseline takes in the end: 0.1 / (1 - 0.75).
    step_tuned = method_named(config, "barzilai_borwein_step")
    assert step_tuned.optimizer.learning_rate == pytest.approx(0.4)


def test_a_recipe_sets_all_but_the_techniques():
    config = CompareConfig(
        task="classification",
        recipe="gc_cifar100_resnet50",
        techniques=("centralize", "centralize:conv_only=false", "sam"),
    )
    recipe = RECIPES["gc_cifar100_resnet50"]()
    names = ["sgd", "sgd, 2x epochs", *config.techniques]
    assert [method.name for method in config.methods] == names
    runs = [
        config.run_config(method, config.usual_epochs, config.usual_batch_size)
        for method in config.methods
    ]
    base = dataclasses.replace(recipe.optimizer, techniques=())
    assert runs[0] == dataclasses.replace(recipe, optimizer=base)
    assert runs[0].data.dataset == "cifar100"
    assert runs[0].data.augment == ("pad_crop", "random_flip")
    assert (runs[0].epochs, runs[0].batch_size) == (200, 128)
    # Twice the epochs lower the learning rate at the same parts of the run.
    assert runs[1].epochs == 400
    assert runs[1].optimizer.milestones == (120, 240, 360)
    # The options of the recipe's techniques are kept, unless a method sets them.
    assert runs[2] == recipe
    assert [run.optimizer.conv_only for run in runs] == [True] * 3 + [False, True]


@pytest.mark.parametrize(("given", "expected"), [(None, "generator"), ("both", "both")])
def test_techniques_act_on_the_networks_that_are_named(given, expected):
    config = CompareConfig(task="translation", techniques_on=given)
    for method in config.methods:
        assert config.run_config(method, 1, 1).techniques_on == expected


def test_flags_override_a_recipe():
    config = CompareConfig(
        task="classification",
        recipe="rg_cifar10_resnet34",
        dataset="digits",
        model="resnet8",
        epochs=3,
        eval_every=2,
        batch_size=7,
        learning_rate=0.7,
        weights="weights.safetensors",
        techniques=("scale_by_random", "scale_by_random:probability=0.5"),
    )
    for method in config.methods:
        run = config.run_config(method, config.usual_epochs, config.usual_batch_size)
        assert run.data.dataset == "digits"
        assert run.data.augment == ("pad_crop", "random_flip")
        assert (run.model, run.epochs, run.batch_size) == ("resnet8", 3, 7)
        assert run.eval_every == 2
        assert run.weights == Path("weights.safetensors")
        assert run.optimizer.learning_rate == 0.7
        assert (run.optimizer.momentum, run.optimizer.schedule) == (0.5, "poly")
    assert [m.optimizer.probability for m in config.methods] == [1.0, 1.0, 0.5]


def test_options_of_the_techniques_of_a_recipe_are_kept():
    config = CompareConfig(
        task="segmentation", recipe="rg_voc_pspnet101", techniques=("scale_by_random",)
    )
    baseline, method = config.methods
    assert baseline.optimizer.techniques == ()
    assert method.optimizer.probability == 0.5
    assert config.data.eval_split == "validation"


def test_the_head_learns_faster_by_the_same_factor_at_every_rate():
    options = {"task": "classification", "recipe": "gc_aircraft_resnet50"}
    own = CompareConfig(**options, techniques=("centralize",))
    assert (own.base.learning_rate, own.base.head_learning_rate) == (0.01, 0.1)
    config = CompareConfig(**options, techniques=("centralize",), learning_rate=0.2)
    for method in config.methods:
        assert method.optimizer.head_learning_rate == pytest.approx(2.0)
    with pytest.raises(UsageError, match="has one learning rate for all parameters"):
        CompareConfig(**options, techniques=("barzilai_borwein_step",))


def test_optimizers_are_compared_alone_if_no_technique_is_named():
    config = CompareConfig(
        task="segmentation", techniques=(), optimizers=("lamb", "sgd")
    )
    assert [method.name for method in config.methods] == ["adam", "lamb", "sgd"]


def test_who_trains_and_how_much_does_not_make_another_study(tmp_path):
    def described(**options):
        return CompareConfig(task="classification", **options).described()

    same = described()
    for options in (
        {"runners": 4},
        {"runners": 4, "ray": "auto"},
        {"seeds": 3},
        {"budget": 60.0},
    ):
        assert described(**options) == same
    for options in (
        {"recipe": "gc_cifar100_resnet50"},
        {"techniques": ("sam:rho=0.1",)},
        {"optimizers": ("adam",)},
        {"momentum": 0.8},
        {"weight_decay": 0.1},
        {"eval_every": 2},
    ):
        assert described(**options) != same

    weights, moved = tmp_path / "a.safetensors", tmp_path / "b" / "a.safetensors"
    moved.parent.mkdir()
    for path in (weights, moved):
        path.write_bytes(b"one")
    first = described(weights=weights)
    assert first != same
    assert first == described(weights=moved)
    weights.write_bytes(b"two")
    assert first != described(weights=weights)
    with pytest.raises(UsageError, match="c is not a file: give the path of one"):
        described(weights=tmp_path / "c")


def test_a_study_with_a_budget_is_not_shared(run, tmp_path):
    arguments = (*SMALL, "--budget", "1m", "--run-dir", tmp_path)
    refused = pytest.raises(SystemExit, match="in use by another process: wait for it")
    with filelock.FileLock(tmp_path / ".lock"), refused:
        run(*arguments)


@pytest.mark.slow
def test_a_budget_chooses_epochs_and_seeds_and_keeps_them(
    run, compiled, monkeypatch, tmp_path, capsys
):
    """A run of one epoch is said to take a second for each gradient."""

    def measure(program, epochs_factor):
        program.compile_seconds = 0.0
        gradients = program.config.optimizer.gradients_per_step
        return Cost(
            start=0.0,
            step=gradients / 10,
            evaluation=0.0,
            steps_per_epoch=program.steps_before(1),
            epochs_factor=epochs_factor,
        )

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(study.time, "monotonic", lambda: 0.0)
    # The three methods take 5 s for an epoch of each seed; a part is kept in reserve.
    arguments = (*SMALL[:4], *THREE, "--run-dir", tmp_path / "study")
    run(*arguments, "--budget", "49s")
    assert "3 methods, 3 seeds, epochs: 2; " in capsys.readouterr().out
    assert compiled[0] == ()
    done = rows(tmp_path / "study")
    assert [row["seed"] for row in done] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert max(point["epoch"] for row in done for point in row["curve"]) == 4

    # The same budget again: all is there. More of it: more seeds of as many epochs.
    compiled.clear()
    run(*arguments, "--budget", "49s")
    assert rows(tmp_path / "study") == done
    assert compiled == []
    run(*arguments, "--budget", "29s")
    assert (
        "epochs: 2; 1,000 training examples; 3 runs to train" in capsys.readouterr().out
    )
    assert rows(tmp_path / "study")[:9] == done

    # Too little for all examples: half of them, and so in every later run.
    folder = tmp_path / "fewer"
    arguments = (*SMALL[:4], *THREE, "--run-dir", folder, "--batch-size", 50)
    run(*arguments, "--budget", "27s")
    assert "500 training examples; 6 runs to train" in capsys.readouterr().out
    gradients = {row["gradient_evaluations"] for row in rows(folder)}
    run(*arguments, "--seeds", 3)
    assert "3 runs to train" in capsys.readouterr().out
    assert {row["gradient_evaluations"] for row in rows(folder)} == gradients


FOLDERS = {
    "image_folder": {"{split}/{kind}/{i}.png": "RGB"},
    "segmentation_folder": {
        "{split}/images/{kind}{i}.png": "RGB",
        "{split}/masks/{kind}{i}.png": "L",
    },
    "paired_images": {"{split}/A/{kind}{i}.png": "RGB", "{split}/B/{kind}{i}.png": "L"},
}


def prepare_folder(builder, tmp_path, size):
    """Prepares a folder of 24 training and 8 test files, as a user has it."""
    rng, source = np.random.default_rng(0), tmp_path / "source"
    for split, count in (("train", 12), ("test", 4)):
        for kind in ("left", "right"):
            for i in range(count):
                pixels = rng.integers(100, size=(size, size))
                truth = np.repeat([[1, 0]], size // 2, axis=1).repeat(size, axis=0)
                truth = truth if kind == "left" else 1 - truth
                pixels += 100 * truth
                for name, mode in FOLDERS[builder].items():
                    path = source / name.format(split=split, kind=kind, i=i)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image = truth if mode == "L" else np.stack([pixels] * 3, axis=-1)
                    Image.fromarray(image.astype(np.uint8)).save(path)
    options = {"classes": ["wall", "gate"]} if builder == "segmentation_folder" else {}
    data.prepare(f"{builder}/own", source=source, data_dir=tmp_path / "data", **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "builder", "score"),
    [
        ("classification", "image_folder", "accuracy"),
        ("segmentation", "segmentation_folder", "mean IoU"),
        ("translation", "paired_images", "L1 error"),
    ],
)
def test_own_images_of_every_task(run, tmp_path, capsys, task, builder, score):
    prepare_folder(builder, tmp_path, 16)
    folder = tmp_path / "study"
    run(
        *("compare", task, "--dataset", f"{builder}/own"),
        *("--data-dir", tmp_path / "data", "--run-dir", folder),
        *("--techniques", "centralize", "--epochs", 1, "--seeds", 2),
    )
    printed = capsys.readouterr().out
    assert f"Differences are points of {score}, paired over 2 seeds" in printed
    # A batch is a tenth of the examples, but at least two.
    assert "2 methods, 2 seeds, epochs: 1; 4 runs to train, 48 steps" in printed
    key = STUDY_TASKS[task].score
    assert len(rows(folder)) == 4
    assert all(0 <= row[key] <= 1 for row in rows(folder))
    assert all(row["failure"] is None for row in rows(folder))
    assert f"{builder}/own" in (folder / "report.html").read_text()


@pytest.mark.slow
def test_a_split_that_is_missing_is_named(run, monkeypatch, tmp_path):
    prepare_folder("image_folder", tmp_path, 8)
    monkeypatch.setattr(study, "compile_program", None)

    def load(*arguments, **options):
        dataset = data.load("image_folder/own", data_dir=tmp_path / "data")
        splits = {"train": dataset.split("train")}
        return dataclasses.replace(dataset, splits=splits)

    monkeypatch.setattr("train.data.config.load", load)
    with pytest.raises(SystemExit, match="has no split 'test'; it has train"):
        run("compare", "classification", "--dataset", "image_folder/own")


# The process is killed while it writes a row, when two are written.
_KILLED = """
import os, signal
from train.output.run_folder import RunFolder
import benchmarks.__main__ as command_line

append, count = RunFolder.append, 0

def append_or_die(folder, name, record):
    global count
    if count == 2 and name == "rows.jsonl":
        with (folder.path / name).open("a") as file:
            file.write('{"method": ')
        os.kill(os.getpid(), signal.SIGKILL)
    count += name == "rows.jsonl"
    append(folder, name, record)

RunFolder.append = append_or_die
command_line.main()
"""


@pytest.mark.slow
def test_a_study_that_was_killed_is_finished_by_the_same_command(run, tmp_path, capsys):
    folder = tmp_path / "study"
    arguments = (*SMALL, *THREE, "--seeds", "2", "--run-dir", str(folder))
    command = [sys.executable, "-c", _KILLED, *arguments]
    process = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True)
    assert process.returncode == -signal.SIGKILL, process.stderr
    kept = rows(folder)
    assert [row["method"] for row in kept] == NAMES[:2]
    assert not (folder / "table.md").exists()

    run(*arguments)
    finished = rows(folder)
    assert finished[:2] == kept
    assert [(row["method"], row["seed"]) for row in finished] == [
        (name, seed) for seed in range(2) for name in NAMES
    ]
    printed = capsys.readouterr().out
    table = (folder / "table.md").read_text()
    for name in NAMES:
        assert name in printed
        assert f"| {name} |" in table
