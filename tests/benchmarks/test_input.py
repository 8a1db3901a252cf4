"""The benchmark of input, on stand-ins for its datasets that need no archive."""

import csv
import dataclasses

import numpy as np
import pytest
from PIL import Image

import benchmarks.input as input_benchmark
from benchmarks.input import InputConfig
from train import data
from train.errors import UsageError


def write_photos(folder):
    random = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(16):
            photo = folder / split / "images" / f"{i}.jpg"
            mask = folder / split / "masks" / f"{i}.png"
            for path, shape in ((photo, (24, 32, 3)), (mask, (24, 32))):
                path.parent.mkdir(parents=True, exist_ok=True)
                high = 3 if path == mask else 255
                values = random.integers(0, high, shape, dtype=np.uint8)
                Image.fromarray(values).save(path)


def write_classes(folder):
    random = np.random.default_rng(0)
    for i in range(160):
        path = folder / "train" / f"class{i % 2}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), np.uint8)).save(path)


@pytest.mark.slow
def test_every_way_is_timed(run, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(input_benchmark, "_MODEL", "resnet8")
    subjects = input_benchmark._subjects
    monkeypatch.setattr(
        input_benchmark,
        "_subjects",
        lambda *arguments: [
            dataclasses.replace(
                subject,
                config=dataclasses.replace(subject.config, batch_size=8),
                batches=2,
                steps=1,
            )
            for subject in subjects(*arguments)
        ],
    )
    write_photos(tmp_path / "photos")
    write_classes(tmp_path / "classes")
    places = {"data_dir": tmp_path / "prepared"}
    data.prepare("image_folder/small", source=tmp_path / "classes", **places)
    data.prepare(
        "segmentation_folder/small",
        source=tmp_path / "photos",
        classes=["a", "b", "c"],
        **places,
    )
    names = ("--cifar10", "image_folder/small", "--camvid", "segmentation_folder/small")
    folders = ("--data-dir", tmp_path / "prepared", "--run-dir", tmp_path / "run")
    run("input", *names, *folders, "--rounds", 1)
    with (tmp_path / "run" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} == {
        "image_folder/small",
        "segmentation_folder/small",
    }
    ways = {(row["dataset"], row["part"], row["name"]) for row in rows}
    for dataset in ("image_folder/small", "segmentation_folder/small"):
        for way in ("in memory", "grain, threads"):
            assert (dataset, "input alone", way) in ways
            assert (dataset, "training step", way) in ways
        assert (dataset, "training step", "constant batch") in ways
        for way in ("PIL, decoding alone", "NumPy, from memory"):
            assert (dataset, "input alone", way) in ways
    for row in rows:
        expected = int(row["batch_size"]) / float(row["seconds"])
        assert float(row["images_per_second"]) == pytest.approx(expected)
        assert float(row["ratio_median"]) > 0
        assert row["pillow"]
        assert row["commit"]
    printed = capsys.readouterr().out
    assert "training step" in printed
    lines = [line for line in printed.splitlines() if " [" in line]
    assert len(lines) == len(rows) + 4  # with four headers, and each on one line
    assert max(map(len, lines)) <= 80


def test_what_is_missing_is_said_before_anything_is_timed(run, tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: image_folder/cifar10 is not prepared"
    ):
        run("input", "--data-dir", tmp_path, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bad_numbers_are_refused_from_python_too():
    with pytest.raises(UsageError, match="rounds must be greater than 0, got 0"):
        InputConfig(rounds=0)
