"""Datasets by name: found, prepared on demand, loaded, and errors that say how."""

import importlib.util
import json
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from train import data
from train.data.dataset import describe, from_description
from train.data.preparation import catalogue
from train.errors import UsageError


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_digits_are_the_real_ones(digits):
    assert digits.task == "classification"
    assert digits.class_names == tuple("0123456789")
    images, labels = [], []
    for name, count in (("train", 1000), ("test", 797)):
        arrays = digits.split(name).arrays()
        assert arrays["image"].shape == (count, 8, 8, 1)
        assert arrays["image"].dtype == np.uint8
        shares = np.bincount(arrays["label"], minlength=10) / count
        np.testing.assert_allclose(shares, 0.1, atol=0.01)
        images += [image.tobytes() for image in arrays["image"]]
        labels += arrays["label"].tolist()
    source = load_digits()
    expected = np.rint(source.images * (255 / 16)).astype(np.uint8)
    assert sorted(zip(images, labels, strict=True)) == sorted(
        (image.tobytes(), label)
        for image, label in zip(expected, source.target.tolist(), strict=True)
    )


def test_mean_and_std_are_those_of_the_training_images(digits):
    images = digits.split("train").arrays()["image"] / 255
    assert digits.mean == pytest.approx([images.mean()])
    assert digits.std == pytest.approx([images.std()])


def test_validation_holds_out_training_images_only(digits):
    held = digits.hold_out()
    train, validation = held.split("train"), held.split("validation")
    assert (len(train), len(validation)) == (800, 200)
    joined = np.concatenate([train.arrays()["image"], validation.arrays()["image"]])
    np.testing.assert_array_equal(joined, digits.split("train").arrays()["image"])
    np.testing.assert_array_equal(
        validation.read([0, 199])["image"], joined[[800, 999]]
    )
    assert held.hold_out() is held


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "digit",
            r"unknown dataset 'digit'; did you mean digits.*known: digits, "
            r".*image_folder/NAME.*cifar10",
        ),
        ("../etc", "unknown dataset"),
        ("image_folder", "name the dataset, as in image_folder/flowers"),
        ("camvid/other", "has no variants"),
        ("camvid", r"not prepared in .*: python -m train.data prepare camvid --source"),
        (
            "cifar10",
            r"not prepared .*--group prepare .* python -m train.data prepare cifar10",
        ),
        (
            "cityscapes/semantic_segmentation",
            "python -m train.data prepare cityscapes/semantic_segmentation",
        ),
    ],
)
def test_errors_name_the_remedy(name, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        data.load(name, data_dir=tmp_path)


@pytest.mark.skipif(
    importlib.util.find_spec("tensorflow") is not None, reason="TensorFlow is there"
)
def test_the_catalogue_is_prepared_by_tensorflow_only(tmp_path):
    with pytest.raises(UsageError, match="--group prepare for TensorFlow"):
        data.prepare("cifar10", data_dir=tmp_path)


@pytest.mark.parametrize("urls", [{"https://data.invalid/cifar.tar": None}, None])
def test_a_download_that_fails_is_explained(tmp_path, monkeypatch, urls):
    class Offline:
        MANUAL_DOWNLOAD_INSTRUCTIONS = None
        url_infos = urls

        def download_and_prepare(self, **kwargs):
            assert urls is None  # else it would try for minutes
            raise ConnectionError("connection refused")

    monkeypatch.setattr(catalogue, "_has_tensorflow", lambda: True)
    monkeypatch.setattr(tfds, "builder", lambda *args, **kwargs: Offline())
    monkeypatch.setattr(urllib.request, "getproxies", dict)
    with pytest.raises(UsageError, match=r"\(.*\)\. .*without network, copy cifar10"):
        data.prepare("cifar10", data_dir=tmp_path)


@pytest.mark.slow
def test_classes_are_counted(digits):
    for name in ("train", "test"):
        labels = digits.split(name).arrays()["label"]
        found = digits.class_counts[name]
        assert (found.shape, found.dtype) == ((10,), np.int64)
        np.testing.assert_array_equal(found, np.bincount(labels, minlength=10))
    scenes = data.load("digit_scenes")
    for name in ("train", "test"):
        masks = scenes.split(name).arrays()["mask"]
        found = scenes.class_counts[name]
        assert (found.shape, found.dtype) == ((256,), np.int64)
        np.testing.assert_array_equal(found, np.bincount(masks.ravel(), minlength=256))
    assert data.load("digit_scenes", task="translation").class_counts == {}


def test_counts_are_of_the_splits_as_prepared(digits):
    held = digits.hold_out()
    assert held.class_counts is digits.class_counts
    assert from_description(describe(digits)).class_counts == {}


def test_a_description_tells_all_but_the_examples():
    scenes = data.load("digit_scenes", size=(16, 24))
    described = json.loads(json.dumps(describe(scenes)))
    found = from_description(described)
    for name in ("name", "task", "class_names", "ignore_label", "mean", "std"):
        assert getattr(found, name) == getattr(scenes, name)
    np.testing.assert_array_equal(found.colors, scenes.colors)
    assert found.split("train").reader == scenes.split("train").reader
    assert len(found.split("train")) == 0


def test_what_a_dataset_does_not_have(digits):
    with pytest.raises(UsageError, match="no split 'val'; it has train, test"):
        digits.split("val")
    with pytest.raises(UsageError, match="for classification, not for segmentation"):
        data.load("digits", task="segmentation")


def test_one_dataset_may_serve_two_tasks():
    scenes = data.load("digit_scenes")
    assert (scenes.task, scenes.num_classes) == ("segmentation", 11)
    painted = data.load("digit_scenes", task="translation")
    rows = [3, 0]
    first, second = scenes.split("test").read(rows), painted.split("test").read(rows)
    np.testing.assert_array_equal(first["image"], second["target"])
    np.testing.assert_array_equal(scenes.colors[first["mask"]], second["input"])


class Street(tfds.core.ShardBasedBuilder):
    """Stands for what TFDS prepares of Cityscapes and of photos elsewhere."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, *, features, examples, **kwargs):
        self._features, self._examples = features, examples
        super().__init__(**kwargs)

    def _info(self):
        features = tfds.features.FeaturesDict(self._features)
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager):
        return {"train": [lambda: iter(enumerate(self._examples))]}


def prepare_elsewhere(path, name, features, examples):
    """What a machine with TensorFlow would leave under a name of the catalogue."""
    builder = Street(
        features=features,
        examples=examples,
        data_dir=path / "elsewhere",
        file_format="array_record",
    )
    builder.download_and_prepare()
    folder = path / name / "1.0.0"
    folder.parent.mkdir(parents=True)
    builder.data_path.rename(folder)
    for file in folder.glob("street-*"):
        file.rename(folder / file.name.replace("street", name.split("/")[0]))
    info = json.loads((folder / "dataset_info.json").read_text())
    info["name"] = name.split("/")[0]
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def image_feature(channels=3):
    return tfds.features.Image(shape=(None, None, channels))


def test_a_dataset_of_the_catalogue_is_read(tmp_path):
    examples = [
        {"image": Image.new("RGB", (32, 32), (i, 2 * i, 0)), "label": i % 10, "id": "x"}
        for i in range(20)
    ]
    features = {
        "id": tfds.features.Text(),
        "image": image_feature(),
        "label": tfds.features.ClassLabel(num_classes=10),
    }
    prepare_elsewhere(tmp_path, "cifar10", features, examples)
    cifar = data.load("cifar10", data_dir=tmp_path)
    assert cifar.num_classes == 10
    batch = cifar.split("train").read([7, 3])
    assert batch.keys() == {"image", "label"}
    np.testing.assert_array_equal(batch["label"], [7, 3])
    np.testing.assert_array_equal(batch["image"][0, 0, 0], [7, 14, 0])
    assert data.prepared(tmp_path) == ["cifar10"]


# Name and trainId of each id that is trained on, from the table `labels` in
# cityscapesscripts/helpers/labels.py of https://github.com/mcordts/cityscapesScripts,
# which the authors of the dataset published.
CITYSCAPES_TRAIN_IDS = {
    7: ("road", 0),
    8: ("sidewalk", 1),
    11: ("building", 2),
    12: ("wall", 3),
    13: ("fence", 4),
    17: ("pole", 5),
    19: ("traffic light", 6),
    20: ("traffic sign", 7),
    21: ("vegetation", 8),
    22: ("terrain", 9),
    23: ("sky", 10),
    24: ("person", 11),
    25: ("rider", 12),
    26: ("car", 13),
    27: ("truck", 14),
    28: ("bus", 15),
    31: ("train", 16),
    32: ("motorcycle", 17),
    33: ("bicycle", 18),
}


def test_cityscapes_has_its_nineteen_classes(tmp_path):
    values = np.arange(34, dtype=np.uint8).reshape(2, 17)
    example = {
        "image_left": Image.new("RGB", (17, 2)),
        "segmentation_label": Image.fromarray(values),
    }
    features = {
        "image_left": image_feature(),
        "segmentation_label": image_feature(1),
    }
    name = "cityscapes/semantic_segmentation"
    prepare_elsewhere(tmp_path, name, features, [example])
    cityscapes = data.load(name, data_dir=tmp_path)
    assert (cityscapes.num_classes, cityscapes.ignore_label) == (19, 255)
    mask = cityscapes.split("train").read([0])["mask"][0]
    found = dict(zip(values.ravel().tolist(), mask.ravel().tolist(), strict=True))
    for value in range(34):
        _, train_id = CITYSCAPES_TRAIN_IDS.get(value, (None, 255))
        assert found[value] == train_id
    names = {train_id: name for name, train_id in CITYSCAPES_TRAIN_IDS.values()}
    assert dict(enumerate(cityscapes.class_names)) == names


def test_what_only_tensorflow_reads_is_refused(tmp_path):
    examples = [{"image": Image.new("RGB", (2, 2)), "label": 0}]
    features = {
        "image": image_feature(),
        "label": tfds.features.ClassLabel(num_classes=1),
    }
    folder = prepare_elsewhere(tmp_path, "cifar10", features, examples)
    info = folder / "dataset_info.json"
    info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
    with pytest.raises(UsageError, match=r"as tfrecord.*prepare cifar10"):
        data.load("cifar10", data_dir=tmp_path)


def labels(**kwargs):
    return tfds.features.ClassLabel(**kwargs)


@pytest.mark.parametrize(
    ("features", "example", "message"),
    [
        (
            {"image": image_feature(4), "label": labels(num_classes=3)},
            {"image": Image.new("RGBA", (2, 2)), "label": 0},
            "serves no task here: it holds image, label",
        ),
        (
            {"image": image_feature(), "label": tfds.features.Scalar(np.int64)},
            {"image": Image.new("RGB", (2, 2)), "label": 0},
            "serves no task here",
        ),
        (
            {"image": image_feature(), "label": tfds.features.Sequence(np.int64)},
            {"image": Image.new("RGB", (2, 2)), "label": [1, 2]},
            "serves no task here",
        ),
    ],
    ids=["four channels", "no class names", "several labels"],
)
def test_what_cannot_be_trained_on_is_refused(tmp_path, features, example, message):
    prepare_elsewhere(tmp_path, "cars196", features, [example])
    with pytest.raises(UsageError, match=message):
        data.load("cars196", data_dir=tmp_path)


def test_unlabeled_images_are_in_no_class(tmp_path):
    images = [Image.new("RGB", (2, 2), (i, 0, 0)) for i in range(3)]
    examples = [
        {"image": image, "label": label}
        for image, label in zip(images, (-1, 2, 2), strict=True)
    ]
    features = {"image": image_feature(), "label": labels(num_classes=3)}
    prepare_elsewhere(tmp_path, "cars196", features, examples)
    found = data.open_prepared("cars196", data_dir=tmp_path).statistics()["train"]
    assert found.counts["label"] == [0, 0, 2]
    assert found.num_examples == 3
    counts = data.load("cars196", data_dir=tmp_path).class_counts["train"]
    assert counts.tolist() == [0, 0, 2]
    assert list(data.load("cars196", data_dir=tmp_path).splits) == ["train"]


def test_a_split_without_any_label_is_left_out(tmp_path):
    example = {"image": Image.new("RGB", (2, 2)), "label": -1}
    features = {"image": image_feature(), "label": labels(num_classes=3)}
    prepare_elsewhere(tmp_path, "cars196", features, [example])
    dataset = data.load("cars196", data_dir=tmp_path)
    with pytest.raises(UsageError, match="no split 'train'"):
        dataset.split("train")


def mixed_sizes(tmp_path, features, make):
    examples = [make(size) for size in ((40, 20), (10, 30))]
    prepare_elsewhere(tmp_path, "caltech_birds2011", features, examples)


def test_images_of_several_sizes_need_one(tmp_path):
    features = {
        "image": image_feature(),
        "label": tfds.features.ClassLabel(num_classes=1),
    }

    def make(size):
        return {"image": Image.new("RGB", size, (200, 100, 50)), "label": 0}

    mixed_sizes(tmp_path, features, make)
    with pytest.raises(UsageError, match=r"from 10 to 40 pixels wide.*image_size"):
        data.load("caltech_birds2011", data_dir=tmp_path)
    birds = data.load("caltech_birds2011", size=(8, 6), data_dir=tmp_path)
    assert birds.std == (1.0, 1.0, 1.0)  # of one color: nothing to divide by
    images = birds.split("train").read([0, 1])["image"]
    assert images.shape == (2, 8, 6, 3)
    assert (images == [200, 100, 50]).all()  # cropped: nothing is filled in
    np.testing.assert_array_equal(images, birds.split("train").arrays()["image"])


def test_masks_are_padded_with_the_ignored_label_where_their_image_is(tmp_path):
    features = {
        "image": image_feature(),
        "mask": tfds.features.LabeledImage(shape=(None, None, 1), labels=3),
    }

    def make(size):
        return {
            "image": Image.new("RGB", size, (255,) * 3),
            "mask": Image.new("L", size, 2),
        }

    mixed_sizes(tmp_path, features, make)
    photos = data.load("caltech_birds2011", size=(24, 24), data_dir=tmp_path)
    batch = photos.split("train").read([0, 1])
    for image, mask, height, width in zip(
        batch["image"], batch["mask"], (12, 24), (24, 8), strict=True
    ):
        assert set(np.unique(mask)) == {2, 255}
        assert (mask == 2).sum() == height * width
        np.testing.assert_array_equal((image == 255).all(axis=-1), mask == 2)
