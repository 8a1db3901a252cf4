"""DataConfig checks its settings, and makes splits and augmentations of them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tyro
from PIL import Image

from train import data
from train.data import augment
from train.data.config import AUGMENTATIONS, DataConfig
from train.errors import UsageError
from train.settings import from_json

NORMALIZE = augment.normalize((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def scenes():
    return data.load("digit_scenes", task="segmentation")


def applied(config, dataset, examples=4):
    batch = dataset.split("train").read(range(examples))
    augmentation = config.augmentation(dataset, NORMALIZE)
    return batch, jax.device_get(augmentation(jax.random.key(0), batch))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("crop", [None, (40, 48)])
@pytest.mark.slow
def test_each_gives_images_and_masks_of_the_training_size(name, crop, scenes):
    config = DataConfig(dataset="digit_scenes", augment=(name,), crop=crop)
    assert config.training_size(scenes) == (crop or (64, 64))
    _, found = applied(config, scenes, examples=2)
    assert found["image"].shape == (2, *(crop or (64, 64)), 3)
    assert found["mask"].shape == (2, *(crop or (64, 64)))
    assert found["image"].dtype == jnp.float32


def test_a_crop_is_cut_at_random_and_not_resized(scenes):
    batch, found = applied(DataConfig(dataset="digit_scenes", crop=(40, 48)), scenes)
    whole = np.asarray(NORMALIZE(jax.random.key(0), batch)["image"])
    corners = set()
    for image, mask, original, labels in zip(
        found["image"], found["mask"], whole, batch["mask"], strict=True
    ):
        (corner,) = (
            (y, x)
            for y in range(25)
            for x in range(17)
            if np.allclose(original[y : y + 40, x : x + 48], image, atol=1e-5)
        )
        corners.add(corner)
        y, x = corner
        np.testing.assert_array_equal(labels[y : y + 40, x : x + 48], mask)
    assert len(corners) > 1


def test_masks_are_filled_up_with_the_datasets_own_ignored_label(scenes):
    split = scenes.split("train")
    reader = dataclasses.replace(split.reader, ignore_label=77)
    split = dataclasses.replace(split, reader=reader)
    other = dataclasses.replace(scenes, splits={"train": split})
    for name in ("pad_crop", "random_scale_crop"):
        config = DataConfig(dataset="digit_scenes", augment=(name,))
        _, found = applied(config, other, examples=8)
        assert (found["mask"] == 77).any()
        assert not (found["mask"] == 255).any()


def test_what_cutout_leaves_is_the_mean_color(scenes):
    config = DataConfig(dataset="digit_scenes", augment=("cutout", "random_flip"))
    _, found = applied(config, scenes)
    assert (found["image"] == 0).all(-1).mean() > 0.05


@pytest.mark.parametrize("crop", [(65, 64), (64, 65)])
def test_a_crop_larger_than_the_images_is_refused(crop, scenes):
    with pytest.raises(UsageError, match=r"crop of 6.x6. does not fit .* smaller crop"):
        DataConfig(dataset="digit_scenes", crop=crop).training_size(scenes)


@pytest.mark.parametrize(
    ("direction", "expected"), [("AtoB", (0, 255)), ("BtoA", (255, 0))]
)
def test_direction_of_pairs(tmp_path, direction, expected):
    for split in ("train", "test"):
        (tmp_path / "source" / split).mkdir(parents=True)
        pair = np.repeat(np.uint8([[0, 0, 255, 255]]), 2, axis=0)  # A is black
        Image.fromarray(pair).convert("RGB").save(tmp_path / "source" / split / "0.png")
    name, data_dir = "paired_images/x", tmp_path / "data"
    data.prepare(name, source=tmp_path / "source", data_dir=data_dir)
    config = DataConfig(dataset=name, direction=direction, data_dir=data_dir)
    batch = config.load("translation").split("train").read([0])
    assert (batch["input"].max(), batch["target"].max()) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"augment": ("pad_crop", "mirror")},
            r"unknown augmentation 'mirror'; known: pad_crop \(.*\); random_flip \(",
        ),
        ({"image_size": (0, 5)}, r"image_size\.0 must be greater than 0, got 0"),
        ({"image_size": 224}, "image_size must be a valid tuple, got 224"),
        ({"crop": (224,)}, "crop"),
        ({"crop": (224, 1.5)}, r"crop\.1 must be a valid integer.*, got 1\.5"),
        ({"num_workers": -1}, "num_workers must be greater than or equal to 0, got -1"),
        ({"loader": "stream"}, "loader must be 'auto', 'memory' or 'grain', got 'stre"),
        ({"eval_split": "val"}, "eval_split must be 'test' or 'validation', got 'val'"),
        ({"direction": "BtoC"}, "direction must be 'AtoB' or 'BtoA', got 'BtoC'"),
        ({"workers": 3}, "there is no setting 'workers'"),
    ],
)
def test_settings_are_checked_where_the_config_is_made(options, message):
    with pytest.raises(UsageError, match=message):
        DataConfig(**options)
    if "workers" not in options:
        with pytest.raises(UsageError, match=message):
            dataclasses.replace(DataConfig(), **options)


def test_a_config_is_read_from_the_command_line_and_from_json():
    arguments = ("--image-size", "360x480", "--crop", "224", "--num-workers", "0")
    arguments += ("--augment", "random_flip, cutout", "--eval-split", "validation")
    config = tyro.cli(DataConfig, args=(*arguments, "--loader", "grain"))
    assert config == DataConfig(
        image_size=(360, 480),
        crop=(224, 224),
        num_workers=0,
        augment=("random_flip", "cutout"),
        eval_split="validation",
        loader="grain",
    )
    content = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_json(DataConfig, content) == config


@pytest.mark.parametrize("size", ["0", "x5", "224x", "224x0x1", "-3", "large"])
def test_a_size_that_is_none_is_refused(size, capsys):
    if size == "224x":  # as 224
        assert tyro.cli(DataConfig, args=("--crop", size)).crop == (224, 224)
        return
    with pytest.raises(SystemExit):
        tyro.cli(DataConfig, args=("--crop", size))
    assert "write 224, or 360x480" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("name", ["color_jitter", "cutout"])
def test_the_looks_of_pairs_are_not_changed(name):
    config = DataConfig(dataset="digit_scenes", augment=(name,))
    scenes = data.load("digit_scenes", task="translation")
    with pytest.raises(UsageError, match=rf"{name} changes .* leave it out of augment"):
        config.augmentation(scenes, NORMALIZE)


# ------------------------------- Fewer images -----------------------------------------


def fewer(count, **options):
    config = DataConfig(train_examples=count, **options)
    return config.load("classification").split("train")


@pytest.mark.parametrize("loader", ["memory", "grain"])
def test_fewer_images_are_of_all_classes_alike(loader):
    split = fewer(105, loader=loader)
    labels = split.read(range(105))["label"]
    assert sorted(np.bincount(labels)) == [10] * 5 + [11] * 5
    arrays = split.arrays()
    np.testing.assert_array_equal(arrays["label"], labels)
    np.testing.assert_array_equal(arrays["image"], split.read(range(105))["image"])
    # The same ones every time, and part of what is more.
    assert split.rows == fewer(105).rows
    assert set(split.rows) < set(fewer(300).rows)
    assert fewer(1000).rows == tuple(range(1000))


def test_fewer_images_leave_out_those_held_out_for_validation():
    config = DataConfig(train_examples=50, eval_split="validation")
    dataset = config.load("classification")
    assert len(dataset.split("validation")) == 200
    assert max(dataset.split("train").rows) < 800


def test_a_rare_class_gives_all_its_images():
    split = fewer(1000)
    labels = split.arrays()["label"]
    rare = np.flatnonzero(labels == 3)[:2]
    kept = sorted({*rare.tolist(), *np.flatnonzero(labels != 3).tolist()})
    few = dataclasses.replace(split, rows=tuple(kept)).subset(101)
    assert np.bincount(few.arrays()["label"])[3] == 2
    assert np.bincount(few.arrays()["label"]).max() == 11


def test_fewer_pairs_and_masks_are_drawn_without_labels(scenes):
    train = scenes.split("train").subset(30)
    assert len(train) == len(set(train.rows)) == 30
    assert train.rows == tuple(sorted(train.rows))
    assert max(train.rows) > 1000  # not the first ones


@pytest.mark.parametrize(("count", "most"), [(1001, 1000), (801, 800)])
def test_more_images_than_there_are_are_refused(count, most):
    split = "test" if most == 1000 else "validation"
    message = f"train_examples must be at most {most}, the training images of digits"
    with pytest.raises(UsageError, match=message):
        fewer(count, eval_split=split)
