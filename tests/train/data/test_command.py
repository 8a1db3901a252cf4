"""python -m train.data, as its user types it, on what needs no archive."""

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import train.data.__main__ as command_line


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
    monkeypatch.setenv("COLUMNS", "120")
    command_line.main()
    return capsys.readouterr().out


def test_list_names_what_there_is_and_what_is_prepared(monkeypatch, capsys):
    run(monkeypatch, capsys, "info", "digits")
    text = run(monkeypatch, capsys, "list")
    for name in (
        "digit_scenes",
        "image_folder/NAME",
        "voc2012_segmentation",
        "cifar10",
    ):
        assert name in text
    assert "digits" in text.partition("Prepared in")[2]


def test_info_counts_and_measures(monkeypatch, capsys):
    text = run(monkeypatch, capsys, "info", "digits")
    assert "digits in " in text
    rows = [line.split() for line in text.splitlines()]
    assert ["train", "1,000", "8", "x", "8"] in [row[:5] for row in rows]
    assert ["test", "797", "8", "x", "8"] in [row[:5] for row in rows]
    # Every class is a tenth of the examples, give or take one percent.
    shares = [float(row[2]) for row in rows if row[:2] == ["3", "3"]]
    assert shares == [pytest.approx(10, abs=1)]


def test_show_draws_what_a_task_needs(monkeypatch, capsys, tmp_path):
    for name, task in (
        ("digits", "classification"),
        ("digit_scenes", "segmentation"),
        ("digit_scenes", "translation"),
    ):
        path = tmp_path / f"{name}-{task}.png"
        arguments = ("--output", path, "--task", task, "--split", "test", "--count", 6)
        text = run(monkeypatch, capsys, "show", name, *arguments)
        assert f"{name}, 6 of" in text
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet)
        assert min(pixels.shape[:2]) > 300
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "digits", "--split", "val"), "no split 'val'; it has train, test"),
        (("show", "digits", "--count", "0"), "count must be at least 1, got 0"),
        (("show", "digits", "--task", "segmentation"), "not for segmentation"),
        (("show", "digits", "--seed", "-1"), "seed must be 0 or more, got -1"),
        (("show", "digits", "--output", "x.txt"), "must be a file NAME.png, got x.txt"),
        (("info", "camvid"), "python -m train.data prepare camvid --source PATH"),
        (("prepare", "camvid"), "prepare camvid --source PATH"),
        (("prepare", "camvid", "--source", "nowhere"), "no folder or archive nowhere"),
        (("prepare", "camvid", "--test-fraction", "0.2"), "camvid"),
        (("prepare", "flowers"), "unknown dataset 'flowers'; .*known: digits"),
        (
            ("prepare", "image_folder/x", "--source", ".", "--test-fraction", "1"),
            "test_fraction must be between 0 and 1, got 1.0",
        ),
        (
            ("prepare", "segmentation_folder/x", "--source", "."),
            "such as background,road,car",
        ),
    ],
)
def test_errors_are_one_line(monkeypatch, capsys, tmp_path, arguments, message):
    with pytest.raises(SystemExit, match=message) as error:
        run(monkeypatch, capsys, *arguments, "--data-dir", tmp_path)
    assert str(error.value).startswith("error: ")


def test_a_prepared_dataset_is_left_alone(monkeypatch, capsys):
    run(monkeypatch, capsys, "info", "digits")
    text = run(monkeypatch, capsys, "prepare", "digits")
    assert "prepared already; to do it again, remove" in text


def test_help_shows_every_command():
    command = [sys.executable, "-m", "train.data", "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("list", "prepare", "info", "show"):
        assert name in result.stdout
    assert not result.stderr
