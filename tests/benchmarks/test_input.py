"""The benchmark of input, on stand-ins for its datasets that need no archive."""

import csv
import dataclasses
import sys

import numpy as np
import pytest
from PIL import Image

import benchmarks.__main__ as command_line
import benchmarks.input as input_benchmark
from train import data


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


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "input", *map(str, arguments)])
    command_line.main()


@pytest.mark.slow
def test_every_way_is_timed(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(input_benchmark, "_MODEL", "resnet8")
    subjects = input_benchmark._subjects
    monkeypatch.setattr(
        input_benchmark,
        "_subjects",
        lambda *names: [
            dataclasses.replace(s, batch_size=8, batches=2, steps=1)
            for s in subjects(*names)
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
    arguments = ("--cifar10", "image_folder/small", "--rounds", 1)
    arguments += (
        "--camvid",
        "segmentation_folder/small",
        "--run-dir",
        tmp_path / "run",
    )
    run(monkeypatch, *arguments, "--data-dir", tmp_path / "prepared")
    with (tmp_path / "run" / "rows.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["dataset"] for row in rows} == {
        "image_folder/small",
        "segmentation_folder/small",
    }
    ways = {(row["part"], row["name"]) for row in rows}
    for way in ("memory", "stream, threads"):
        assert ("input alone", way) in ways
        assert ("training step", way) in ways
    for row in rows:
        expected = int(row["batch_size"]) / float(row["seconds"])
        assert float(row["images_per_second"]) == pytest.approx(expected)
        assert float(row["ratio_median"]) > 0
        assert row["pillow"]
        assert row["commit"]
    assert "training step" in capsys.readouterr().out


def test_what_is_missing_is_said_before_anything_is_timed(monkeypatch, tmp_path):
    with pytest.raises(
        SystemExit, match=r"error: image_folder/cifar10 is not prepared"
    ):
        run(monkeypatch, "--data-dir", tmp_path, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(SystemExit, match="rounds must be at least 1, got 0"):
        run(monkeypatch, "--rounds", 0)
