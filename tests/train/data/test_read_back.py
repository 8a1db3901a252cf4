"""Every file that is read back is checked: made anew if it is a cache, else refused.

Damage of any kind gives the right dataset, or one line that names file and remedy.
"""

import copy
import json
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train import data
from train.data import loaders
from train.errors import UsageError
from train.names import printable

NAME, PIXELS = "segmentation_folder/x", (6, 4)
RNG = np.random.default_rng(0)


def paint(root):
    for split in ("train", "test"):
        for i in range(8):
            photo = RNG.integers(0, 256, (*PIXELS, 3), np.uint8)
            mask = RNG.integers(0, 3, PIXELS, np.uint8)
            for kind, array in (("images", photo), ("masks", mask)):
                path = root / split / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A folder of datasets with this one, its statistics and its cache."""
    folder = tmp_path_factory.mktemp("sound")
    paint(folder / "source")
    place = folder / "data"
    classes = ["a", "b", "c"]
    data.prepare(NAME, source=folder / "source", data_dir=place, classes=classes)
    data.load(NAME, data_dir=place).split("train").arrays()
    return place


@pytest.fixture
def place(sound, tmp_path):
    return shutil.copytree(sound, tmp_path / "place")


def loaded(place):
    """All that a run reads: statistics, and both arrays of the training split."""
    found = data.load(NAME, data_dir=place)
    arrays = found.split("train").arrays()
    read = found.split("train").read(range(8))
    for key, array in read.items():
        np.testing.assert_array_equal(arrays[key], array)
    counts = {key: value.tolist() for key, value in found.class_counts.items()}
    return found.mean, found.std, counts, {k: v.tolist() for k, v in read.items()}


def folder_of(place):
    return data.folder_of(NAME, place)


# How a file is damaged, given its path.


def empty(path):
    path.write_bytes(b"")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_last_byte(path):
    path.write_bytes(path.read_bytes()[:-1])


def with_more(path):
    path.write_bytes(path.read_bytes() + b"more")


def noise(path):
    path.write_bytes(np.random.default_rng(1).bytes(path.stat().st_size))


def removed(path):
    path.unlink()


def replaced_by_folder(path):
    path.unlink()
    path.mkdir()


def three_of_eight(path):
    np.save(path, np.load(path)[:3])


def another_shape(path):
    np.save(path, np.load(path)[:, :-1])


def another_dtype(path):
    np.save(path, np.load(path).astype(np.float32))


def objects(path):
    np.save(path, np.array([{}] * 8), allow_pickle=True)


def number(path):
    path.write_text("7")


def null(path):
    path.write_text("null")


def one_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def last_bit(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 128
    path.write_bytes(content)


def zeros(path):
    content = path.read_bytes()
    path.write_bytes(content[:200] + bytes(len(content) - 200))


CACHE = [empty, half, without_last_byte, with_more, noise, removed, three_of_eight]
CACHE += [another_shape, another_dtype, objects, one_bit, last_bit, zeros]


@pytest.mark.parametrize("damage", CACHE, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("key", ["image", "mask"])
def test_a_damaged_cache_is_made_anew(sound, place, key, damage):
    (path,) = folder_of(place).glob(f"cache/train-{key}-*.npy")
    damage(path)
    assert loaded(place) == loaded(sound)


def change(path, *keys, value):
    content = json.loads(path.read_text())
    part = content
    for key in keys[:-1]:
        part = part[key]
    part[keys[-1]] = value
    path.write_text(json.dumps(content))


STATISTICS = {damage.__name__: damage for damage in [*CACHE[:6], number, null]}
TRAIN = ("splits", "train")
STATISTICS |= {
    "of another dataset": lambda path: change(path, "digest", value="0" * 64),
    "without a split": lambda path: change(path, "splits", value={}),
    "of 7 examples": lambda p: change(p, *TRAIN, "num_examples", value=7),
    "of no pixel": lambda p: change(p, *TRAIN, "heights", value=[0, 4]),
    "of two channels": lambda p: change(p, *TRAIN, "mean", "image", value=[0.5] * 2),
    "of another field": lambda p: change(p, *TRAIN, "counts", value={"label": [8]}),
    "of too many values": lambda p: change(
        p, *TRAIN, "counts", "mask", value=[1] * 999
    ),
    "with text": lambda p: change(p, *TRAIN, "mean", "image", value=["a"] * 3),
    "of other counts": lambda p: change(p, *TRAIN, "counts", "mask", value=[64] * 3),
    "not a number": lambda p: change(
        p, *TRAIN, "std", "image", value=[float("nan")] * 3
    ),
}


@pytest.mark.parametrize("damage", STATISTICS.values(), ids=STATISTICS)
def test_damaged_statistics_are_measured_anew(sound, place, damage):
    path = folder_of(place) / "statistics.json"
    whole = json.loads(path.read_text())
    damage(path)
    assert loaded(place) == loaded(sound)
    assert json.loads(path.read_text()) == whole


SHARD = "segmentation_folder-train.array_record-00000-of-00001"
LABELS = "mask.labels.txt"
REFUSED = [
    (file, damage)
    for file, damages in {
        SHARD: [empty, half, without_last_byte, noise, removed, replaced_by_folder],
        "dataset_info.json": [empty, half, noise, number, null],
        "features.json": [empty, half, noise, removed, number, null],
        "metadata.json": [half, noise, number],
    }.items()
    for damage in damages
]


@pytest.mark.parametrize(
    ("file", "damage"), REFUSED, ids=[f"{d.__name__} {f}" for f, d in REFUSED]
)
def test_a_damaged_dataset_is_refused(place, file, damage):
    folder = folder_of(place)
    damage(folder / file)
    with pytest.raises(UsageError, match=r"remove it and prepare .* again") as error:
        loaded(place)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_damaged_record_is_refused(place):
    shard = folder_of(place) / SHARD
    content = bytearray(shard.read_bytes())
    start = content.index(b"\x89PNG")
    content[start + 40 : start + 60] = bytes(20)
    shard.write_bytes(content)
    (folder_of(place) / "statistics.json").unlink()
    with pytest.raises(
        UsageError, match=r"hash mismatch.*remove it and prepare"
    ) as error:
        loaded(place)
    assert "\n" not in str(error.value)


# Any change of the files that are read back as JSON.

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=5,
)
FILES = ("dataset_info.json", "features.json", "metadata.json", "statistics.json")


def places_in(content, path=()):
    yield path
    inside = (
        content.items()
        if isinstance(content, dict)
        else enumerate(content)
        if isinstance(content, list)
        else ()
    )
    for key, value in inside:
        yield from places_in(value, (*path, key))


def replace_at(content, path, value):
    if not path:
        return value
    content = copy.deepcopy(content)
    part = content
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return content


def fuzz(place, choice):
    folder = folder_of(place)
    sound = {folder / name: (folder / name).read_text() for name in FILES}
    path = folder / choice.draw(st.sampled_from(FILES))
    whole = sound[path]
    content = json.loads(whole)
    if choice.draw(st.booleans()):
        where = choice.draw(st.sampled_from(list(places_in(content))))
        others = [replace_at(None, (), value) for value in ("0", "9" * 30, -1, "../x")]
        value = choice.draw(JSON | st.sampled_from(others))
        text = json.dumps(replace_at(content, where, value))
    else:
        text = whole[: choice.draw(st.integers(0, len(whole)))]
        text += choice.draw(st.text(max_size=3))
    path.write_text(text, errors="surrogatepass")
    said = ""
    try:
        loaded(place)
    except (UsageError, OSError) as error:
        said = str(error)
    finally:
        for file, content in sound.items():
            file.write_text(content)
    assert "\n" not in said, text
    assert said == printable(said)


FUZZ = {
    "deadline": None,
    "derandomize": True,
    "database": None,
    "suppress_health_check": list(HealthCheck),
}


@given(st.data())
@settings(max_examples=50, **FUZZ)
def test_changed_json_is_right_or_refused_in_one_line(sound, choice):
    fuzz(sound, choice)


@pytest.mark.slow
@given(st.data())
@settings(max_examples=1500, **FUZZ)
def test_much_changed_json_is_right_or_refused_in_one_line(sound, choice):
    fuzz(sound, choice)


# What else a machine may lack.


def test_a_user_without_home_is_told_what_to_set(monkeypatch):
    def nobody():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "home", nobody)
    monkeypatch.delenv("TFDS_DATA_DIR", raising=False)
    with pytest.raises(
        UsageError, match=r"no home folder.*set data_dir or TFDS_DATA_D"
    ):
        data.prepared()
    monkeypatch.setenv("TFDS_DATA_DIR", "/nowhere")
    assert data.prepared() == []


def test_the_folder_of_datasets_may_be_below_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", "~/data")
    assert data.default_data_dir() == tmp_path / "data"
    monkeypatch.delenv("TFDS_DATA_DIR")
    assert data.default_data_dir() == tmp_path / "tensorflow_datasets"


def test_far_more_workers_than_cores_are_refused(sound, monkeypatch):
    split = data.load(NAME, data_dir=sound).split("train")
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    with pytest.raises(UsageError, match="at most 8 on 2 cores, got 100: 1, the defa"):
        loaders.GrainLoader(split, num_workers=100)
    loaders.GrainLoader(split, num_workers=8)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tiny_imagnet", "did you mean tiny_imagenet"),
        ("cifar1O", "did you mean cifar10"),
        ("x", "did you mean segmentation_folder/x"),
        ("segmentation_foldr/x", "did you mean segmentation_folder/x"),
        ("image_foldr/flowers", "did you mean image_folder/flowers"),
        ("segmentation_folder/y", "did you mean segmentation_folder/x"),
    ],
)
def test_a_misspelt_name_is_guessed(sound, name, said):
    with pytest.raises(UsageError) as error:
        data.load(name, data_dir=sound)
    assert said in str(error.value)


def test_a_path_for_a_name_is_noticed(sound, tmp_path):
    with pytest.raises(UsageError, match=r"it is a path: prepare it first.*--source"):
        data.load(str(tmp_path), data_dir=sound)
