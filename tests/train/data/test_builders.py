"""Every builder, from small copies of its layout, sound and spoiled."""

import gzip
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

import train.data.__main__ as command_line
from train import data
from train.data.preparation import scenes
from train.data.preparation.archives import SourceError
from train.data.preparation.builder import BadFilesError
from train.data.preparation.builders import digit_scenes, digits
from train.errors import UsageError

# Small copies of each layout. An image's color tells its label and its number, so
# that tests see whether labels went with their images.


def paint(path, label, number, size=(12, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    color = (20 * label + 10, 6 * number + 3, 99)
    options = {"lossless": True} if path.suffix == ".webp" else {"quality": 95}
    Image.new("RGB", size, color).save(path, **options)


def paint_mask(path, label, ignored, size=(12, 8)):
    """A palette image: one label, but for a corner to be ignored."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.full(size[::-1], label, np.uint8)
    values[0, 0] = ignored
    image = Image.fromarray(values).convert("P")
    image.save(path)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def write_image_folder(root):
    suffixes = (".jpg", ".PNG", ".webp", ".JPEG")
    write(root / "readme.txt", "not an image, and in no class folder")
    for folder, count in (("train", 4), ("val", 2), ("test", 2)):
        for label, name in enumerate(("ant", "bee", "cat 2")):
            for number in range(count):
                file = f"{number}{suffixes[number]}"
                paint(root / folder / name / file, label, number)
    return {
        "train": [(label, label, n) for label in range(3) for n in range(4)],
        "validation": [(label, label, n) for label in range(3) for n in range(2)],
        "test": [(label, label, n) for label in range(3) for n in range(2)],
    }


def write_tiny_imagenet(root):
    names = ("n03", "n01", "n02")  # sorted, they are 1, 2 and 0
    write(root / "wnids.txt", *names)
    write(root / "words.txt", "n01\tgoldfish")
    for name, label in zip(names, (2, 0, 1), strict=True):
        for number in range(3):
            file = root / "train" / name / "images" / f"{name}_{number}.JPEG"
            paint(file, label, number, (64, 64))
        write(root / "train" / name / f"{name}_boxes.txt", f"{name}_0.JPEG\t0\t0\t9\t9")
    lines = []
    for number, (name, label) in enumerate((("n02", 1), ("n03", 2))):
        paint(root / "val" / "images" / f"val_{number}.JPEG", label, number, (64, 64))
        lines.append(f"val_{number}.JPEG\t{name}\t0\t0\t62\t62")
    write(root / "val" / "val_annotations.txt", *lines)
    paint(root / "test" / "images" / "test_0.JPEG", 5, 5, (64, 64))
    return {
        "train": [(label, label, n) for label in range(3) for n in range(3)],
        "validation": [(1, 1, 0), (2, 2, 1)],
    }


def write_mini_imagenet(root):
    expected = {"train": [], "validation": [], "test": []}
    number = 0
    for split, stem in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = ["filename,label"]
        for label, name in enumerate(("n1", "n2", "n3")):
            for _ in range(2):
                file = f"{name}{number:08}.jpg"
                paint(root / "images" / file, label, number)
                lines.append(f"{file},{name}")
                expected[split].append((label, label, number))
                number += 1
        write(root / f"{stem}.csv", *lines)
    return expected


def write_fgvc_aircraft(root):
    folder = root / "data"
    variants = ("707-320", "DC-10", "A 380")  # in the order of the file
    write(folder / "variants.txt", *variants)
    expected = {"train": [], "validation": [], "test": []}
    number = 0
    for split, stem in (("train", "train"), ("validation", "val"), ("test", "test")):
        lines = []
        for label, name in enumerate(variants):
            for _ in range(2):
                paint(folder / "images" / f"{number:07}.jpg", label, number)
                lines.append(f"{number:07} {name}")
                expected[split].append((label, label, number))
                number += 1
        write(folder / f"images_variant_{stem}.txt", *lines)
    return expected


def write_fashion_mnist_idx(root):
    root.mkdir(parents=True, exist_ok=True)
    expected = {}
    for split, stem, count in (("train", "train", 40), ("test", "t10k", 20)):
        labels = np.arange(count, dtype=np.uint8) % 10
        numbers = np.arange(count, dtype=np.uint8) % 20
        images = np.repeat(20 * labels + numbers, 28 * 28)
        header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
        with gzip.open(root / f"{stem}-images-idx3-ubyte.gz", "wb") as file:
            file.write(header + images.tobytes())
        header = struct.pack(">HBBI", 0, 8, 1, count)
        with gzip.open(root / f"{stem}-labels-idx1-ubyte.gz", "wb") as file:
            file.write(header + labels.tobytes())
        expected[split] = [
            (int(label), int(label), int(number))
            for label, number in zip(labels, numbers, strict=True)
        ]
    return expected


def write_camvid(root):
    for folder, count in (("train", 6), ("val", 2), ("test", 3)):
        for number in range(count):
            file = f"{number:04}_L"
            paint(root / folder / f"{file}.jpg", number, number)
            paint_mask(root / f"{folder}annot" / f"{file}.png", number, 11)
    counts = {"train": 6, "validation": 2, "test": 3}
    return {split: [(n, n, n) for n in range(count)] for split, count in counts.items()}


def write_voc(root):
    folder = root / "VOC2012"
    for stem, numbers in (("train", range(5)), ("val", range(5, 8)), ("test", (9,))):
        names = [f"2007_{number:06}" for number in numbers]
        write(folder / "ImageSets" / "Segmentation" / f"{stem}.txt", *names)
        for number, name in zip(numbers, names, strict=True):
            paint(folder / "JPEGImages" / f"{name}.jpg", number, number)
            if stem != "test":
                paint_mask(folder / "SegmentationClass" / f"{name}.png", number, 255)
            write(folder / "Annotations" / f"{name}.xml", "<annotation/>")
    return {
        "train": [(n, n, n) for n in range(5)],
        "validation": [(n, n, n) for n in range(5, 8)],
    }


def write_segmentation_folder(root):
    for folder, count in (("train", 6), ("test", 3)):
        for number in range(count):
            label = number % 3
            paint(root / folder / "images" / f"{number}.v1.jpg", label, number)
            mask = root / folder / "masks" / f"{number}.v1.png"
            paint_mask(mask, label, 255)
    counts = {"train": 6, "test": 3}
    return {
        split: [(n % 3, n % 3, n) for n in range(count)]
        for split, count in counts.items()
    }


def write_paired_images(root):
    for folder, count in (("train", 6), ("val", 3)):
        for number in range(count):
            paint(root / folder / f"{number}.jpg", 1, number, (16, 8))
            path = root / folder / f"{number}.jpg"
            pair = Image.open(path)
            pair.paste((50, 6 * number + 3, 99), (8, 0, 16, 8))  # of label 2
            pair.save(path, quality=100, subsampling=0)
    counts = {"train": 6, "validation": 3}
    return {split: [(2, 1, n) for n in range(count)] for split, count in counts.items()}


class Layout(NamedTuple):
    """A builder's layout: the dataset's name, how to write it, and what it gives."""

    name: str
    write: Callable[[Path], Mapping[str, list[tuple[int, int, int]]]]
    class_names: tuple[str, ...] | int
    wrap: str = ""
    options: Mapping[str, Any] = MappingProxyType({})


LAYOUTS = {
    layout.name.split("/")[0]: layout
    for layout in (
        Layout("image_folder/insects", write_image_folder, ("ant", "bee", "cat 2")),
        Layout(
            "tiny_imagenet",
            write_tiny_imagenet,
            ("goldfish", "n02", "n03"),
            "tiny-imagenet-200",
        ),
        Layout("mini_imagenet", write_mini_imagenet, ("n1", "n2", "n3")),
        Layout(
            "fgvc_aircraft",
            write_fgvc_aircraft,
            ("707-320", "DC-10", "A 380"),
            "fgvc-aircraft-2013b",
        ),
        Layout("fashion_mnist_idx", write_fashion_mnist_idx, 10),
        Layout("camvid", write_camvid, 11, "CamVid"),
        Layout("voc2012_segmentation", write_voc, 21, "VOCdevkit"),
        Layout(
            "segmentation_folder/streets",
            write_segmentation_folder,
            ("road", "car", "sky"),
            options={"classes": ["road", "car", "sky"]},
        ),
        Layout("paired_images/maps", write_paired_images, (), "maps"),
    )
}


def test_every_builder_with_a_source_has_a_layout():
    with_source = {n for n, builder in data.BUILDERS.items() if builder.NEEDS_SOURCE}
    assert set(LAYOUTS) == with_source


@pytest.fixture
def prepare(tmp_path):
    """Prepares a layout in its own folder, and returns the builder."""

    def prepare(name, source, where="prepared", **options):
        layout = LAYOUTS[name]
        options = {**layout.options, **options}
        place = tmp_path / where
        return data.prepare(layout.name, source=source, data_dir=place, **options)

    return prepare


def seen(dataset, split):
    """Label, label by color, and number of each example."""
    part = dataset.split(split)
    arrays = part.read(range(len(part)))
    if dataset.task == "classification":
        images, labels = arrays["image"], arrays["label"]
    elif dataset.task == "segmentation":
        images, labels = arrays["image"], arrays["mask"][:, -1, -1]
        assert (arrays["mask"][:, 0, 0] == dataset.ignore_label).all()
    else:
        images, labels = arrays["input"], arrays["target"][:, 4, 4, 0] // 20
    red, green = images[:, 4, 3, 0], images[:, 4, 3, -2:][:, 0]
    if images.shape[-1] == 1:
        colors = np.stack([red // 20, red % 20], axis=1)
    else:
        colors = np.stack([red // 20, green // 6], axis=1)
    return [(int(a), *map(int, b)) for a, b in zip(labels, colors, strict=True)]


def records(path, name):
    """All that is stored, in its order."""
    sources = data.open_prepared(name, data_dir=path).sources
    return {
        split: [dict(source[i]) for i in range(len(source))]
        for split, source in sources.items()
    }


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_read_alike_from_folder_tar_and_zip(name, tmp_path, prepare):
    layout = LAYOUTS[name]
    top = tmp_path / "source"
    expected = layout.write(top / layout.wrap)
    write(top / layout.wrap / ".hidden" / "cat.jpg", "no part of it")
    builder = prepare(name, top)
    assert builder.skipped == []
    dataset = data.load(layout.name, data_dir=tmp_path / "prepared")
    assert {s: sorted(seen(dataset, s)) for s in dataset.splits} == {
        split: sorted(examples) for split, examples in expected.items()
    }
    if isinstance(layout.class_names, int):
        assert dataset.num_classes == layout.class_names
    else:
        assert dataset.class_names == layout.class_names

    stored = records(tmp_path / "prepared", layout.name)
    sources = {
        "tar": shutil.make_archive(str(tmp_path / "a"), "gztar", top),
        "zip": shutil.make_archive(str(tmp_path / "b"), "zip", top / layout.wrap),
        "wrapped": shutil.make_archive(
            str(tmp_path / "c"), "tar", tmp_path, top.relative_to(tmp_path)
        ),
    }
    for kind, source in sources.items():
        prepare(name, Path(source), kind)
        assert records(tmp_path / kind, layout.name) == stored


@pytest.mark.parametrize("name", LAYOUTS)
def test_tfds_finds_the_builder(name, tmp_path, prepare):
    layout = LAYOUTS[name]
    expected = layout.write(tmp_path / "source")
    prepare(name, tmp_path / "source")
    builder = tfds.builder(layout.name, data_dir=tmp_path / "prepared")
    assert builder.name == name
    counts = {split: info.num_examples for split, info in builder.info.splits.items()}
    assert counts == {split: len(examples) for split, examples in expected.items()}
    assert len(builder.as_data_source("train")) == counts["train"]
    assert builder.info.description
    if "label" in builder.info.features and isinstance(layout.class_names, tuple):
        assert builder.info.features["label"].names == list(layout.class_names)


@pytest.mark.parametrize("name", data.BUILDERS)
def test_tfds_knows_the_builder_before(name, tmp_path):
    config = "/flowers" * data.BUILDERS[name].NEEDS_NAME
    builder = tfds.builder(f"{name}{config}", data_dir=tmp_path)
    assert type(builder) is data.BUILDERS[name]
    assert name in tfds.list_builders(with_community_datasets=False)


def test_only_array_record_is_written(tmp_path):
    with pytest.raises(UsageError, match="must be array_record, got 'tfrecord'"):
        tfds.builder("camvid", data_dir=tmp_path, file_format="tfrecord")


def test_a_builder_needs_its_source_only_to_prepare(tmp_path):
    with pytest.raises(UsageError, match=r"camvid is prepared .* give its source"):
        tfds.builder("camvid", data_dir=tmp_path).download_and_prepare()
    assert data.prepared(tmp_path) == []


def test_tensorflow_is_not_imported(tmp_path):
    write_image_folder(tmp_path / "source")
    code = f"""
import sys
from pathlib import Path
from train import data
folder = Path({str(tmp_path)!r})
data.prepare("image_folder/x", source=folder / "source", data_dir=folder / "prepared")
split = data.load("image_folder/x", data_dir=folder / "prepared").split("train")
split.read([0]), split.arrays()
print(sorted(set(sys.modules) & {{"tensorflow", "torch", "cv2"}}))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_preparing_twice_changes_nothing(tmp_path, prepare):
    write_image_folder(tmp_path / "source")
    prepare("image_folder", tmp_path / "source")

    def times():
        paths = (tmp_path / "prepared").rglob("*")
        return {path: path.stat().st_mtime_ns for path in paths}

    before = times()
    shutil.rmtree(tmp_path / "source")
    prepare("image_folder", tmp_path / "source")
    assert times() == before


def test_places_and_names_keep_datasets_apart(tmp_path):
    write_image_folder(tmp_path / "source")
    shutil.copytree(tmp_path / "source", tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "val")
    for place, name, source in (
        ("a", "image_folder/x", "source"),
        ("a", "image_folder/y.2-b", "other"),
        ("b", "image_folder/x", "other"),
    ):
        data.prepare(name, source=tmp_path / source, data_dir=tmp_path / place)
    assert data.prepared(tmp_path / "a") == ["image_folder/x", "image_folder/y.2-b"]
    splits = {
        (place, name): set(data.load(name, data_dir=tmp_path / place).splits)
        for place in "ab"
        for name in data.prepared(tmp_path / place)
    }
    assert splits == {
        ("a", "image_folder/x"): {"train", "validation", "test"},
        ("a", "image_folder/y.2-b"): {"train", "test"},
        ("b", "image_folder/x"): {"train", "test"},
    }


def test_examples_are_stored_in_shuffled_order(tmp_path, prepare):
    for label, name in enumerate(("ant", "bee", "cat")):
        for number in range(20):
            paint(tmp_path / "source" / "train" / name / f"{number}.png", label, number)
    prepare("image_folder", tmp_path / "source")
    dataset = data.load("image_folder/insects", data_dir=tmp_path / "prepared")
    examples = seen(dataset, "train")
    labels = [label for label, _, _ in examples]
    changes = np.count_nonzero(np.diff(labels))
    assert 30 < changes < 50  # about two thirds of 59
    numbers = [number for label, _, number in examples if label == 1]
    assert numbers != sorted(numbers)


UNSPLIT = (20, 30, 5)  # images of each class


def write_unsplit(root):
    for label, count in enumerate(UNSPLIT):
        for number in range(count):
            paint(root / "abc"[label] / f"{number:02}.png", label, number)


@pytest.mark.parametrize(
    ("fraction", "counts"), [(0.2, [4, 6, 1]), (0.4, [8, 12, 2]), (0.6, [12, 18, 3])]
)
def test_a_share_of_every_class_is_set_apart(tmp_path, prepare, fraction, counts):
    write_unsplit(tmp_path / "source" / "deep" / "flowers")
    prepare("image_folder", tmp_path / "source", test_fraction=fraction)
    dataset = data.load("image_folder/insects", data_dir=tmp_path / "prepared")
    assert set(dataset.splits) == {"train", "test"}
    train, test = set(seen(dataset, "train")), set(seen(dataset, "test"))
    assert not train & test
    assert train | test == {
        (label, label, n) for label, count in enumerate(UNSPLIT) for n in range(count)
    }
    assert np.bincount([label for label, _, _ in test]).tolist() == counts
    for label in range(3):  # at random, not the first
        numbers = sorted(n for found, _, n in test if found == label)
        assert numbers != list(range(len(numbers)))


def test_the_share_set_apart_does_not_depend_on_the_source(tmp_path, prepare):
    write_unsplit(tmp_path / "source" / "flowers")
    sources = {
        "folder": tmp_path / "source" / "flowers",
        "above": tmp_path / "source",
        "zip": shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "source"),
    }
    stored = []
    for where, source in sources.items():
        prepare("image_folder", Path(source), where, test_fraction=0.3)
        stored.append(records(tmp_path / where, "image_folder/insects"))
    assert stored[0] == stored[1] == stored[2]


def test_a_share_of_masks_or_pairs_is_set_apart(tmp_path, prepare):
    write_segmentation_folder(tmp_path / "source")
    masks = tmp_path / "source" / "train"  # has images/ and masks/
    prepare("segmentation_folder", masks, test_fraction=0.5)
    write_paired_images(tmp_path / "pairs")
    prepare("paired_images", tmp_path / "pairs" / "train", test_fraction=1 / 3)
    for name, train, test in (
        ("segmentation_folder/streets", 3, 3),
        ("paired_images/maps", 4, 2),
    ):
        dataset = data.load(name, data_dir=tmp_path / "prepared")
        found = {split: set(seen(dataset, split)) for split in ("train", "test")}
        assert (len(found["train"]), len(found["test"])) == (train, test)
        assert len(found["train"] | found["test"]) == 6


@pytest.mark.parametrize(
    ("name", "write_files", "folder"),
    [
        ("image_folder", write_unsplit, ""),
        ("segmentation_folder", write_segmentation_folder, "train"),
        ("paired_images", write_paired_images, "train"),
    ],
)
def test_a_missing_share_is_asked_for(tmp_path, prepare, name, write_files, folder):
    write_files(tmp_path / "source")
    with pytest.raises(SourceError, match=r"no folders of splits .*test_fraction"):
        prepare(name, tmp_path / "source" / folder)
    assert data.prepared(tmp_path / "prepared") == []


def test_only_masks_and_images_of_declared_labels_are_taken(tmp_path, prepare):
    write_segmentation_folder(tmp_path / "source")
    with pytest.raises(
        UsageError, match="classes in order, such as background,road,car"
    ):
        prepare("segmentation_folder", tmp_path / "source", classes=None)
    with pytest.raises(BadFilesError) as error:
        prepare("segmentation_folder", tmp_path / "source", classes=["a", "b"])
    assert len(error.value.errors) == 3
    assert "train/masks/2.v1.png: label values 2; expected only 0-1, 255" in str(
        error.value
    )
    prepare("segmentation_folder", tmp_path / "source", classes=list("abcd"))
    dataset = data.load("segmentation_folder/streets", data_dir=tmp_path / "prepared")
    assert (dataset.class_names, dataset.ignore_label) == (tuple("abcd"), 255)


def test_the_ignored_label_may_be_another(tmp_path, prepare):
    write_segmentation_folder(tmp_path / "source")
    for path in (tmp_path / "source").rglob("*.png"):
        paint_mask(path, int(path.name[0]) % 2, 9)
    prepare("segmentation_folder", tmp_path / "source", ignore_label=9)
    dataset = data.load("segmentation_folder/streets", data_dir=tmp_path / "prepared")
    assert dataset.ignore_label == 9
    assert {label for label, _, _ in seen(dataset, "train")} == {0, 1}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("image_folder", {"test_fraction": 0.0}, "between 0 and 1, got 0.0"),
        ("image_folder", {"test_fraction": 1.0}, "between 0 and 1, got 1.0"),
        ("paired_images", {"test_fraction": -1.0}, "between 0 and 1, got -1.0"),
        (
            "segmentation_folder",
            {"ignore_label": 2},
            "from 3, the number of classes, .*got 2",
        ),
        ("segmentation_folder", {"ignore_label": 256}, "to 255, got 256"),
        ("segmentation_folder", {"classes": ["a", "b", "a"]}, "got a, b, a"),
        ("segmentation_folder", {"classes": ["a", ""]}, "different names"),
        (
            "image_folder",
            {"classes": ["a"]},
            "insects does not take classes",
        ),
        ("camvid", {"test_fraction": 0.5}, "camvid does not take test_fraction"),
    ],
)
def test_options_that_cannot_be_meant(tmp_path, prepare, name, options, message):
    LAYOUTS[name].write(tmp_path / "source")
    with pytest.raises(UsageError, match=message):
        prepare(name, tmp_path / "source", **options)
    assert data.prepared(tmp_path / "prepared") == []


def test_scenes_of_train_and_test_share_no_digit(monkeypatch):
    given = []

    def compose(images, labels, *, seed, index, size):
        given.append({image.tobytes() for image in images})
        return scenes.Scene(*(np.zeros((size, size), np.uint8),) * 3)

    monkeypatch.setattr(digit_scenes.scenes, "compose", compose)
    items = tfds.builder("digit_scenes")._list(None)
    items["train"][0].make(), items["test"][0].make()
    assert not given[0] & given[1]
    assert [len(part) for part in given] == [
        len(np.unique(images, axis=0)) for images, _ in digits.split_digits().values()
    ]


# What can be wrong with the files.


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def remove(path):
    path.unlink()


def text(path):
    write(path, "not an image")


def other_size(path):
    paint_mask(path, 1, 11, (6, 4))


def out_of_range(path):
    paint_mask(path, 30, 11)


def odd_pair(path):
    paint(path, 1, 1, (15, 8))


def picture(path):
    paint(path, 1, 1)


def folder(path):
    path.mkdir()


def empty(path):
    path.write_bytes(b"")


def no_images(path):
    shutil.rmtree(path)
    path.mkdir()


BAD = [
    # dataset, how it is spoiled, where, the file named, what is said of it, left over
    ("image_folder", cut, "train/ant/0.jpg", "", "damaged .*expected JPEG, PNG", 11),
    ("image_folder", text, "train/ant/1.PNG", "", "not an image .*expected JPEG", 11),
    ("image_folder", empty, "train/ant/1.PNG", "", "not an image .*expected JPEG", 11),
    ("image_folder", text, "train/ant/notes.txt", "", "expected an image, .jpg", 12),
    ("image_folder", picture, "train/1.jpg", "", "expected train/CLASS/", 12),
    ("image_folder", folder, "train/dog", "train/dog/", "expected images", 12),
    ("image_folder", picture, "test/yak/1.jpg", "test/yak/", "that train/ lacks", 12),
    ("camvid", remove, "trainannot/0001_L.png", "train/0001_L.jpg", "no mask", 5),
    ("camvid", remove, "train/0001_L.jpg", "trainannot/0001_L.png", "no image", 5),
    ("camvid", other_size, "trainannot/0001_L.png", "", "6x4 .*expected 12x8", 5),
    ("camvid", out_of_range, "trainannot/0001_L.png", "", "30; expected only 0-11", 5),
    ("camvid", picture, "trainannot/0001_L.png", "", "expected one channel", 5),
    ("camvid", cut, "trainannot/0001_L.png", "", "expected PNG", 5),
    ("camvid", cut, "train/0001_L.jpg", "", "expected JPEG", 5),
    ("segmentation_folder", remove, "train/masks/1.v1.png", "train/images/1.v1.jpg",
     r"no mask; expected train/masks/1\.v1\.\*", 5),
    ("segmentation_folder", remove, "train/images/1.v1.jpg", "train/masks/1.v1.png",
     r"no image; expected train/images/1\.v1\.\*", 5),
    ("segmentation_folder", other_size, "train/masks/1.v1.png", "", "expected 12x8", 5),
    ("segmentation_folder", out_of_range, "train/masks/1.v1.png", "",
     "11, 30; expected only 0-2, 255", 5),
    ("paired_images", odd_pair, "train/3.jpg", "", "15 .*two halves of equal width", 5),
    ("paired_images", cut, "train/3.jpg", "", "expected JPEG", 5),
    ("tiny_imagenet", no_images, "train/n03/images", "train/",
     r"1 of the 3 classes of wnids.txt \(n03\)", 6),
    ("tiny_imagenet", cut, "train/n01/images/n01_1.JPEG", "", "expected JPEG", 8),
    ("tiny_imagenet", remove, "val/images/val_1.JPEG", "", "listed, but not there", 9),
    ("mini_imagenet", remove, "images/n100000000.jpg", "n100000000.jpg",
     "listed, but not there", 5),
    ("mini_imagenet", picture, "more/n100000000.jpg", "n100000000.jpg",
     "there are images/n100000000.jpg and more/n", 5),
    ("mini_imagenet", cut, "images/n100000000.jpg", "", "expected JPEG", 5),
    ("fgvc_aircraft", remove, "data/images/0000000.jpg", "", "listed, but not", 5),
    ("fgvc_aircraft", text, "data/images/0000000.jpg", "", "not an image", 5),
    ("voc2012_segmentation", remove, "VOC2012/SegmentationClass/2007_000001.png", "",
     "listed, but not there", 4),
    ("voc2012_segmentation", remove, "VOC2012/JPEGImages/2007_000001.jpg", "",
     "listed, but not there", 4),
    ("voc2012_segmentation", out_of_range, "VOC2012/SegmentationClass/2007_000001.png",
     "", "30; expected only 0-20, 255", 4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "spoil", "place", "file", "message", "left"),
    BAD,
    ids=[f"{row[0]}-{row[1].__name__}-{row[2]}" for row in BAD],
)
def test_bad_files_are_named_or_left_out(
    tmp_path, prepare, name, spoil, place, file, message, left
):
    layout = LAYOUTS[name]
    expected = layout.write(tmp_path / "source")
    spoil(tmp_path / "source" / place)
    file = file or place
    with pytest.raises(BadFilesError) as error:
        prepare(name, tmp_path / "source")
    said = str(error.value)
    assert said.startswith(f"{tmp_path / 'source'} has 1 bad file: {file}: ")
    assert re.search(message, said)
    assert said.endswith("to leave them out; see docs/data.md#bad-files")
    assert data.prepared(tmp_path / "prepared") == []
    left_over = {p.name for p in (tmp_path / "prepared").rglob("*") if p.is_file()}
    assert left_over == {".1.0.0.lock"}

    builder = prepare(name, tmp_path / "source", skip_bad=True)
    assert [error.file for error in builder.skipped] == [file]
    dataset = data.load(layout.name, data_dir=tmp_path / "prepared")
    found = seen(dataset, "train")
    assert len(found) == len(set(found)) == left
    assert set(found) <= set(expected["train"])


def test_good_files_are_kept_exactly(tmp_path, prepare):
    expected = write_image_folder(tmp_path / "source")
    for file in ("train/ant/0.jpg", "train/bee/1.PNG", "test/cat 2/0.jpg"):
        cut(tmp_path / "source" / file)
    prepare("image_folder", tmp_path / "source", skip_bad=True)
    dataset = data.load("image_folder/insects", data_dir=tmp_path / "prepared")
    gone = {"train": {(0, 0, 0), (1, 1, 1)}, "test": {(2, 2, 0)}, "validation": set()}
    for split, examples in expected.items():
        assert set(seen(dataset, split)) == set(examples) - gone[split]


def test_all_bad_files_are_counted_and_the_first_shown(tmp_path, prepare):
    for i in range(30):
        paint(tmp_path / "source" / "train" / "a" / f"{i:02}.png", 0, i)
        paint(tmp_path / "source" / "test" / "a" / f"{i:02}.png", 0, i)
    for i in range(25):
        text(tmp_path / "source" / "train" / "a" / f"{i:02}.png")
    with pytest.raises(BadFilesError) as error:
        prepare("image_folder", tmp_path / "source")
    assert len(error.value.errors) == 25
    lines = str(error.value).splitlines()
    assert lines[0].endswith("source has 25 bad files: ")
    for i in range(20):
        assert lines[1 + i].startswith(f"  train/a/{i:02}.png: not an image")
    assert lines[21] == "  and 5 more"
    assert data.prepared(tmp_path / "prepared") == []


def test_a_split_of_bad_files_only_is_refused(tmp_path, prepare):
    write_image_folder(tmp_path / "source")
    for path in (tmp_path / "source" / "val").rglob("*.*"):
        text(path)
    with pytest.raises(UsageError) as error:
        prepare("image_folder", tmp_path / "source", skip_bad=True)
    message = f"no example in validation of {tmp_path / 'source'}: 6 bad files: "
    assert str(error.value).startswith(message)
    assert "val/bee/1.PNG: not an image" in str(error.value)
    assert data.prepared(tmp_path / "prepared") == []


def test_bad_files_come_in_the_same_order_always(tmp_path):
    """Whatever the seed of Python's hashes."""
    write_camvid(tmp_path / "source")
    shutil.rmtree(tmp_path / "source" / "trainannot")
    (tmp_path / "source" / "trainannot").mkdir()
    for i in range(3):
        paint_mask(tmp_path / "source" / "testannot" / f"x{i}.png", 1, 11)
    with pytest.raises(BadFilesError) as error:
        data.prepare("camvid", source=tmp_path / "source", data_dir=tmp_path / "p")
    names = [error.file for error in error.value.errors]
    assert len(names) == 9
    assert names == sorted(names)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_wrong_folder_is_refused(tmp_path, prepare, name):
    write(tmp_path / "source" / "notes" / "about.txt", "no images here")
    with pytest.raises(UsageError) as error:
        prepare(name, tmp_path / "source")
    if name in ("image_folder", "paired_images"):
        assert "declare the share" in str(error.value)
        with pytest.raises(UsageError, match=r"no example in train|bad file"):
            prepare(name, tmp_path / "source", test_fraction=0.5)
    else:
        assert f"{tmp_path / 'source'} is not the expected folder" in str(error.value)
        assert re.search(r"it holds no \S+, but notes", str(error.value))
    assert data.prepared(tmp_path / "prepared") == []


@pytest.mark.parametrize("name", LAYOUTS)
def test_an_empty_folder_is_refused(tmp_path, prepare, name):
    (tmp_path / "source").mkdir()
    with pytest.raises(UsageError, match=r"but nothing|declare the share"):
        prepare(name, tmp_path / "source")
    with pytest.raises(SourceError, match="there is no folder or archive"):
        prepare(name, tmp_path / "nothing")


def replace(file, old, new):
    def spoil(root):
        path = root / file
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        assert old in content
        content = content.replace(old, new, 1)
        path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)

    return spoil


def without(*files):
    def spoil(root):
        for file in files:
            (root / file).unlink()

    return spoil


def cut_off(file):
    return lambda root: cut(root / file)


IMAGES, LABELS = "train-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        (
            "tiny_imagenet",
            replace("val/val_annotations.txt", b"n02", b"n09"),
            r"val_annotations.txt says 'val_0.JPEG\\tn09.*a class of wnids.txt",
        ),
        (
            "tiny_imagenet",
            replace("val/val_annotations.txt", b"\tn02", b" n02"),
            "expected a file, a tab and a class",
        ),
        (
            "tiny_imagenet",
            without("val/val_annotations.txt"),
            "val/val_annotations.txt: listed, but not there",
        ),
        (
            "mini_imagenet",
            replace("val.csv", b"filename,label", b"file;class"),
            r"val.csv has the columns \['file;class'\]; expected filename and label",
        ),
        (
            "mini_imagenet",
            replace("val.csv", b"n3\n", b"\xff\n"),
            "val.csv is not UTF-8: .*can't decode",
        ),
        (
            "fgvc_aircraft",
            replace("data/images_variant_val.txt", b"DC-10", b"DC-11"),
            "images_variant_val.txt says '0.* DC-11'; expected a number and a variant",
        ),
        (
            "fgvc_aircraft",
            without("data/images_variant_test.txt"),
            "images_variant_test.txt: listed, but not there",
        ),
        (
            "voc2012_segmentation",
            without("VOC2012/ImageSets/Segmentation/train.txt"),
            "holds no ImageSets/Segmentation/train.txt, but VOC2012",
        ),
        ("fashion_mnist_idx", without(LABELS), "holds no t10k-labels-idx1-ubyte, but"),
        (
            "fashion_mnist_idx",
            cut_off(IMAGES),
            "is not an IDX file of Nx28x28",
        ),
        (
            "fashion_mnist_idx",
            lambda root: (root / IMAGES).write_bytes(b"text"),
            "is not an IDX file of Nx28x28 unsigned bytes: Not a gzipped file",
        ),
        (
            "fashion_mnist_idx",
            lambda root: (root / IMAGES).write_bytes((root / LABELS).read_bytes()),
            "is not an IDX file of Nx28x28 unsigned bytes: it has another header",
        ),
        (
            "fashion_mnist_idx",
            replace(IMAGES, struct.pack(">I", 40), struct.pack(">I", 41)),
            "it does not hold the 32,144 bytes its header says",
        ),
        (
            "fashion_mnist_idx",
            replace(IMAGES, struct.pack(">I", 40), struct.pack(">I", 39)),
            "it does not hold the 30,576 bytes its header says",
        ),
        (
            "fashion_mnist_idx",
            replace(IMAGES, struct.pack(">I", 40), struct.pack(">I", 2**32 - 1)),
            "is not an IDX file of Nx28x28 unsigned bytes",
        ),
        (
            "fashion_mnist_idx",
            replace(LABELS, bytes([7]), bytes([10])),
            "20 labels up to 10 for 20 images of t10k; expected as many, below 10",
        ),
        (
            "fashion_mnist_idx",
            lambda root: shutil.copy(
                root / "train-labels-idx1-ubyte.gz", root / LABELS
            ),
            "40 labels up to 9 for 20 images of t10k; expected as many",
        ),
        (
            "image_folder",
            lambda root: shutil.rmtree(root / "train"),
            r"folders of splits \(test/, val/\), but no train/",
        ),
        (
            "paired_images",
            lambda root: shutil.rmtree(root / "train"),
            r"folders of splits \(val/\), but no train/",
        ),
        (
            "image_folder",
            lambda root: shutil.copytree(root / "val", root / "validation"),
            "has two folders of one split: test, train, val, validation",
        ),
        (
            "image_folder",
            lambda root: (root / "val").rename(root / "extra"),
            "has other folders beside the splits: extra",
        ),
    ],
)
def test_a_layout_that_contradicts_itself_is_refused(
    tmp_path, prepare, name, spoil, message
):
    LAYOUTS[name].write(tmp_path / "source")
    spoil(tmp_path / "source")
    with pytest.raises(SourceError, match=message) as error:
        prepare(name, tmp_path / "source")
    assert str(tmp_path / "source") in str(error.value)
    assert data.prepared(tmp_path / "prepared") == []


def test_idx_files_may_be_unzipped(tmp_path, prepare):
    expected = write_fashion_mnist_idx(tmp_path / "source")
    for path in (tmp_path / "source").iterdir():
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    prepare("fashion_mnist_idx", tmp_path / "source")
    dataset = data.load("fashion_mnist_idx", data_dir=tmp_path / "prepared")
    assert sorted(seen(dataset, "test")) == sorted(expected["test"])


def test_damage_in_a_zip_of_idx_files_is_explained(tmp_path, prepare):
    write_fashion_mnist_idx(tmp_path / "source")
    path = Path(shutil.make_archive(str(tmp_path / "a"), "zip", tmp_path / "source"))
    content = bytearray(path.read_bytes())
    content[content.index(IMAGES.encode()) + len(IMAGES) + 40] ^= 255
    path.write_bytes(content)
    with pytest.raises(UsageError, match=f"{IMAGES}.*cannot be unpacked"):
        prepare("fashion_mnist_idx", path)


def test_two_images_of_one_mask_are_bad(tmp_path, prepare):
    write_segmentation_folder(tmp_path / "source")
    paint(tmp_path / "source" / "train" / "images" / "1.v1.png", 1, 9)
    with pytest.raises(BadFilesError) as error:
        prepare("segmentation_folder", tmp_path / "source")
    assert len(error.value.errors) == 1
    assert "train/images/1.v1.png" in str(error.value)


def test_names_of_any_bytes_are_read(tmp_path, prepare):
    write_image_folder(tmp_path / "source")
    path = tmp_path / "source" / "train" / "ant" / "caf\udce9.jpg"  # of Latin-1
    paint(tmp_path / "source" / "train" / "ant" / "9.jpg", 0, 9)
    (tmp_path / "source" / "train" / "ant" / "9.jpg").rename(path)
    prepare("image_folder", tmp_path / "source")
    dataset = data.load("image_folder/insects", data_dir=tmp_path / "prepared")
    assert (0, 0, 9) in seen(dataset, "train")


def test_a_folder_without_a_dataset_in_its_place_is_not_taken_for_one(
    tmp_path, prepare
):
    write_image_folder(tmp_path / "source")
    place = tmp_path / "prepared" / "image_folder" / "insects" / "1.0.0"
    place.mkdir(parents=True)
    with pytest.raises(UsageError, match=r"1\.0\.0 .*remove"):
        prepare("image_folder", tmp_path / "source")


# The command.


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs the command and gives its output, or its error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "prepared"))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
        command_line.main()
        return capsys.readouterr().out

    return run


def test_the_command_prepares_and_describes(tmp_path, run):
    write_image_folder(tmp_path / "source")
    output = run("prepare", "image_folder/insects", "--source", tmp_path / "source")
    assert re.search(r"train +12 +12 x 8", output)
    assert re.search(r"1 +bee +33\.33 +33\.33 +33\.33", output)
    assert "bad" not in output
    again = run("prepare", "image_folder/insects", "--source", tmp_path / "source")
    assert "prepared already; to do it again, remove" in again
    listed = run("list")
    assert f"Prepared in {tmp_path / 'prepared'}: image_folder/insects" in listed
    for name in data.BUILDERS:
        assert name in listed
    drawn = run("show", "image_folder/insects", "--count", "5")
    assert "drew image_folder/insects, 5 of 12 in train" in drawn
    path = tmp_path / "image_folder-insects-train.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_command_takes_options_and_another_place(tmp_path, run):
    write_segmentation_folder(tmp_path / "source")
    output = run(
        *(
            "prepare",
            "segmentation_folder/x",
            "--source",
            tmp_path / "source" / "train",
        ),
        *("--classes", "road, car,sky", "--ignore-label", "255"),
        *("--test-fraction", "0.5", "--data-dir", tmp_path / "else"),
    )
    assert re.search(r"test +3 +12 x 8", output)
    assert re.search(r"2 +sky", output)
    assert data.prepared(tmp_path / "else") == ["segmentation_folder/x"]
    assert data.prepared(tmp_path / "prepared") == []


def test_the_command_says_what_it_left_out(tmp_path, run):
    write_image_folder(tmp_path / "source")
    cut(tmp_path / "source" / "train" / "ant" / "0.jpg")
    text(tmp_path / "source" / "test" / "bee" / "1.PNG")
    arguments = ("prepare", "image_folder/insects", "--source", tmp_path / "source")
    with pytest.raises(SystemExit) as error:
        run(*arguments)
    message = str(error.value)
    assert " has 2 bad files: test/bee/1.PNG: not an" in message
    assert "train/ant/0.jpg: damaged" in message
    assert "skip_bad" in message
    output = run(*arguments, "--skip-bad")
    assert "left out 2 bad files: test/bee/1.PNG: not" in output
    assert re.search(r"train +11 ", output)
    assert re.search(r"test +5 ", output)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("camvid", "--source", "none"), "there is no folder or archive none"),
        (("camvid",), "prepare camvid --source PATH, a folder or archive"),
        (("image_folder", "--source", "a"), "name the dataset, as in image_folder/"),
        (("camvid", "--source", "source"), "it holds no trainannot, but readme.txt"),
        (("camvid", "--source", "source/readme.txt"), "not a whole tar or zip archive"),
        (("imag_folder/x", "--source", "source"), "unknown dataset 'imag_folder/x'"),
        (("digits", "--source", "source"), "digits is made .*leave out the source"),
        (
            ("camvid", "--source", "source", "--classes", "a,b"),
            "camvid does not take classes",
        ),
    ],
)
def test_the_command_ends_in_one_clear_line(tmp_path, run, arguments, message):
    write_image_folder(tmp_path / "source")
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        run("prepare", *arguments)
    assert data.prepared(tmp_path / "prepared") == []
