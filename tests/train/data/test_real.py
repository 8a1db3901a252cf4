"""The four real archives, as their README.md describes them, from file to epoch."""

import gzip
import io
import math
import struct
import sys
import tarfile

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import train.data.__main__ as command_line
from train import data
from train.data.loaders import GrainLoader, InMemoryLoader
from train.data.samplers import RandomSampler

pytestmark = pytest.mark.slow

CIFAR = "image_folder/cifar10"
FASHION = "fashion_mnist_idx"
CAMVID = "camvid"
MAPS = "paired_images/maps"

COUNTS = {
    CIFAR: {"train": 50_000, "test": 10_000},
    FASHION: {"train": 60_000, "test": 10_000},
    CAMVID: {"train": 367, "validation": 101, "test": 233},
    MAPS: {"train": 1096, "validation": 220},
}
SHAPES = {  # of an image, and of the input of a pair
    CIFAR: (32, 32, 3),
    FASHION: (28, 28, 1),
    CAMVID: (360, 480, 3),
    MAPS: (286, 286, 3),
}
CIFAR_CLASSES = (
    *("airplane", "automobile", "bird", "cat", "deer"),
    *("dog", "frog", "horse", "ship", "truck"),
)
# % of pixels by class, void last.
CAMVID_SHARES = (
    *(16.85, 23.26, 0.98, 31.66, 4.49, 9.72),
    *(1.17, 1.13, 5.87, 0.64, 0.29, 3.95),
)
CAMVID_VOID = {"train": 3.95, "validation": 1.70, "test": 3.83}


@pytest.fixture
def opened(real):
    return lambda name: data.open_prepared(name, data_dir=real(name))


@pytest.fixture
def loaded(real):
    return lambda name: data.load(name, data_dir=real(name))


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_sizes_are_those_described(loaded, name):
    dataset = loaded(name)
    assert {name: len(split) for name, split in dataset.splits.items()} == COUNTS[name]
    image = "input" if name == MAPS else "image"
    for split in dataset.splits.values():
        assert split.read([0, len(split) - 1])[image].shape == (2, *SHAPES[name])


def test_cifar10_is_the_one_described(opened):
    cifar = opened(CIFAR)
    assert cifar.class_names == CIFAR_CLASSES
    measured = cifar.statistics()
    assert measured["train"].counts == {"label": [5000] * 10}
    assert measured["test"].counts == {"label": [1000] * 10}
    train = measured["train"]
    assert np.round(train.mean["image"], 4).tolist() == [0.4913, 0.4821, 0.4465]
    assert np.round(train.std["image"], 4).tolist() == [0.2452, 0.2428, 0.2606]


def test_fashion_mnist_is_the_one_described(opened):
    fashion = opened(FASHION)
    assert fashion.class_names[0] == "T-shirt/top"
    assert fashion.class_names[9] == "ankle boot"
    measured = fashion.statistics()
    assert measured["train"].counts == {"label": [6000] * 10}
    assert measured["test"].counts == {"label": [1000] * 10}


def test_camvid_is_the_one_described(opened):
    camvid = opened(CAMVID)
    assert (len(camvid.class_names), camvid.ignore_label) == (11, 11)
    assert camvid.class_names[8] == "car"
    assert camvid.colors[8].tolist() == [64, 0, 128]
    shares = {
        split: 100 * np.divide(of_split.counts["mask"], sum(of_split.counts["mask"]))
        for split, of_split in camvid.statistics().items()
    }
    assert np.round(shares["train"], 2).tolist() == list(CAMVID_SHARES)
    assert {
        split: round(share[11], 2) for split, share in shares.items()
    } == CAMVID_VOID
    for share in shares.values():
        assert len(share) == 12  # label values 0 to 11, all of them, and no other
        assert (share > 0).all()


def members(archive, names):
    """Some members of an archive, as PIL alone decodes them."""
    with tarfile.open(archive) as tar:
        left = set(names)
        for member in tar:
            if member.name in left:
                left.remove(member.name)
                content = io.BytesIO(tar.extractfile(member).read())
                yield member.name, np.asarray(Image.open(content))
            if not left:
                return
    raise AssertionError(f"{archive} lacks {left}")


def places_of(image, images):
    """Where an image is among others, pixel for pixel."""
    return np.flatnonzero((images == image).all(axis=(1, 2, 3)))


def test_cifar10_has_the_pixels_and_the_labels_of_its_files(archives, loaded):
    arrays = loaded(CIFAR).split("test").arrays()
    names = {f"test/{c}/{n}.jpg" for c in CIFAR_CLASSES[::4] for n in ("0000", "0731")}
    for name, image in members(archives / "cifar10.tar.xz", names):
        (place,) = places_of(image, arrays["image"])
        assert CIFAR_CLASSES[arrays["label"][place]] == name.split("/")[1]


def test_fashion_mnist_has_the_pixels_and_the_labels_of_its_files(archives, loaded):
    arrays = loaded(FASHION).split("test").arrays()
    with tarfile.open(archives / "fashion_mnist.tar") as tar:
        images, labels = (
            gzip.decompress(tar.extractfile(f"t10k-{name}-ubyte.gz").read())
            for name in ("images-idx3", "labels-idx1")
        )
    assert struct.unpack(">IIII", images[:16]) == (0x803, 10_000, 28, 28)
    expected = [images[16 + 784 * i :][:784] for i in range(10_000)]
    found = [image.tobytes() for image in arrays["image"]]
    assert sorted(zip(found, arrays["label"].tolist(), strict=True)) == sorted(
        zip(expected, labels[8:], strict=True)
    )


def test_camvid_has_the_pixels_and_the_labels_of_its_files(archives, loaded):
    arrays = loaded(CAMVID).split("validation").arrays()
    files = [f"0016E5_0{n}" for n in (7959, 8027, 8159)]
    names = {f"val/{file}.jpg" for file in files} | {
        f"valannot/{file}.png" for file in files
    }
    pictures = dict(members(archives / "camvid.tar", names))
    for file in files:
        (place,) = places_of(pictures[f"val/{file}.jpg"], arrays["image"])
        np.testing.assert_array_equal(
            arrays["mask"][place], pictures[f"valannot/{file}.png"]
        )


@pytest.mark.parametrize("direction", ["AtoB", "BtoA"])
def test_maps_have_the_pixels_of_their_files(archives, real, direction):
    maps = data.load(MAPS, direction=direction, data_dir=real(MAPS))
    arrays = maps.split("validation").arrays()
    for _, pair in members(archives / "maps.tar", {"val/1.jpg", "val/1096.jpg"}):
        left, right = pair[:, :286], pair[:, 286:]
        (place,) = places_of(left, arrays["input" if direction == "AtoB" else "target"])
        other = arrays["target" if direction == "AtoB" else "input"][place]
        np.testing.assert_array_equal(other, right)


def digests(arrays, count):
    """A number for each example, of all its arrays."""
    rows = zip(*(arrays[key][:count] for key in sorted(arrays)), strict=True)
    return [hash(tuple(array.tobytes() for array in row)) for row in rows]


@pytest.mark.parametrize("kind", ["memory", "grain"])
@pytest.mark.parametrize("name", COUNTS)
def test_an_epoch_has_each_example_once(loaded, name, kind):
    dataset = loaded(name)
    split = dataset.split(list(dataset.splits)[-1]).part(0, 2000)
    arrays = split.arrays()
    if kind == "memory":
        loader = InMemoryLoader(arrays)
    else:
        loader = GrainLoader(split, num_workers=0)
    sampler = RandomSampler(seed=(3,), num_examples=len(split), batch_size=20)
    feeds = loader.feeds(sampler)
    batch_of = jax.jit(loader.batch)
    found = []
    for step in range(math.ceil(len(split) / 20)):
        batch = jax.device_get(batch_of(next(feeds), np.int32(step)))
        found += digests(batch, 20)
    feeds.close()
    found = found[: len(split)]  # the last batch may begin the next epoch
    expected = digests(arrays, len(split))
    assert found != expected
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("name", COUNTS)
def test_the_commands_tell_and_draw(real, name, tmp_path, monkeypatch, capsys):
    data_dir = real(name)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.data", *arguments])
        command_line.main()
        return " ".join(capsys.readouterr().out.split())

    monkeypatch.setattr(command_line, "console", Console(width=200))
    told = run("info", name, "--data-dir", str(data_dir))
    height, width, _ = SHAPES[name]
    for split, count in COUNTS[name].items():
        assert f"{split} {count:,} {width} x {height} (" in told
    if name == CIFAR:
        assert "3 cat 10.00 10.00" in told
        assert "(0.4913, 0.4821, 0.4465) / (0.2452, 0.2428, 0.2606)" in told
    if name == CAMVID:
        assert "11 (ignored) 3.95 1.70 3.83" in told
    path = tmp_path / "drawn.png"
    run("show", name, "--output", str(path), "--data-dir", str(data_dir))
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(np.unique(np.asarray(image.convert("L")))) > 50
