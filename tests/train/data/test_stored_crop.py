"""random_resized_crop cuts from images as they are stored, at full detail."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.train.data.test_augment import boxes_of, positions
from train import data
from train.data import augment
from train.data.config import DataConfig
from train.data.dataset import RandomResizedCrop
from train.data.loaders import GrainLoader, InMemoryLoader
from train.data.samplers import RandomSampler, SequentialSampler
from train.errors import UsageError

CROP = ("random_resized_crop",)
# Boxes of a sixteenth of the area: 100x100 pixels of 400x400.
SMALL = {"scale": (1 / 16, 1 / 16), "ratio": (1.0, 1.0)}


def save(folder, images, split="train"):
    for i, image in enumerate(images):
        path = folder / split / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.ascontiguousarray(image)).save(path)


def prepare(folder, name="image_folder/photos", **options):
    data.prepare(name, source=folder / "source", data_dir=folder / "data", **options)
    return {"dataset": name, "data_dir": folder / "data"}


def checkerboard(height, width):
    rows, columns = np.mgrid[:height, :width]
    return np.repeat(np.uint8(255 * ((rows + columns) % 2))[..., None], 3, axis=-1)


def contrasts(images):
    """The standard deviation of the gray values of each image."""
    return np.asarray(images, np.float32).std(axis=(1, 2, 3))


def batches(loader, sampler, first_step=0, count=3):
    feeds = loader.feeds(sampler, first_step)
    found = [
        jax.device_get(loader.batch(feed, jnp.int32(first_step + i)))
        for i, feed in enumerate(itertools.islice(feeds, count))
    ]
    feeds.close()
    return found


@pytest.fixture(scope="module")
def uniform(tmp_path_factory):
    """Checkerboards of one size."""
    folder = tmp_path_factory.mktemp("uniform")
    for split in ("train", "test"):
        save(folder / "source", [checkerboard(400, 400)] * 8, split)
    return prepare(folder)


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Checkerboards of several sizes."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(400, 400), (300, 500), (420, 380), (500, 260)]
    for split in ("train", "test"):
        save(folder / "source", [checkerboard(*size) for size in sizes * 2], split)
    return prepare(folder)


# Where all images have one size, they are cropped on the device.


@pytest.mark.parametrize("loader", ["memory", "grain"])
def test_images_of_one_size_are_trained_on_at_that_size(uniform, loader):
    config = DataConfig(**uniform, image_size=(100, 100), augment=CROP, loader=loader)
    dataset = config.load("classification")
    train, test = config.open(dataset)
    assert config.training_size(dataset) == (100, 100)
    assert dataset.split("train").stored_size == (400, 400)
    assert dataset.split("train").reader.size == (100, 100)
    for image in batches(train, RandomSampler((0,), 8, 8))[0]["image"]:
        np.testing.assert_array_equal(image, checkerboard(400, 400))
    evaluated = batches(test, SequentialSampler(8, 8))[0]["image"]
    assert evaluated.shape == (8, 100, 100, 3)
    assert contrasts(evaluated).max() < 10


def test_the_device_crops_fine_detail(uniform):
    config = DataConfig(**uniform, image_size=(100, 100), augment=CROP)
    dataset = config.load("classification")
    split = config.training_split(dataset)
    batch = {"image": split.read([0] * 16)["image"]}
    crop = jax.jit(augment.random_resized_crop((100, 100), **SMALL))
    assert contrasts(crop(jax.random.key(0), batch)["image"]).mean() > 20
    # Nothing is left of the detail in an image that was scaled down before.
    scaled = {"image": dataset.split("train").read([0] * 16)["image"]}
    assert contrasts(crop(jax.random.key(0), scaled)["image"]).max() < 10
    normalize = augment.normalize((0.5,) * 3, (0.5,) * 3)
    augmentation = config.augmentation(dataset, normalize)
    augmented = jax.eval_shape(augmentation, jax.random.key(0), batch)
    assert augmented["image"].shape == (16, 100, 100, 3)


def test_a_crop_sets_the_size_of_training_images(uniform):
    config = DataConfig(**uniform, image_size=(100, 100), crop=(80, 64), augment=CROP)
    dataset = config.load("classification")
    assert config.training_size(dataset) == (80, 64)
    assert config.training_split(dataset).reader.size == (400, 400)


def test_without_the_crop_images_are_brought_to_the_size(uniform):
    config = DataConfig(**uniform, image_size=(100, 100), augment=("random_flip",))
    dataset = config.load("classification")
    assert config.training_split(dataset) is dataset.split("train")


# Where they differ in size, they are cropped while they are decoded.


@pytest.mark.parametrize("loader", ["auto", "grain"])
@pytest.mark.parametrize("crop", [None, (80, 64)])
def test_images_of_several_sizes_are_cropped_while_decoding(mixed, loader, crop):
    config = DataConfig(
        **mixed,
        image_size=(100, 100),
        crop=crop,
        augment=CROP,
        loader=loader,
        num_workers=0,
    )
    dataset = config.load("classification")
    assert dataset.split("train").stored_size is None
    train, test = config.open(dataset)
    assert (type(train), type(test)) == (GrainLoader, GrainLoader)
    sampler = RandomSampler((0,), 8, 4)
    found = batches(train, sampler)
    assert found[0]["image"].shape == (4, *(crop or (100, 100)), 3)
    assert train.abstract_feed(sampler)["image"].shape == found[0]["image"].shape
    evaluated = batches(test, SequentialSampler(8, 4))[0]["image"]
    assert evaluated.shape == (4, 100, 100, 3)


def test_memory_is_refused_for_images_of_several_sizes(mixed):
    config = DataConfig(**mixed, image_size=(100, 100), augment=CROP, loader="memory")
    dataset = config.load("classification")
    with pytest.raises(UsageError, match=r'random_resized_crop .*loader to "auto" or'):
        config.open(dataset)
    with pytest.raises(ValueError, match="cannot be cached"):
        config.training_split(dataset).arrays()


def with_small_boxes(config):
    """The training split, but with boxes of a sixteenth of the area."""
    split = config.training_split(config.load("classification"))
    crop = RandomResizedCrop(**SMALL)
    return dataclasses.replace(
        split, reader=dataclasses.replace(split.reader, random_crop=crop)
    )


def test_the_host_crops_fine_detail(mixed):
    config = DataConfig(**mixed, image_size=(100, 100), augment=CROP)
    loader = GrainLoader(with_small_boxes(config), num_workers=0)
    images = np.concatenate(
        [batch["image"] for batch in batches(loader, RandomSampler((0,), 8, 8), 0, 4)]
    )
    assert contrasts(images).mean() > 20


def test_other_augmentations_stay_on_the_device(mixed):
    config = DataConfig(**mixed, image_size=(100, 100), augment=("random_flip", *CROP))
    dataset = config.load("classification")
    normalize = augment.normalize((0.0,) * 3, (1.0,) * 3)
    augmentation = config.augmentation(dataset, normalize)
    image = np.random.default_rng(0).integers(0, 256, (1, 100, 100, 3), np.uint8)
    out = augmentation(jax.random.key(0), {"image": image.repeat(32, axis=0)})
    found = {example.tobytes() for example in np.rint(255 * out["image"])}
    flips = (image, image[:, :, ::-1])
    assert found == {np.float32(flip[0]).tobytes() for flip in flips}


SAMPLER = RandomSampler((3, 4), 8, 4)


@pytest.fixture
def cropped(mixed):
    config = DataConfig(**mixed, image_size=(30, 20), augment=CROP)
    return config.training_split(config.load("classification"))


def test_crops_depend_on_seed_step_and_place_alone(cropped):
    first, again = (
        batches(GrainLoader(cropped, num_workers=0), SAMPLER, 0, 6) for _ in range(2)
    )
    jax.tree.map(np.testing.assert_array_equal, first, again)
    later = batches(GrainLoader(cropped, num_workers=0), SAMPLER, 3, 3)
    jax.tree.map(np.testing.assert_array_equal, first[3:], later)
    crops = {image.tobytes() for batch in first for image in batch["image"]}
    assert len(crops) == 24
    other = dataclasses.replace(SAMPLER, seed=(3, 5))
    others = batches(GrainLoader(cropped, num_workers=0), other, 0, 6)
    assert not crops & {image.tobytes() for batch in others for image in batch["image"]}


@pytest.mark.parametrize("count", [2, 4])
def test_processes_crop_their_parts_of_a_batch_alike(cropped, count):
    whole = batches(GrainLoader(cropped, num_workers=0), SAMPLER, 1, 3)
    shares = [
        batches(
            GrainLoader(cropped, num_workers=0, process_index=i, process_count=count),
            SAMPLER,
            1,
            3,
        )
        for i in range(count)
    ]
    for expected, *parts in zip(whole, *shares, strict=True):
        joined = np.concatenate([part["image"] for part in parts])
        np.testing.assert_array_equal(joined, expected["image"])


@pytest.mark.slow
def test_any_number_of_workers_gives_the_same_crops(cropped):
    expected, *found = (
        batches(GrainLoader(cropped, num_workers=n), SAMPLER, 2, 5) for n in (0, 1, 2)
    )
    for other in found:
        jax.tree.map(np.testing.assert_array_equal, expected, other)


def test_a_random_crop_needs_a_generator(cropped):
    with pytest.raises(ValueError, match="needs a generator"):
        cropped.read([0])


# The boxes themselves.


@pytest.mark.parametrize("shape", [(64, 64), (48, 80), (90, 40)])
def test_boxes_are_distributed_as_on_the_device(shape):
    options = {"scale": (0.1, 0.5), "ratio": (0.8, 1.5)}
    pictures = positions(1024, *shape)
    on_device = augment.random_resized_crop((16, 16), **options)
    out = jax.jit(on_device)(jax.random.key(1), {"input": pictures})["input"]
    device_corners, device_sides = boxes_of(np.asarray(out))
    crop, generator = RandomResizedCrop(**options), np.random.default_rng(0)
    drawn = np.asarray([crop.draw(generator, *shape) for _ in range(4096)])
    corners, ends = drawn[:, [1, 0]], drawn[:, [3, 2]]
    sides = ends - corners
    assert (corners >= 0).all()
    assert (ends <= shape).all()
    levels = np.linspace(0.1, 0.9, 9)

    def quantiles(corners, sides):
        share = sides.prod(1) / (shape[0] * shape[1])
        ratio = np.log(sides[:, 1] / sides[:, 0])
        place = corners / (np.asarray(shape) - sides)
        columns = (share, ratio, place[:, 0], place[:, 1])
        return np.stack([np.quantile(column, levels) for column in columns])

    np.testing.assert_allclose(
        quantiles(corners, sides),
        quantiles(device_corners, device_sides),
        atol=0.06,
    )


def test_the_default_boxes_are_those_of_the_device():
    defaults = augment.random_resized_crop.__kwdefaults__
    crop = RandomResizedCrop()
    assert (crop.scale, crop.ratio) == (defaults["scale"], defaults["ratio"])


@pytest.mark.parametrize("shape", [(1, 1), (1, 50), (333, 2), (7, 11)])
def test_boxes_lie_within_pictures_of_any_shape(shape):
    crop, generator = RandomResizedCrop(), np.random.default_rng(0)
    for scale in ((0.08, 1.0), (1.0, 1.0)):
        crop = RandomResizedCrop(scale=scale)
        for _ in range(500):
            left, top, right, bottom = crop.draw(generator, *shape)
            assert 0 <= top < bottom <= shape[0]
            assert 0 <= left < right <= shape[1]


def test_a_crop_is_the_box_as_pillow_resizes_it():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (37, 53, 3), np.uint8),
        "mask": rng.integers(0, 9, (37, 53), np.uint8),
        "label": np.int32(3),
    }
    kinds = {name: name for name in arrays}
    crop = RandomResizedCrop(scale=(0.2, 0.4))
    found = crop.apply(arrays, kinds, (20, 24), np.random.default_rng(5))
    box = crop.draw(np.random.default_rng(5), 37, 53)
    for name, by in (("image", "BILINEAR"), ("mask", "NEAREST")):
        resampling = Image.Resampling[by]
        image = Image.fromarray(arrays[name])
        expected = np.asarray(image.resize((24, 20), resampling, box))
        np.testing.assert_array_equal(found[name], expected)
    assert found["label"] == 3


def test_image_and_mask_and_both_halves_are_cropped_alike(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        height, width = 60 + 16 * i, 100 - 16 * i
        mask = rng.integers(0, 5, (height // 4, width // 4), np.uint8)
        mask = mask.repeat(4, axis=0).repeat(4, axis=1)
        image = np.repeat(50 * mask[..., None], 3, axis=-1)
        for split in ("train", "test"):
            folder = tmp_path / "source" / split
            for name, array in (("images", image), ("masks", mask)):
                (folder / name).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / name / f"{i}.png")
            pairs = tmp_path / "pairs" / "source" / split
            pairs.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.hstack([image, image])).save(pairs / f"{i}.png")
    place = prepare(tmp_path, "segmentation_folder/x", classes=list("abcde"))
    sampler = RandomSampler((0,), 4, 4)
    config = DataConfig(**place, image_size=(64, 64), augment=CROP)
    split = config.training_split(config.load("segmentation"))
    (batch,) = batches(GrainLoader(split, num_workers=0), sampler, 0, 1)
    assert batch["mask"].shape == (4, 64, 64)
    around = np.lib.stride_tricks.sliding_window_view(batch["mask"], (5, 5), (1, 2))
    constant = around.min((-2, -1)) == around.max((-2, -1))
    assert constant.mean() > 0.1
    inner = batch["image"][:, 2:-2, 2:-2, 0], 50 * batch["mask"][:, 2:-2, 2:-2]
    np.testing.assert_array_equal(inner[0][constant], inner[1][constant])
    place = prepare(tmp_path / "pairs", "paired_images/x")
    config = DataConfig(**place, image_size=(64, 64), augment=CROP)
    split = config.training_split(config.load("translation"))
    (batch,) = batches(GrainLoader(split, num_workers=0), sampler, 0, 1)
    assert batch["input"].shape == (4, 64, 64, 3)
    np.testing.assert_array_equal(batch["input"], batch["target"])


def test_in_memory_data_is_cropped_on_the_device_from_stored_images(uniform):
    config = DataConfig(**uniform, image_size=(100, 100), augment=CROP, loader="memory")
    train, _ = config.open(config.load("classification"))
    assert isinstance(train, InMemoryLoader)
    assert train.data["image"].shape == (8, 400, 400, 3)
