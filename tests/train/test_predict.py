"""What users do with a finished run: the commands predict, export and compare."""

import csv
import re
import shutil
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file

import train.__main__ as command_line
from tests.shared import one_device_mesh
from train import data, plots

SIZE = (64, 64)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    command_line.main()


def write_image(path, shape, rng, high=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(path)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains each task on a few random images."""
    base = tmp_path_factory.mktemp("runs")
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for i in range(4):
            photo = base / "photos" / split / "images" / f"{i}.png"
            write_image(photo, (*SIZE, 3), rng)
            mask = base / "photos" / split / "masks" / f"{i}.png"
            write_image(mask, SIZE, rng, high=3)
            write_image(base / "pairs" / split / f"{i}.png", (64, 128, 3), rng)
            write_image(base / "classes" / split / "a" / f"{i}.png", (*SIZE, 3), rng)
            write_image(base / "classes" / split / "b" / f"{i}.png", (*SIZE, 3), rng)
    place = {"data_dir": base / "prepared"}
    data.prepare("image_folder/tiny", source=base / "classes", **place)
    names = {"classes": ["x", "y", "z"]}
    data.prepare("segmentation_folder/tiny", source=base / "photos", **names, **place)
    data.prepare("paired_images/tiny", source=base / "pairs", **place)
    common = ("--epochs", 1, "--batch-size", 4, "--data-dir", base / "prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.program.make_mesh", one_device_mesh)
        for task, dataset, more in (
            ("classification", "image_folder/tiny", ("--seeds", 2)),
            ("segmentation", "segmentation_folder/tiny", ("--ema", 0.5)),
            ("translation", "paired_images/tiny", ()),
        ):
            arguments = (task, "--dataset", dataset, *common, *more)
            run(patch, *arguments, "--run-dir", base / task)
    yield base
    shutil.rmtree(base)


def form_of(path):
    """Size and color mode of an image file."""
    with Image.open(path) as image:
        return image.size, image.mode


@pytest.fixture
def photo(tmp_path):
    path = tmp_path / "photo.png"
    write_image(path, (50, 90, 3), np.random.default_rng(1))
    return path


def test_classes_of_files_and_of_folders(runs, photo, tmp_path, monkeypatch, capsys):
    write_image(photo.with_name("other.jpg"), (64, 64, 3), np.random.default_rng(2))
    photo.with_name("notes.txt").write_text("no image")
    output = tmp_path / "out"
    run(monkeypatch, "predict", runs / "classification", tmp_path, "--output", output)
    printed = capsys.readouterr().out
    with (output / "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["image"] for row in rows] == ["other", "photo"]
    for row in rows:
        shares = {name: float(row[name]) for name in ("a", "b")}
        assert sum(shares.values()) == pytest.approx(1, abs=1e-5)
        assert row["class"] == max(shares, key=shares.get)
        assert f"{row['class']} {100 * shares[row['class']]:.0f} %" in printed
    assert form_of(output / "predictions.png")[0][0] > 300


def test_masks_have_the_size_of_the_photo(runs, photo, tmp_path, monkeypatch):
    output = tmp_path / "out"
    run(monkeypatch, "predict", runs / "segmentation", photo, "--output", output)
    with Image.open(output / "photo-classes.png") as classes:
        assert classes.size == (90, 50)
        assert set(np.unique(classes)) <= {0, 1, 2}
    assert (output / "photo.png").exists()


def test_translations_have_the_size_of_the_photo(runs, photo, monkeypatch):
    run(monkeypatch, "predict", runs / "translation", photo)
    made = runs / "translation" / "predictions" / "photo.png"
    assert form_of(made) == ((90, 50), "RGB")


def test_exported_weights_are_those_of_the_seed(runs, tmp_path, monkeypatch, capsys):
    found = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.safetensors"
        run(monkeypatch, "export", runs / "classification", "--seed", seed)
        run(
            *(monkeypatch, "export", runs / "classification"),
            *("--seed", seed, "--output", path),
        )
        found.append(load_file(path))
    assert "written:" in capsys.readouterr().out
    assert found[0]["fc.weight"].shape == (2, 64)
    assert (found[0]["fc.weight"] != found[1]["fc.weight"]).any()


def test_the_moving_average_is_exported_if_there_is_one(runs, tmp_path, monkeypatch):
    folder, path = runs / "segmentation", tmp_path / "weights.safetensors"
    run(monkeypatch, "export", folder, "--output", path)
    exported = load_file(path)
    saved = folder / "checkpoints" / "seed0" / "1" / "state"
    with ocp.PyTreeCheckpointer() as checkpointer:
        names = checkpointer.metadata(saved).item_metadata.tree
        args = dict.fromkeys(names, ocp.RestoreArgs(restore_type=np.ndarray))
        arrays = checkpointer.restore(saved, restore_args=args)
    (bias,) = (name for name in exported if name.endswith("head.bias"))
    for part, is_it in ((".ema[0]", True), (".params", False)):
        (found,) = (
            array
            for name, array in arrays.items()
            if part in name and name.endswith("['head']['bias']")
        )
        assert (exported[bias] == found).all() == is_it, part


def test_each_network_is_exported(runs, monkeypatch):
    run(monkeypatch, "export", runs / "translation")
    for name, first, inputs in (
        ("generator", "down.0.conv.weight", 3),
        ("discriminator", "layers.0.conv.weight", 6),
    ):
        weights = load_file(runs / "translation" / f"weights-{name}.safetensors")
        assert weights[first].shape[1:] == (inputs, 4, 4)


def test_prediction_and_export_need_no_dataset(runs, photo, tmp_path, monkeypatch):
    prepared = runs / "prepared"
    prepared.rename(runs / "elsewhere")
    try:
        output = tmp_path / "out"
        run(monkeypatch, "predict", runs / "translation", photo, "--output", output)
        assert (output / "photo.png").exists()
        path = tmp_path / "weights.safetensors"
        run(monkeypatch, "export", runs / "segmentation", "--output", path)
        assert path.exists()
    finally:
        (runs / "elsewhere").rename(prepared)


@pytest.mark.parametrize("task", ["segmentation", "translation"])
def test_pictures_of_runs_are_drawn_side_by_side(
    runs, tmp_path, monkeypatch, task, capsys
):
    path = tmp_path / "comparison.png"
    drawn = []
    save_images, save_masks = plots.save_images, plots.save_masks

    def record_images(columns, path, **options):
        drawn.append(columns)
        save_images(columns, path, **options)

    def record_masks(photos, masks, path, **options):
        drawn.append({"photo": photos, **masks})
        save_masks(photos, masks, path, **options)

    monkeypatch.setattr(plots, "save_images", record_images)
    monkeypatch.setattr(plots, "save_masks", record_masks)
    labels = ("--labels", "plain", "scale_by_random")
    options = ("--count", 2, "--output", path)
    run(monkeypatch, "compare", runs / task, runs / task, *labels, *options)
    assert capsys.readouterr().out.endswith(f"written: {path}\n")
    (columns,) = drawn
    titles = tuple(columns)
    if task == "segmentation":
        assert titles == ("photo", "truth", "plain", "scale_by_random")
    else:
        assert titles == ("input", "plain", "scale_by_random", "truth")
    assert {len(images) for images in columns.values()} == {2}
    np.testing.assert_array_equal(columns["plain"], columns["scale_by_random"])
    assert (np.asarray(columns["plain"]) != np.asarray(columns["truth"])).any()
    (width, height), _ = form_of(path)
    assert width > 1.2 * height  # four columns, two rows, and maybe a legend


def test_classes_found_by_runs_are_written_above_the_photos(
    runs, tmp_path, monkeypatch
):
    path = tmp_path / "comparison.png"
    drawn = []
    draw = plots.save_images

    def record(columns, path, *, captions):
        drawn.append((columns["image"], captions))
        draw(columns, path, captions=captions)

    monkeypatch.setattr(plots, "save_images", record)
    folder = runs / "classification"
    options = ("--count", 3, "--output", path)
    run(monkeypatch, "compare", folder, folder, "--labels", "plain", "sam", *options)
    ((images, titles),) = drawn
    assert len(images) == len(titles) == 3
    for title in titles:
        truth, plain, sam = title.split("\n")
        assert truth in ("a", "b")
        assert re.fullmatch(r"plain: [ab] \d+ %", plain)
        assert sam.removeprefix("sam: ") == plain.removeprefix("plain: ")
    assert form_of(path)[0][0] > 300


def test_runs_are_called_by_their_folders(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    drawn = []
    monkeypatch.setattr(
        plots, "save_images", lambda columns, path: drawn.append(columns)
    )
    run(monkeypatch, "compare", runs / "translation")
    (columns,) = drawn
    assert tuple(columns) == ("input", "translation", "truth")
    assert len(columns["translation"]) == 4  # there are fewer examples than six


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("predict", "{runs}", "{photo}"), "not the folder of a training run"),
        (("predict", "{runs}/classification", "{runs}/none.png"), "none.png"),
        (("predict", "{runs}/classification", "{runs}"), "there is no image"),
        (("export", "{runs}/segmentation", "--seed", "7"), "has the seeds 0, not 7"),
        (
            ("compare", "{runs}/classification", "{runs}/segmentation"),
            "only for the same task and dataset",
        ),
        (
            ("compare", "{runs}/segmentation", "{runs}/translation"),
            "only for the same task and dataset",
        ),
        (
            ("compare", "{runs}/segmentation", "--labels", "a", "b"),
            "labels must name all 1 runs",
        ),
        (("compare", "{runs}/segmentation", "--count", "0"), "at least 1, got 0"),
        (
            ("predict", "{runs}/classification", "{photo}", "{photo}"),
            "several images are called photo",
        ),
    ],
)
def test_what_cannot_be_done_says_why(
    runs, photo, tmp_path, monkeypatch, arguments, message
):
    places = {"runs": runs, "photo": photo}
    arguments = [argument.format(**places) for argument in arguments]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments)


def test_a_damaged_image_is_named(runs, tmp_path, monkeypatch):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"broken\.png: not an image"):
        run(monkeypatch, "predict", runs / "classification", path)
