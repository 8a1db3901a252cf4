"""The first load decodes each image once, for the statistics and for the cache."""

import collections
import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from train import data
from train.data import dataset as dataset_module
from train.data import loaders
from train.data.config import DataConfig
from train.data.images import decode
from train.data.preparation import measure
from train.errors import UsageError

NAME = "image_folder/noise"
UNIFORM = ((24, 18),)
MIXED = ((24, 18), (18, 30), (24, 18))


def prepare(folder, sizes):
    """Prepares 30 images to train on and 12 to test on, of (width, height) in turn."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("test", 12)):
        for i in range(count):
            width, height = sizes[i % len(sizes)]
            path = folder / "source" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(path)
    data.prepare(NAME, source=folder / "source", data_dir=folder / "data")
    return folder / "data"


@pytest.fixture
def decoded(monkeypatch):
    """Counts how often each image is decoded."""
    counts = collections.Counter()

    def counting(content, channels):
        counts[content] += 1
        return decode(content, channels)

    monkeypatch.setattr(dataset_module, "decode", counting)
    return counts


def statistics(data_dir):
    path = data.folder_of(NAME, data_dir) / "statistics.json"
    return json.loads(path.read_text())["splits"]


def cached(data_dir):
    folder = data.folder_of(NAME, data_dir) / "cache"
    return sorted(path.name for path in folder.glob("*[!k]"))  # but for the lock


def assert_cache_holds_what_is_read(dataset):
    for split in dataset.splits.values():
        arrays, read = split.arrays(), split.read(range(len(split)))
        for key in read:
            np.testing.assert_array_equal(arrays[key], read[key])


CONFIGS = {
    "stored size": (UNIFORM, {}),
    "another size": (UNIFORM, {"image_size": (9, 12)}),
    "images of several sizes": (MIXED, {"image_size": (9, 12)}),
    "loader auto": (MIXED, {"image_size": (9, 12), "loader": "auto"}),
    "held out": (UNIFORM, {"eval_split": "validation"}),
    "cropped as stored": (
        UNIFORM,
        {"image_size": (9, 12), "augment": ("random_resized_crop",)},
    ),
    "cropped as stored and held out": (
        UNIFORM,
        {
            "image_size": (9, 12),
            "augment": ("random_resized_crop",),
            "eval_split": "validation",
        },
    ),
}


@pytest.mark.parametrize(("sizes", "options"), CONFIGS.values(), ids=CONFIGS)
def test_each_image_is_decoded_once(tmp_path, decoded, sizes, options):
    data_dir = prepare(tmp_path, sizes)
    config = DataConfig(
        **{"dataset": NAME, "data_dir": data_dir, "loader": "memory", **options}
    )
    dataset = config.load("classification")
    opened = config.open(dataset)
    assert {type(loader) for loader in opened} == {loaders.InMemoryLoader}
    assert len(decoded) == 42
    assert set(decoded.values()) == {1}
    train = config.training_split(dataset)
    splits = {"train": train, "eval": dataset.split(config.eval_split)}
    assert_cache_holds_what_is_read(dataclasses.replace(dataset, splits=splits))


@pytest.mark.parametrize("sizes", [UNIFORM, MIXED])
@pytest.mark.parametrize("limit", [60_000, 11])
def test_statistics_are_those_of_stored_images(tmp_path, monkeypatch, sizes, limit):
    monkeypatch.setattr(measure, "_MAX_MEASURED", limit)
    data_dir = prepare(tmp_path, sizes)
    file = data.folder_of(NAME, data_dir) / "statistics.json"
    config = DataConfig(
        dataset=NAME, data_dir=data_dir, image_size=(9, 12), loader="grain"
    )
    alone = config.load("classification")
    assert not (file.parent / "cache").exists()
    expected = statistics(data_dir)
    file.unlink()
    together = dataclasses.replace(config, loader="memory").load("classification")
    assert statistics(data_dir) == expected
    assert expected["train"]["num_measured"] == min(limit, 30)
    assert (together.mean, together.std) == (alone.mean, alone.std)
    assert len(cached(data_dir)) == 4


def test_a_large_split_is_decoded_once_though_a_sample_is_measured(
    tmp_path, monkeypatch, decoded
):
    monkeypatch.setattr(measure, "_MAX_MEASURED", 7)
    data_dir = prepare(tmp_path, UNIFORM)
    config = DataConfig(dataset=NAME, data_dir=data_dir, loader="memory")
    dataset = config.load("classification")
    config.open(dataset)
    assert statistics(data_dir)["test"]["num_measured"] == 7
    assert len(decoded) == 42
    assert set(decoded.values()) == {1}
    assert_cache_holds_what_is_read(dataset)


@pytest.mark.parametrize("loader", ["memory", "auto"])
def test_images_that_differ_in_size_leave_no_cache(tmp_path, loader):
    data_dir = prepare(tmp_path, MIXED)
    config = DataConfig(dataset=NAME, data_dir=data_dir, loader=loader)
    with pytest.raises(UsageError, match="from 18 to 24 pixels wide and from 18 to 30"):
        config.load("classification")
    assert cached(data_dir) == []


def test_nothing_is_cached_that_will_be_decoded_while_training(
    tmp_path, monkeypatch, decoded
):
    data_dir = prepare(tmp_path, UNIFORM)
    num_bytes = 42 * (24 * 18 * 3 + 4)
    config = DataConfig(dataset=NAME, data_dir=data_dir)
    monkeypatch.setattr(loaders, "device_bytes", lambda: 4 * num_bytes - 1)
    dataset = config.load("classification")
    assert {type(x) for x in config.open(dataset)} == {loaders.GrainLoader}
    assert cached(data_dir) == []
    monkeypatch.setattr(loaders, "device_bytes", lambda: 4 * num_bytes)
    (data.folder_of(NAME, data_dir) / "statistics.json").unlink()
    decoded.clear()
    dataset = config.load("classification")
    assert {type(x) for x in config.open(dataset)} == {loaders.InMemoryLoader}
    assert len(decoded) == 42
    assert set(decoded.values()) == {1}


def test_a_cache_that_is_there_is_kept(tmp_path, decoded):
    data_dir = prepare(tmp_path, UNIFORM)
    config = DataConfig(dataset=NAME, data_dir=data_dir, loader="memory")
    config.load("classification")
    folder = data.folder_of(NAME, data_dir)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("cache/*.npy")}
    (folder / "statistics.json").unlink()
    config.open(config.load("classification"))
    after = {path: path.stat().st_mtime_ns for path in folder.glob("cache/*.npy")}
    assert len(before) == 4
    assert before == after
    assert set(decoded.values()) == {2}  # the second time for the statistics alone


def test_both_halves_of_a_pair_are_decoded_at_once(tmp_path, decoded):
    rng = np.random.default_rng(0)
    for i in range(8):
        path = tmp_path / "source" / ("train" if i < 6 else "test") / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 16, 3), np.uint8)).save(path)
    name, data_dir = "paired_images/noise", tmp_path / "data"
    data.prepare(name, source=tmp_path / "source", data_dir=data_dir)
    config = DataConfig(dataset=name, data_dir=data_dir, loader="memory")
    config.open(config.load("translation"))
    assert len(decoded) == 8
    assert set(decoded.values()) == {1}
