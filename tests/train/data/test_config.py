"""What a run says of its data becomes augmentations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train import data
from train.data import augment
from train.data.config import AUGMENTATIONS, DataConfig
from train.errors import UsageError

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


def test_what_cutout_leaves_is_the_mean_colour(scenes):
    config = DataConfig(dataset="digit_scenes", augment=("cutout", "random_flip"))
    _, found = applied(config, scenes)
    assert (found["image"] == 0).all(-1).mean() > 0.05


@pytest.mark.parametrize("crop", [(65, 64), (64, 65)])
def test_a_crop_larger_than_the_images_is_refused(crop, scenes):
    with pytest.raises(UsageError, match=r"crop of 6.x6. does not fit .* smaller crop"):
        DataConfig(dataset="digit_scenes", crop=crop).training_size(scenes)


def test_direction_of_pairs():
    found = [
        DataConfig(dataset="digit_scenes", direction=direction).direction
        for direction in ("AtoB", "BtoA")
    ]
    assert found == ["AtoB", "BtoA"]
