"""The command line, as a user types it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import train.__main__ as command_line
from tests.shared import squeezed
from train import run as train_run
from train.command_line import run_command
from train.optim.chain import PLACES
from train.optim.config import OPTIMIZERS
from train.optim.schedules import SCHEDULES
from train.optim.techniques import TECHNIQUES
from train.tasks import TASKS
from train.tasks.recipes import RECIPES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("one_device", "thin")


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    command_line.main()


@pytest.mark.parametrize("form", [["--run={}"], ["--run", "{}"]])
def test_paths_below_home_are_not_made_in_the_current_folder(
    monkeypatch, tmp_path, form
):
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = [part.format("~/runs/a") for part in form]
    seen = []
    monkeypatch.setattr(sys, "argv", ["train", *arguments, "--optimizer=sgd"])
    run_command(lambda: seen.extend(sys.argv[1:]))
    expected = [part.format(tmp_path / "runs/a") for part in form]
    assert seen == [*expected, "--optimizer=sgd"]


@pytest.mark.slow
def test_a_run_leaves_its_folder(tmp_path):
    command = [sys.executable, "-m", "train", "classification", "--dataset", "digits"]
    command += ["--techniques", "centralize,scale_by_random", "--epochs", "2"]
    # From another folder, where runs/ is made.
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert str(folder.relative_to(tmp_path)) in result.stdout

    config = json.loads((folder / "config.json").read_text())
    assert config["config"]["data"]["dataset"] == "digits"
    assert config["config"]["optimizer"]["techniques"] == [
        "centralize",
        "scale_by_random",
    ]
    assert config["config"]["seed"] == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["train_loss"] < records[0]["train_loss"] < math.log(10) + 1
    assert 0 <= records[1]["train_random_factor"] < 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] == records[1]["test_accuracy"] > 0.3
    assert summary["gradient_evaluations"] == 20
    steps = [json.loads(x) for x in (folder / "steps.jsonl").read_text().splitlines()]
    assert [record["step"] for record in steps] == [10, 20]
    assert steps[1]["train_gradient_norm"] > 0
    assert events_of(folder / "tensorboard" / "seed0") == {
        *(f"step/{name}" for name in steps[0] if name not in ("seed", "step")),
        *(f"epoch/{name}" for name in records[0] if name not in ("seed", "step")),
        "curves",
        "confusion_matrix",
    }
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def events_of(folder):
    from tensorboard.backend.event_processing.event_accumulator import (
        EventAccumulator,
    )

    found = EventAccumulator(str(folder))
    found.Reload()
    return {*found.Tags()["scalars"], *found.Tags()["images"]}


def box_of(monkeypatch, capsys, *arguments):
    """Returns what a refused command shows, without white space and frame."""
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *arguments)
    assert raised.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    return squeezed(printed.err)


COMMANDS = (*TASKS, "predict", "compare", "export", "recipes", "techniques")


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_the_commands_are_listed(monkeypatch, capsys, arguments):
    run(monkeypatch, *arguments)
    text = capsys.readouterr().out
    lines = text.splitlines()
    assert lines[0] == "usage: python -m train COMMAND ..."
    for command in COMMANDS:
        (line,) = (line for line in lines if line.startswith(f"  {command} "))
        assert len(line.split(maxsplit=1)[1]) > 20
    assert "  python -m train.data " in text
    assert "  python -m benchmarks " in text
    examples = [x for x in lines if x.startswith("  python -m train ")]
    assert len(examples) >= 3
    assert {example.split()[3] for example in examples} <= set(COMMANDS)


def test_an_unknown_command_is_refused_with_all_that_are_known(monkeypatch, capsys):
    text = box_of(monkeypatch, capsys, "")
    assert text.startswith(squeezed("error: unknown command ''; known: "))
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(monkeypatch, capsys, command):
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, command, "--help")
    assert raised.value.code == 0
    assert f"usage: python -m train {command} " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # Values that are not among the known.
        (("--augment", "mirrored"), "unknown augmentation 'mirrored'; known: pad_crop"),
        (
            ("--techniques", "rndom"),
            "unknown technique 'rndom'; known: scale_by_random",
        ),
        (("--loader", "disk"), "invalid choice 'disk' for argument '--loader'"),
        (("--model", "resnet9"), "unknown model 'resnet9'; did you mean resnet8"),
        (("--optimizer", "adm"), "unknown optimizer 'adm'; did you mean adam or"),
        (("--schedule", "cosin"), "unknown schedule 'cosin'; did you mean cosine?"),
        (("--techniques", "centralise"), "did you mean centralize or optax_"),
        (("--augment", "flip"), "unknown augmentation 'flip'; did you mean random_fl"),
        (("--augment", "randomflip"), "did you mean random_flip"),
        (("--recipe", "gc_cifar_resnet50"), "did you mean gc_cifar100_resnet50"),
        (("--recipe", "gc"), "did you mean gc_aircraft_resnet50 or gc_cifar100_resn"),
        (("--recipe", "pix2pix_maps"), "unknown recipe 'pix2pix_maps'"),
        (("--normalization", "imagnet"), "did you mean imagenet? known: dataset, "),
        (("--normalization", "0.5/a"), "'0.5/a' is not MEAN/STD: write 0.5,0.5,0.5/"),
        (("--norm", "bach"), "invalid choice 'bach' for argument '--norm'"),
        (("--norm", "frozen_batch"), "name a file with weights"),
        (("--precision", "bf16"), "Expected one of ('float32', 'bfloat16')"),
        # Values that cannot be read, or are out of range.
        (("--image-size", "0x3"), "'0x3' is no size: write 224, or 360x480"),
        (("--image-size", "32x0"), "'32x0' is no size: write 224, or 360x480"),
        (("--learning-rate", "-1"), "learning_rate must be greater than 0, got -1.0"),
        (("--epochs", "0"), "epochs must be greater than or equal to 1, got 0"),
        (("--epochs", "2.5"), "invalid literal for int() with base 10: '2.5'"),
        (("--grad-accum", "3"), "grad_accum must divide the batch size, 100; got 3"),
        (("--seeds", "0"), "seeds must be greater than or equal to 1, got 0"),
        (("--label-smoothing", "1"), "label_smoothing must be less than 1, got 1.0"),
    ],
)
def test_wrong_flags_say_what_is_allowed(monkeypatch, capsys, arguments, message):
    text = box_of(monkeypatch, capsys, "classification", *arguments)
    assert squeezed(message) in text


def test_every_known_technique_is_named(monkeypatch, capsys):
    arguments = ("classification", "--techniques", "centralise")
    text = box_of(monkeypatch, capsys, *arguments)
    for name, row in TECHNIQUES.items():
        assert squeezed(f"{name} ({row.title}: {row.idea})") in text
    for name, description in PLACES.items():
        assert squeezed(f"{name} ({description})") in text


@pytest.mark.parametrize("task", TASKS)
def test_help_lists_the_settings(monkeypatch, capsys, task):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, task, "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    flags = ("--dataset", "--techniques", "--run-dir", "--learning-rate", "--recipe")
    for flag in flags:
        assert f" {flag} " in text


def test_techniques_places_optimizers_and_schedules_are_listed(monkeypatch, capsys):
    run(monkeypatch, "techniques")
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    assert names == [*TECHNIQUES, *PLACES, *OPTIMIZERS, *SCHEDULES]
    assert [line for line in lines if not line.startswith(" ")] == [
        "--techniques NAME,NAME,..., in the order of the chain",
        "places that --techniques can also name",
        "--optimizer",
        "--schedule",
    ]
    for line in lines:
        if line.startswith("  "):
            assert len(line.split(maxsplit=1)[1]) > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dataset", "digit"),
            "unknown dataset 'digit'; did you mean digits",
        ),
        (("--dataset", "digit_scenes"), "for segmentation and translation, not for"),
        (("--dataset", "camvid"), "python -m train.data prepare camvid --source PATH"),
    ],
)
def test_data_that_cannot_be_trained_on(monkeypatch, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "run", *arguments)


@pytest.mark.slow
def test_a_stream_trains_to_the_same_numbers(monkeypatch, tmp_path):
    losses = []
    for loader in ("memory", "grain"):
        folder = tmp_path / loader
        arguments = ("--epochs", 1, "--batch-size", 64, "--num-workers", 0)
        arguments += ("--augment", "pad_crop,random_flip,color_jitter,cutout")
        arguments += ("--loader", loader, "--run-dir", folder)
        run(monkeypatch, "classification", *arguments)
        losses.append(json.loads((folder / "summary.json").read_text())["train_loss"])
    assert losses[0] == losses[1]


def test_what_cannot_be_trained_leaves_no_folder(monkeypatch, tmp_path):
    folder = tmp_path / "run"
    arguments = ("--dataset", "digit", "--run-dir", folder)
    with pytest.raises(SystemExit, match="unknown dataset"):
        run(monkeypatch, "classification", *arguments)
    assert not folder.exists()


def test_an_interruption_is_one_word(monkeypatch, tmp_path, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "train_seed", interrupt)
    with pytest.raises(SystemExit, match="130"):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "run")
    assert capsys.readouterr().err == "interrupted\n"


def test_an_unwritable_folder_fails_before_training(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_run, "open_program", None)
    with pytest.raises(SystemExit, match="cannot write to run folder"):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "file" / "run")


def test_settings_that_do_not_fit_the_data_leave_no_folder(monkeypatch, tmp_path):
    arguments = ("classification", "--run-dir", tmp_path / "run", "--batch-size")
    with pytest.raises(
        SystemExit, match="batch_size must be from 1 to 1000, the number"
    ):
        run(monkeypatch, *arguments, 5000)
    assert not (tmp_path / "run").exists()


def test_divergence_is_one_line_that_names_the_step(monkeypatch, tmp_path):
    arguments = ("--learning-rate", "1e30", "--epochs", "1", "--run-dir", tmp_path)
    with pytest.raises(SystemExit, match=r"not finite at step \d+ .*lower the"):
        run(monkeypatch, "classification", *arguments)


def test_a_full_device_is_one_line_that_says_what_to_do(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(train_run, "train_seed", fail)
    with pytest.raises(SystemExit, match=r"out of memory: .*--grad-accum"):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "run")


def records_of(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
def test_seeds_in_one_command_are_those_of_several(monkeypatch, tmp_path, capsys):
    common = ("classification", "--epochs", 2, "--techniques", "scale_by_random")
    run(monkeypatch, *common, "--seeds", 2, "--seed", 1, "--run-dir", tmp_path / "all")
    printed = capsys.readouterr().out
    alone = []
    for seed in (1, 2):
        folder = tmp_path / str(seed)
        run(monkeypatch, *common, "--seed", seed, "--run-dir", folder)
        alone += records_of(folder)
    found = records_of(tmp_path / "all")
    for record in found + alone:
        del record["seconds"]
    assert found == alone  # one seed after the other
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    scores = [r["test_accuracy"] for r in found if r["epoch"] == 2]
    assert summary["test_accuracy"] == pytest.approx(sum(scores) / 2)
    mean, low, high = summary["intervals"]["test_accuracy"]
    assert low <= mean == summary["test_accuracy"] <= high
    assert f"{scores[0]:.4f} {scores[1]:.4f}" in printed
    assert (tmp_path / "all" / "tensorboard" / "seed2").is_dir()


def test_a_finished_run_is_not_run_again_and_another_config_is_refused(
    monkeypatch, tmp_path, capsys
):
    common = ("classification", "--epochs", 1, "--run-dir", tmp_path / "run")
    run(monkeypatch, *common)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(train_run, "open_program", None)
    run(monkeypatch, *common)
    assert "already holds this run, finished" in capsys.readouterr().out
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    with pytest.raises(SystemExit, match=r"seed: 0 in the folder, now 1"):
        run(monkeypatch, *common, "--seed", 1)
    with pytest.raises(SystemExit, match="already holds this run: choose another"):
        run(monkeypatch, *common, "--resume", "never")


def test_recipes_are_listed_and_change_the_defaults(monkeypatch, tmp_path, capsys):
    run(monkeypatch, "recipes")
    printed = capsys.readouterr().out
    for name in RECIPES:
        assert f"\n{name}\n" in f"\n{printed}"
    with pytest.raises(SystemExit):
        run(monkeypatch, "translation", "--recipe", "pix2pix_maps", "--help")
    text = squeezed(capsys.readouterr().out)
    assert "(default:unet256)" in text
    # As `--recipe=NAME` too, and for that command only.
    with pytest.raises(SystemExit):
        run(monkeypatch, "translation", "--recipe=pix2pix_maps", "--help")
    assert squeezed(capsys.readouterr().out) == text
    with pytest.raises(SystemExit):
        run(monkeypatch, "translation", "--help")
    assert "(default:unet64_small)" in squeezed(capsys.readouterr().out)


@pytest.mark.slow
def test_a_recipe_is_trained_with_the_flags_that_change_it(monkeypatch, tmp_path):
    arguments = ("classification", "--recipe", "pugd_cifar10_upanet16")
    arguments += ("--dataset", "digits", "--model", "resnet8", "--epochs", 1)
    arguments += ("--augment", "random_flip", "--run-dir", tmp_path / "run")
    run(monkeypatch, *arguments)
    config = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert config["optimizer"]["techniques"] == ["perturbed_unit_step"]
    assert config["model"] == "resnet8"
    assert config["data"]["augment"] == ["random_flip"]
