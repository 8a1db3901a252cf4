"""Folders as people have them: read, or refused with the reason, never misread.

What a person declared and what the files hold must agree. Each table has one row for
each layout or file, and what is right for it.
"""

import io
import re
import shutil
import sys
import unicodedata
import zipfile

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

import train.data.__main__ as command_line
from train import data
from train.data.preparation.archives import SourceError
from train.data.preparation.builder import BadFilesError
from train.errors import UsageError
from train.plots._common import readable

SIZE = (6, 4)  # (width, height)
PHOTO = Image.new("RGB", SIZE, (200, 100, 50))
VALUES = np.uint8([[0, 0, 0, 1, 1, 1]] * 4)
MASK = Image.fromarray(VALUES)
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))
LEFT, RIGHT = Image.new("RGB", SIZE, (10, 0, 0)), Image.new("RGB", SIZE, (0, 10, 0))
HALVES = Image.fromarray(np.concatenate([LEFT, RIGHT], axis=1))


def write(root, files):
    """Writes files: images, texts, or bytes."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Image.Image):
            content.save(path)
        elif isinstance(content, str):
            path.write_text(content)
        else:
            path.write_bytes(content)
    return root


def several(pattern, image, count=3):
    return {pattern.format(i): image for i in range(count)}


@pytest.fixture
def prepare(tmp_path):
    def prepare(name, files, **options):
        source = write(tmp_path / "source", files)
        if name == "segmentation_folder":
            options = {"classes": ["ground", "thing"]} | options
        return data.prepare(
            f"{name}/x", source=source, data_dir=tmp_path / "data", **options
        )

    return prepare


@pytest.fixture
def load(tmp_path):
    return lambda name: data.load(f"{name}/x", data_dir=tmp_path / "data")


def notes(builder):
    """The notes, but for the one on all pairs that are halves of a picture."""
    return [note for note in builder.notes if "is cut into" not in note]


def masks(load, split="train"):
    part = load("segmentation_folder").split(split)
    return part.read(range(len(part)))["mask"]


# ------------------------------- Where files lie --------------------------------------

SEGMENTATION = [
    # photos and masks of the training split, of the other, and its name
    ("train/images", "train/masks", "test/images", "test/masks", "test"),
    ("images/train", "masks/train", "images/val", "masks/val", "validation"),
    ("ds/images/training", "ds/masks/training", "ds/images/testing",
     "ds/masks/testing", "test"),
    ("images/training", "annotations/training", "images/validation",
     "annotations/validation", "validation"),
    ("img_dir/train", "ann_dir/train", "img_dir/test", "ann_dir/test", "test"),
    ("Train/Images", "Train/Labels", "Valid/Images", "Valid/Labels", "validation"),
    ("imgs/train2017", "targets/train2017", "imgs/val2017", "targets/val2017",
     "validation"),
    ("a/b/train_set/photos", "a/b/train_set/gt", "a/b/test_set/photos",
     "a/b/test_set/gt", "test"),
    ("images/train/city/1", "masks/train/city/1", "images/test/city/2",
     "masks/test/city/2", "test"),
]  # fmt: skip


@pytest.mark.parametrize(
    "row", SEGMENTATION, ids=[f"{row[0]} {row[1]}" for row in SEGMENTATION]
)
def test_photos_and_masks_are_found(prepare, load, row):
    photos, of_photos, others, of_others, split = row
    files = several(f"{photos}/{{}}.png", PHOTO, 3) | several(
        f"{of_photos}/{{}}.png", MASK, 3
    )
    files |= several(f"{others}/{{}}.png", PHOTO, 2) | several(
        f"{of_others}/{{}}.png", MASK, 2
    )
    builder = prepare("segmentation_folder", files)
    assert (builder.skipped, builder.notes) == ([], [])
    found = load("segmentation_folder").splits
    assert {name: len(part) for name, part in found.items()} == {"train": 3, split: 2}


PAIRS = [
    # the folders of A and B of the training split, of the other
    ("train/A", "train/B", "test/A", "test/B"),
    ("A/train", "B/train", "A/test", "B/test"),
    ("maps/A/train", "maps/B/train", "maps/A/test", "maps/B/test"),
    ("train/input", "train/target", "test/input", "test/target"),
    ("inputs/training", "targets/training", "inputs/testing", "targets/testing"),
]


@pytest.mark.parametrize("row", PAIRS, ids=[row[0] for row in PAIRS])
def test_pairs_are_found_in_two_folders(prepare, load, row):
    files = {}
    for folder, image in zip(row, (LEFT, RIGHT) * 2, strict=True):
        files |= several(f"{folder}/{{}}.png", image)
    builder = prepare("paired_images", files)
    assert (builder.skipped, builder.notes) == ([], [])
    found = load("paired_images")
    assert set(found.splits) == {"train", "test"}
    batch = found.split("train").read(range(3))
    np.testing.assert_array_equal(batch["input"][1], LEFT)
    np.testing.assert_array_equal(batch["target"][1], RIGHT)


def test_classes_in_folders_of_odd_names_are_found(prepare, load):
    files = {}
    for split in ("training_set/training_set", "test_set/test_set"):
        for name in ("cat", "dog"):
            files |= several(f"{split}/{name}/{{}}.png", PHOTO)
    prepare("image_folder", files)
    found = load("image_folder")
    assert found.class_names == ("cat", "dog")
    assert set(found.splits) == {"train", "test"}


def at(folders, image=PHOTO):
    return {f"{folder}/{i}.png": image for folder in folders for i in range(3)}


GOOD = {
    "image_folder": at(["train/cat", "train/dog", "test/cat", "test/dog"]),
    "paired_images": at(["train", "test"], HALVES),
    "segmentation_folder": at(["train/images", "test/images"])
    | at(["train/masks", "test/masks"], MASK),
}
MISPLACED = [
    # builder, files, what is said
    ("image_folder", at(["cat/train", "cat/test", "dog/train", "dog/test"]),
     "folders of splits where none is expected: cat/test/, cat/train/, dog/"),
    ("paired_images", at(["photos/train", "drawings/train", "photos/test"]),
     r"holds folders \(drawings, photos\).*train/A/"),
    ("paired_images", at(["train/photos", "train/drawings"], HALVES),
     r"train/ holds folders \(drawings, photos\).*train/A/ and train/B/"),
    ("paired_images", at(["trainA", "trainB", "testA", "testB"], HALVES),
     r"holds folders \(testA, testB, trainA, trainB\)"),
    ("paired_images", at(["images/train", "masks/train"], HALVES),
     r"holds folders \(images, masks\)"),
    ("paired_images", at(["train/A", "train/B", "test/A"]),
     "holds no test/B/.*expected SPLIT/A/ and SPLIT/B/, or A/SPLIT/"),
    ("segmentation_folder", at(["foo/train", "bar/train"]),
     r"in several places \(bar/, foo/\); expected SPLIT/images/ and SPLIT/masks/"),
    ("segmentation_folder", at(["train", "test"]), "holds no test/images/"),
    ("segmentation_folder", at(["images/train", "masks/test"]),
     "no split train in both images/ and masks/"),
    ("segmentation_folder", at(["train/images", "train/masks", "train/labels"]),
     "several folders that may be masks/: train/labels/, train/masks/; leave one"),
    ("segmentation_folder", at(["train/images"]) | {"train/masks/1.json": "{}"},
     "holds no train/masks/"),
    ("segmentation_folder", at(["photos", "drawings"]), "holds no masks/, but draw"),
]  # fmt: skip


@pytest.mark.parametrize("fraction", [{}, {"test_fraction": 0.3}])
@pytest.mark.parametrize(
    ("name", "files", "message"), MISPLACED, ids=[row[2][:40] for row in MISPLACED]
)
def test_a_layout_that_is_not_known_is_refused(
    prepare, name, files, message, fraction, tmp_path
):
    with pytest.raises(SourceError, match=message) as error:
        prepare(name, files, **fraction)
    assert "declare the share" not in str(error.value)
    assert str(tmp_path / "source") in str(error.value)
    assert "\n" not in str(error.value)


TALL, WIDE = Image.new("RGB", (4, 6)), Image.new("RGB", (12, 4))
CUT = [
    # files, the size in the note; None if they are refused
    (at(["train", "test"], HALVES), "12x4 pixels into two of 6x4"),
    (at(["train", "test"], PHOTO), "6x4 pixels into two of 3x4"),
    (at(["train"], TALL) | at(["test"], WIDE) | {"test/9.png": WIDE},
     "12x4 pixels into two of 6x4"),
    (at(["train", "test"], Image.new("RGB", (8, 8))), None),
    (at(["train", "test"], TALL), None),
    (at(["A/train", "A/test"], TALL), None),
]  # fmt: skip


@pytest.mark.parametrize(("files", "cut"), CUT)
def test_pictures_are_not_halved_in_silence(prepare, files, cut):
    if cut is None:
        with pytest.raises(SourceError, match=r"no picture is wider .* train/A/ and"):
            prepare("paired_images", files)
    else:
        (note,) = prepare("paired_images", files).notes
        assert f"such as {cut}; if they are no pairs, put A and B into two" in note


SIDES = {
    # the folder that is given: the row of folders that it is in
    "train/A": PAIRS[0],
    "test/B": PAIRS[0],
    "A": PAIRS[1],
    "B/test": PAIRS[1],
    "train/target": PAIRS[3],
    "inputs/training": PAIRS[4],
}


@pytest.mark.parametrize("given", SIDES)
def test_one_side_of_pairs_is_refused(tmp_path, given):
    for folder in SIDES[given]:
        write(tmp_path / "maps", several(f"{folder}/{{}}.png", WIDE))
    options = {"data_dir": tmp_path / "data", "test_fraction": 0.4}
    with pytest.raises(SourceError, match=r"holds one side .* give the folder of both"):
        data.prepare("paired_images/x", source=tmp_path / "maps" / given, **options)


@pytest.mark.parametrize(
    ("folders", "said"),
    [
        (["train/cat", "train/Cat", "test/cat"], "Cat and cat"),
        (["train/cat", "train/dog", "test/Cat", "test/dog"], "Cat and cat"),
        (["train/straße", "train/STRASSE", "test/straße"], "STRASSE and straße"),
    ],
)
def test_classes_that_differ_in_case_alone_are_refused(prepare, folders, said):
    message = f"has class folders {said}, which are one folder .*merge them, or rename"
    with pytest.raises(SourceError, match=message):
        prepare("image_folder", at(folders), skip_bad=True)


ONE_CLASS = [
    # files, options
    (at(["train/images/cat", "train/images/dog", "test/images/cat"]), {}),
    (at(["train/cat", "test/cat"]), {}),
    (at(["cat"]), {"test_fraction": 0.3}),
    (at(["train/cat", "test/cat"]) | at(["train/dog"], "damaged"), {"skip_bad": True}),
]


@pytest.mark.parametrize(("files", "options"), ONE_CLASS)
def test_a_single_class_is_refused(prepare, files, options):
    message = "one class, as in .*png; expected folders of at least two classes"
    with pytest.raises(SourceError, match=message):
        prepare("image_folder", files, **options)


@pytest.mark.parametrize("name", GOOD)
def test_no_share_is_suggested_where_lists_of_splits_lie(prepare, name):
    files = {
        file.removeprefix("train/"): image
        for file, image in GOOD[name].items()
        if file.startswith("train/")
    }
    files |= {"train.txt": "0", "val.csv": "1"}
    with pytest.raises(SourceError, match=r"\(train.txt, val.csv\).* folders train/"):
        prepare(name, files)
    builder = prepare(name, {}, test_fraction=0.4, skip_bad=True)
    listed = [error.file for error in builder.skipped] + notes(builder)
    if name == "paired_images":  # they lie among the images
        assert listed == ["train.txt", "val.csv"]
    else:
        assert listed == ["not used: train.txt, val.csv"]


def test_a_dataset_may_have_an_accent_composed_in_any_form(tmp_path):
    source = write(tmp_path / "source", GOOD["image_folder"])
    for form in (NFD, NFC):
        name = f"image_folder/{form}"
        data.prepare(name, source=source, data_dir=tmp_path / "data")
        assert data.load(name, data_dir=tmp_path / "data").num_classes == 2
    assert data.prepared(tmp_path / "data") == [f"image_folder/{NFC}"]


# ------------------------------- Every file counts ------------------------------------


@pytest.mark.parametrize("suffix", ["jpg", "bmp", "tif", "tiff", "gif", "PNG"])
def test_images_of_every_suffix_are_read(prepare, load, suffix):
    """A photo and its mask need not have the same suffix."""
    kept = "png" if suffix == "jpg" else suffix
    for name, files, counted in (
        ("image_folder", at(["train/cat", "train/dog", "test/cat", "test/dog"]), 6),
        ("paired_images", at(["train", "test"], HALVES), 3),
        ("segmentation_folder", at(["train/images", "test/images"]), 3),
    ):
        files = {name.replace("png", suffix): image for name, image in files.items()}
        if name == "segmentation_folder":
            of_masks = at(["train/masks", "test/masks"], MASK)
            files |= {n.replace("png", kept): image for n, image in of_masks.items()}
        shutil.rmtree(prepare.__closure__[0].cell_contents / "source", True)
        assert notes(prepare(name, files)) == []
        assert len(load(name).split("train")) == counted


NOTHING = {
    "README.md": "", "LICENSE": "", "train/license.txt": "", "train/.hidden": "",
    "train/Thumbs.db": "", "__MACOSX/train/._1.png": "", "README.roboflow.txt": "",
    ".DS_Store": "", "desktop.ini": "",
}  # fmt: skip
INSIDE = {
    "image_folder": "train/cat",
    "paired_images": "train",
    "segmentation_folder": "train/masks",
}


@pytest.mark.parametrize("name", GOOD)
def test_files_that_are_not_read_are_listed(prepare, name, tmp_path):
    assert notes(prepare(name, GOOD[name] | NOTHING)) == []
    shutil.rmtree(tmp_path / "data")
    more = {"classes.csv": "", "docs/a.txt": "", "docs/b.txt": "", "docs/c.txt": ""}
    builder = prepare(name, GOOD[name] | more)
    assert notes(builder) == ["not used: classes.csv, docs/ (3 files)"]


@pytest.mark.parametrize("suffix", ["heic", "txt", "xml", "jp2", "npy"])
@pytest.mark.parametrize("name", GOOD)
def test_a_file_among_images_that_is_none_is_bad(prepare, name, suffix):
    other = f"{INSIDE[name]}/9.{suffix}"
    with pytest.raises(BadFilesError) as error:
        prepare(name, GOOD[name] | {other: b"other"})
    assert [e.file for e in error.value.errors] == [other]
    assert "expected an image, .jpg .jpeg .png .webp .bmp .tif" in str(error.value)
    assert len(prepare(name, {}, skip_bad=True).skipped) == 1


# ----------------------------- What mask values mean ----------------------------------


def mask_of(*values, mode="L"):
    """A mask that holds some values."""
    row = np.resize(np.uint8(values), SIZE[0])
    return Image.fromarray(np.stack([row] * SIZE[1])).convert(mode)


BINARY = [
    # masks of three photos, what they mean
    ([mask_of(0, 1)] * 3, [0, 1]),
    ([mask_of(0, 255)] * 3, [0, 1]),
    ([mask_of(0, 255, mode="1")] * 3, [0, 1]),
    ([mask_of(0, 255, mode="RGB")] * 3, [0, 1]),
    ([mask_of(0, 255), mask_of(0, 255, mode="1"), mask_of(0)], [0, 1]),
    ([mask_of(0, 1, 255)] * 3, [0, 1, 255]),
    ([mask_of(0, 1, 255), mask_of(0, 255), mask_of(0, 1)], [0, 1, 255]),
]


@pytest.mark.parametrize(("drawn", "meant"), BINARY)
def test_masks_of_two_classes_mean_what_was_drawn(prepare, load, drawn, meant):
    files = {}
    for split in ("train", "test"):
        for i, mask in enumerate(drawn):
            files |= {f"{split}/images/{i}.png": PHOTO, f"{split}/masks/{i}.png": mask}
    builder = prepare("segmentation_folder", files)
    assert np.unique(masks(load)).tolist() == meant
    said = [note for note in builder.notes if "white, 255, is thing" in note]
    assert bool(said) == (255 in np.unique(drawn[0].convert("L")) and 255 not in meant)


@pytest.mark.parametrize("mode", ["L", "1"])
def test_the_same_drawing_of_one_bit_and_of_eight_is_the_same(prepare, load, mode):
    drawn = np.uint8(np.random.default_rng(0).integers(0, 2, SIZE[::-1]) * 255)
    mask = Image.fromarray(drawn).convert(mode)
    files = at(["train/images", "test/images"]) | at(
        ["train/masks", "test/masks"], mask
    )
    prepare("segmentation_folder", files)
    np.testing.assert_array_equal(masks(load)[0], drawn // 255)


def test_white_may_be_declared_to_mean_no_class(prepare, load):
    files = at(["train/images", "test/images"])
    for split in ("train", "test"):
        for i, mask in enumerate((mask_of(0, 1), mask_of(0, 255), mask_of(0, 1))):
            files[f"{split}/masks/{i}.png"] = mask
    with pytest.raises(
        SourceError, match=r"hold both 1 .* and white.*ignore_label 255"
    ):
        prepare("segmentation_folder", files)
    prepare("segmentation_folder", files, ignore_label=255)
    assert np.unique(masks(load)).tolist() == [0, 1, 255]


FROM_ONE = [
    # values of the masks, classes, what is stored
    ((0, 1, 2), ["ground", "thing"], [0, 1, 255]),
    ((1, 2), ["ground", "thing"], [0, 1]),
    ((0, 1, 3), ["a", "b", "c"], [0, 2, 255]),
]


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize(("values", "names", "stored"), FROM_ONE)
def test_zero_may_be_declared_to_mean_no_class(
    prepare, load, values, names, stored, mode
):
    files = at(["train/images", "test/images"])
    files |= at(["train/masks", "test/masks"], mask_of(*values, mode=mode))
    builder = prepare("segmentation_folder", files, classes=names, ignore_label=0)
    assert "0 means no class and is stored as 255, and classes from 0" in builder.notes
    assert np.unique(masks(load)).tolist() == stored
    found = load("segmentation_folder")
    assert (found.class_names, found.ignore_label) == (tuple(names), 255)


CONTRADICTIONS = [
    # masks, options, what is said
    (mask_of(0, 255), {"ignore_label": 255},
     "hold only ground and the value 255, which is ignored, and no pixel of thing: .*"
     "declare two classes and no ignore_label"),
    (mask_of(0, 255, mode="1"), {"ignore_label": 255}, "no pixel of thing"),
    (mask_of(0, 255), {"classes": ["a", "b", "c"]}, "only a and the value 255.*b, c: "),
    (mask_of(255), {"classes": ["a", "b", "c"]}, "only pixels without a class and the"),
    (mask_of(7), {"ignore_label": 7}, "only pixels without a class and the value 7"),
    (mask_of(0), {}, "hold only ground, and no pixel of thing: store masks whose"),
    (mask_of(255), {}, "hold only thing, and no pixel of ground"),
    (mask_of(0, 255), {"ignore_label": 0}, "label values 255; expected only 0-2"),
    (mask_of(0, 1), {"ignore_label": 0},
     "only ground and the value 0, which is ignored, .*of the classes, from 1"),
    (mask_of(0, 1), {"classes": list(map(str, range(256)))}, "at most 255, got 256"),
    (mask_of(0, 1), {"classes": ["object"]}, "at least two.*as in background,object"),
]  # fmt: skip


@pytest.mark.parametrize(("mask", "options", "message"), CONTRADICTIONS)
def test_masks_that_contradict_their_classes_are_refused(
    prepare, mask, options, message, tmp_path
):
    files = at(["train/images", "test/images"]) | at(
        ["train/masks", "test/masks"], mask
    )
    with pytest.raises(UsageError, match=message):
        prepare("segmentation_folder", files, **options)
    assert data.prepared(tmp_path / "data") == []


def test_classes_without_a_pixel_are_named(prepare):
    files = at(["train/images", "test/images"])
    files |= at(["train/masks"], mask_of(0, 1, 3)) | at(["test/masks"], mask_of(0, 1))
    builder = prepare("segmentation_folder", files, classes=list("abcde"))
    assert builder.notes == [
        "no mask of train has a pixel of c, e",
        "no mask of test has a pixel of c, d, e",
    ]


def test_a_wholly_ignored_split_is_refused(prepare):
    files = at(["train/images", "test/images"])
    files |= at(["train/masks"], mask_of(0, 1)) | at(["test/masks"], mask_of(9))
    with pytest.raises(UsageError, match="masks of test hold only pixels without a"):
        prepare("segmentation_folder", files, ignore_label=9)


# --------------------------------- Names ----------------------------------------------


def test_names_composed_differently_are_the_same(prepare, load, tmp_path):
    prepare("image_folder", at([f"train/{NFC}", "train/b", f"test/{NFD}", "test/b"]))
    assert load("image_folder").class_names == ("b", NFC)
    assert len(load("image_folder").split("test")) == 6
    shutil.rmtree(tmp_path / "source")
    files = at(["test/images"]) | at(["test/masks"], MASK)
    files |= {f"train/images/{NFC}.png": PHOTO, f"train/masks/{NFD}.png": MASK}
    prepare("segmentation_folder", files)
    assert len(load("segmentation_folder").split("train")) == 1


def test_files_that_differ_only_in_composition_are_refused(prepare):
    files = {f"train/a/{NFC}.png": PHOTO, f"train/a/{NFD}.png": PHOTO}
    with pytest.raises(SourceError, match=r"two files .*café.*rename one"):
        prepare("image_folder", GOOD["image_folder"] | files)


@pytest.mark.parametrize("name", ["caf\udce9", "a\nb", " b", "a\x1b[31m"])
def test_a_class_whose_name_is_no_text_is_refused(prepare, name):
    with pytest.raises(SourceError, match=r"the class .*rename it") as error:
        prepare("image_folder", at([f"train/{name}", "train/b", "test/b"]))
    assert str(error.value).isprintable()


def test_file_names_are_shown_without_what_a_terminal_obeys(prepare):
    with pytest.raises(BadFilesError) as error:
        prepare("image_folder", GOOD["image_folder"] | {"train/cat/\x1b[31m.png": b""})
    assert "train/cat/\\x1b[31m.png" in str(error.value)


def test_names_that_no_font_can_draw_are_drawn_as_codes(
    prepare, tmp_path, monkeypatch, capsys
):
    prepare("image_folder", at(["train/猫", "train/é", "test/猫", "test/é"]))
    texts = []
    set_title = Axes.set_title
    monkeypatch.setattr(
        Axes, "set_title", lambda *a, **k: texts.append(a[1]) or set_title(*a, **k)
    )
    place, output = tmp_path / "data", tmp_path / "a.png"
    arguments = ("show", "image_folder/x", "--data-dir", place, "--output", output)
    monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
    command_line.main()
    capsys.readouterr()
    assert set(texts) == {readable("猫"), "é"}
    assert readable("猫") in ("猫", "\\u732b")
    with Image.open(output) as sheet:
        assert sheet.size > (100, 100)


@pytest.mark.parametrize("name", GOOD)
def test_the_command_shows_notes_and_classes_without_pixels(
    prepare, tmp_path, monkeypatch, capsys, name
):
    source = write(tmp_path / "source", GOOD[name] | {"list.csv": ""})
    arguments = ["prepare", f"{name}/x", "--source", source]
    arguments += ["--data-dir", tmp_path / "data"]
    if name == "segmentation_folder":
        arguments += ["--classes", "ground,thing,sky"]
    monkeypatch.setattr(sys, "argv", ["train.data", *map(str, arguments)])
    command_line.main()
    said = capsys.readouterr().out
    assert "note: not used: list.csv" in said
    if name == "segmentation_folder":
        assert "note: no mask of train has a pixel of sky" in said
        assert re.search(r"2 +sky +none +none", said)


# --------------------------- Classes without images -----------------------------------


def test_classes_without_images_are_named(prepare, tmp_path):
    builder = prepare("image_folder", at(["train/cat", "train/dog", "test/cat"]))
    assert builder.notes == ["no image of test is of dog"]
    empty = [tmp_path / "source" / "train" / name for name in "abc"]
    for folder in empty:
        folder.mkdir()
    shutil.rmtree(tmp_path / "data")
    with pytest.raises(BadFilesError, match=r"1 bad file: train/: 3 empty class fold"):
        prepare("image_folder", {})


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.9), (2, 0.9), (3, 0.99)])
def test_a_share_leaves_every_class_something_to_train_on(
    prepare, load, count, fraction
):
    files = several("cat/{}.png", PHOTO, 9) | several("dog/{}.png", PHOTO, count)
    prepare("image_folder", files, test_fraction=fraction)
    assert (load("image_folder").class_counts["train"] > 0).all()


def tiny(root, with_images, words):
    wnids = [f"n{i:02}" for i in range(20)]
    photo = Image.new("RGB", (64, 64))
    files = {"wnids.txt": "\n".join(wnids), "words.txt": words}
    for wnid in with_images:
        files[f"train/{wnid}/images/{wnid}_0.JPEG"] = photo
    for i in range(10):
        files[f"val/images/{i}.JPEG"] = photo
    lines = [f"{i}.JPEG\t{wnid}\t0" for i, wnid in enumerate(wnids[:10])]
    write(root, files | {"val/val_annotations.txt": "\n".join(lines)})


def test_some_classes_of_tiny_imagenet(tmp_path):
    words = "n03\tEgyptian cat, puss\nn05\tcrane\nn06\tcrane, tower\nn99\tx"
    source, place = tmp_path / "tiny", tmp_path / "data"
    tiny(source, ["n03", "n05", "n06", "n07", "n15"], words)
    with pytest.raises(BadFilesError) as error:
        data.prepare("tiny_imagenet", source=source, data_dir=place)
    assert len(error.value.errors) == 1
    said = "train/: no images of 15 of the 20 classes of wnids.txt (n00, n01, n02, n04"
    assert said in str(error.value)
    builder = data.prepare(
        "tiny_imagenet", source=source, data_dir=place, skip_bad=True
    )
    assert builder.notes == ["no image of validation is of n15"]
    found = data.load("tiny_imagenet", data_dir=place)
    names = ("Egyptian cat", "crane (n05)", "crane (n06)", "n07", "n15")
    assert found.class_names == names
    assert found.class_counts["train"].tolist() == [1] * 5
    assert found.class_counts["validation"].tolist() == [1, 1, 1, 1, 0]


# -------------------------------- Other archives --------------------------------------

OTHER = {
    "a.7z": b"7z\xbc\xaf\x27\x1c\0\4",
    "a.rar": b"Rar!\x1a\x07\1\0",
    "a.tar.zst": b"\x28\xb5\x2f\xfd\4\0",
    "a.tar.lz4": b"\x04\x22\x4d\x18\x64",
    "a.tar.Z": b"\x1f\x9d\x90",
    "a.tar.lzma": b"\x5d\0\0\x80\0\xff",
    "a.h5": b"\x89HDF\r\n\x1a\n",
    "a.parquet": b"PAR1\x15\0",
}


@pytest.mark.parametrize("name", OTHER)
def test_kinds_of_archives_that_are_not_read_are_named(tmp_path, name):
    write(tmp_path, {name: OTHER[name] + bytes(1000)})
    with pytest.raises(SourceError, match="which is not read: unpack it") as error:
        data.prepare(
            "image_folder/x", source=tmp_path / name, data_dir=tmp_path / "data"
        )
    assert "download" not in str(error.value)


def test_an_archive_with_decomposed_names_is_read(tmp_path):
    buffer = io.BytesIO()
    PHOTO.save(buffer, "PNG")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for folder in (f"train/{NFD}", "train/b", f"test/{NFC}", "test/b"):
            archive.writestr(f"{folder}/1.png", buffer.getvalue())
    place = tmp_path / "data"
    data.prepare("image_folder/x", source=tmp_path / "a.zip", data_dir=place)
    assert data.load("image_folder/x", data_dir=place).class_names == ("b", NFC)
