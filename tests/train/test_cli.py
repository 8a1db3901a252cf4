"""The command as its user types it."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train.__main__ as command_line
from train import run as train_run

ROOT = Path(__file__).parents[2]


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    command_line.main()


@pytest.mark.slow
def test_a_run_leaves_its_folder(tmp_path):
    command = [sys.executable, "-m", "train", "classification", "--dataset", "digits"]
    command += ["--tricks", "centralize,random", "--epochs", "2"]
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
    assert config["config"]["optimizer"]["tricks"] == ["centralize", "random"]
    assert config["config"]["seed"] == 0
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [record["epoch"] for record in records] == [1, 2]
    assert records[1]["train_loss"] < records[0]["train_loss"] < math.log(10) + 1
    assert 0 <= records[1]["train_random_factor"] < 1
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["test_accuracy"] == records[1]["test_accuracy"] > 0.3
    assert summary["gradient_evaluations"] == 20
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tricks", "rndom"), "unknown trick 'rndom'; known: random"),
        (("--augment", "mirrored"), "unknown augmentation 'mirrored'; known: pad_crop"),
        (("--image-size", "0x3"), "'0x3' is no size: write 224, or 360x480"),
        (("--image-size", "32x0"), "'32x0' is no size: write 224, or 360x480"),
        (("--input", "disk"), "invalid choice 'disk' for argument '--input'"),
        (("--model", "resnet9"), "resnet110"),
        (("--learning-rate", "-1"), "learning rate must be above 0, got -1.0"),
        (("--epochs", "0"), "epochs must be at least 1, got 0"),
        (("--epoch", "3"), "Perhaps you meant"),
    ],
)
def test_wrong_flags_say_what_exists(monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "classification", *arguments)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_and_list_of_tricks(monkeypatch, capsys):
    with pytest.raises(SystemExit) as error:
        run(monkeypatch, "classification", "--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--dataset", "--model", "--tricks", "--run-dir", "--learning-rate"):
        assert flag in text
    run(monkeypatch, "tricks")
    assert "perturbed_unit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("--dataset", "digit"),
            "unknown dataset 'digit'; known: digits, digit_scenes",
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
    for way in ("resident", "stream"):
        folder = tmp_path / way
        arguments = ("--epochs", 1, "--input", way, "--workers", 0, "--batch-size", 64)
        arguments += ("--augment", "pad_crop,mirror,color_jitter,cutout")
        run(monkeypatch, "classification", *arguments, "--run-dir", folder)
        losses.append(json.loads((folder / "summary.json").read_text())["train_loss"])
    assert losses[0] == losses[1]


def test_what_cannot_be_trained_leaves_no_folder(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="unknown dataset"):
        run(
            monkeypatch,
            "classification",
            "--dataset",
            "digit",
            "--run-dir",
            tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()


def test_an_interruption_is_one_word(monkeypatch, tmp_path):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_run, "fit", interrupt)
    with pytest.raises(SystemExit, match=r"^interrupted$"):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "run")


def test_an_unwritable_folder_fails_before_training(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train_run, "fit", None)
    with pytest.raises(SystemExit, match="cannot write to run folder"):
        run(monkeypatch, "classification", "--run-dir", tmp_path / "file" / "run")


def test_settings_that_cannot_be_built_leave_the_folder_free(monkeypatch, tmp_path):
    arguments = ("classification", "--run-dir", tmp_path / "run", "--batch-size")
    with pytest.raises(SystemExit, match="5000 must be from 1 to the 1000"):
        run(monkeypatch, *arguments, 5000)
    assert not (tmp_path / "run" / "config.json").exists()


def test_divergence_is_one_line_that_names_the_step(monkeypatch, tmp_path):
    arguments = ("--learning-rate", "1e30", "--epochs", "1", "--run-dir", tmp_path)
    with pytest.raises(SystemExit, match=r"not finite at step \d+ .*lower the"):
        run(monkeypatch, "classification", *arguments)
