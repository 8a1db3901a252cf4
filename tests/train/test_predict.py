"""What users do with a finished run: the commands predict, export and compare."""

import csv
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from safetensors.numpy import load_file

import train.__main__ as command_line
from tests.shared import one_device_mesh, squeezed
from train import data, plots

SIZE = (64, 64)
TWO_EPOCHS = ("--epochs", 2, "--checkpoint-minutes", 0, "--ema", 0.5)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train", *map(str, arguments)])
    command_line.main()


def write_image(path, shape, rng, high=256):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(path)


pytestmark = pytest.mark.usefixtures("thin")


@pytest.fixture(scope="module")
def runs(thin, tmp_path_factory):
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
    common = ("--batch-size", 4, "--data-dir", base / "prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.program.make_mesh", one_device_mesh)
        for task, dataset, more in (
            ("classification", "image_folder/tiny", ("--epochs", 1, "--seeds", 2)),
            ("segmentation", "segmentation_folder/tiny", TWO_EPOCHS),
            ("translation", "paired_images/tiny", ("--epochs", 1)),
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
    assert [row["image"] for row in rows] == [
        str(photo.with_name("other.jpg")),
        str(photo),
    ]
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
    assert (output / "photo-drawn.png").exists()


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
    assert found[0]["fc.weight"].shape == (2, 16)
    assert (found[0]["fc.weight"] != found[1]["fc.weight"]).any()


def test_the_moving_average_is_exported_if_there_is_one(runs, tmp_path, monkeypatch):
    folder, path = runs / "segmentation", tmp_path / "weights.safetensors"
    run(monkeypatch, "export", folder, "--output", path)
    exported = load_file(path)
    saved = folder / "checkpoints" / "seed0" / "2"
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
        (("predict", "{runs}/classification", "{runs}"), "no image .*name the folders"),
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
            ("compare", "{runs}/segmentation", "{runs}/segmentation"),
            "different labels, got segmentation, segmentation",
        ),
        (
            ("compare", "{runs}/segmentation", "--labels", "a", "b"),
            "labels must name all 1 runs",
        ),
        (("compare", "{runs}/segmentation", "--count", "0"), "at least 1, got 0"),
        (("compare",), "name the folders of the runs"),
        (("predict", "{runs}/segmentation"), "name the image files, or folders"),
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


WRONG_PATHS = {
    "missing.png": "there is no such file or folder",
    "missing/": "there is no such file or folder",
    "empty/": "there is no image (.jpg, ",
    "texts/": "there is no image (.jpg, ",
    "hidden/": "there is no image (.jpg, ",
    "folders/": "in this folder; name the folders in it",
    "notes.txt": "not a file of a known kind; known: .jpg, ",
    "no_suffix": "not a file of a known kind; known: .jpg, ",
    "broken.png": "not an image",
    "cut.png": "damaged",
    "empty.png": "not an image",
    "hidden/._x.jpg": "not an image",
    "with_broken/": "bad.jpg: not an image",
    "locked.png": "Permission denied",
}


@pytest.fixture
def wrong_paths(tmp_path):
    """Makes the files and folders of the table, but for the missing ones."""
    base = tmp_path / "wrong"
    for folder in ("empty", "folders/a"):
        (base / folder).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("folders/a/x.png", "with_broken/good.png", "cut.png", "locked.png"):
        write_image(base / name, (20, 20, 3), rng)
    contents = {"texts/notes.txt": b"a", "hidden/._x.jpg": b"a", "notes.txt": b"a"}
    contents |= {"no_suffix": b"a", "broken.png": b"a", "empty.png": b""}
    contents |= {"with_broken/bad.jpg": b"a"}
    contents["cut.png"] = (base / "cut.png").read_bytes()[:300]
    for name, content in contents.items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_bytes(content)
    (base / "locked.png").chmod(0)
    return base


def test_every_wrong_path_is_named_and_nothing_is_predicted(
    runs, photo, wrong_paths, tmp_path, monkeypatch
):
    expected = dict(WRONG_PATHS)
    if os.access(wrong_paths / "locked.png", os.R_OK):  # root reads all
        del expected["locked.png"]
    output = tmp_path / "out"
    predict = ("predict", runs / "classification")
    paths = [wrong_paths / name for name in expected]
    with pytest.raises(SystemExit) as raised:
        run(monkeypatch, *predict, photo, *paths, photo, "--output", output)
    head, *lines = raised.value.code.split("\n  ")
    assert head == "error: nothing was predicted, as some paths have no image:"
    for (name, message), line in zip(expected.items(), lines, strict=True):
        assert line.startswith(str(wrong_paths / name))
        assert message in line
        with pytest.raises(SystemExit) as raised:
            run(monkeypatch, *predict, wrong_paths / name, "--output", output)
        assert raised.value.code == f"error: {line}"
    assert not output.exists()


@pytest.mark.parametrize("command", ["predict", "export"])
def test_a_last_checkpoint_that_is_gone_is_missed(
    runs, photo, tmp_path, monkeypatch, capsys, command
):
    more = (photo,) if command == "predict" else ()
    for task, lost, said in (
        ("segmentation", None, ""),
        (
            "segmentation",
            "seed0/2",
            "trained for 2 steps, but its last checkpoint is of",
        ),
        (
            "classification",
            "seed0",
            "seed 0 of {} has no checkpoint any more: taking s",
        ),
        ("classification", "seed1", ""),
    ):
        folder = tmp_path / f"{task}-{lost}".replace("/", "-")
        shutil.copytree(runs / task, folder)
        if lost:
            shutil.rmtree(folder / "checkpoints" / lost)
        run(monkeypatch, command, folder, *more)
        lines = capsys.readouterr().out.splitlines()
        warnings = [line for line in lines if line.startswith("warning: ")]
        assert len(warnings) == bool(said)
        assert all(said.format(folder) in line for line in warnings)


def test_what_is_skipped_in_a_folder_is_named(runs, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "photos"
    write_image(folder / "x.png", (20, 20, 3), np.random.default_rng(0))
    for name in ("a.txt", "b.txt", "c.txt", "d.txt", "._x.png"):
        (folder / name).write_text("no image")
    run(monkeypatch, "predict", runs / "classification", folder)
    printed = capsys.readouterr().out
    assert f"{folder}: skipped a.txt, b.txt, c.txt and 1 more: no image" in printed
    assert printed.count("x.png: ") == 1


# Some of them differ in folder, suffix or case alone, or are called as a result.
ALIKE = ("a/x.png", "b/x.png", "b/c/X.jpg", "y.png", "y.jpg", "z.png", "z-classes.png")


@pytest.mark.parametrize("task", ["classification", "segmentation", "translation"])
def test_files_of_one_name_have_results_of_their_own(
    runs, tmp_path, monkeypatch, capsys, task
):
    monkeypatch.chdir(tmp_path)
    for name in ALIKE:
        write_image(tmp_path / name, (20, 20, 3), np.random.default_rng(0))
    files = [*ALIKE, "z.png"]  # one of them twice
    run(monkeypatch, "predict", runs / task, *files, "--output", "out")
    with Path("out", "predictions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(row["image"] for row in rows) == ALIKE
    made = {path.name for path in Path("out").iterdir()} - {"predictions.csv"}
    stems = ("a-x", "b-x", "c-X", "y-png", "y-jpg", "z", "z-classes")
    assert (
        made
        == {
            "classification": {"predictions.png"},
            "segmentation": {
                f"{s}-{what}.png" for s in stems for what in ("drawn", "classes")
            },
            "translation": {f"{s}.png" for s in stems},
        }[task]
    )
    named = {text for row in rows for key, text in row.items() if key != "image"}
    assert task == "classification" or named == made
    lines = capsys.readouterr().out.splitlines()
    assert tuple(line.partition(": ")[0] for line in lines[:-1]) == ALIKE


def test_a_pair_is_noticed(runs, photo, tmp_path, monkeypatch, capsys):
    pair = tmp_path / "pair.png"
    write_image(pair, (70, 141, 3), np.random.default_rng(0))
    run(monkeypatch, "predict", runs / "translation", pair, photo)
    printed = squeezed(capsys.readouterr().out)
    warning = "warning: this seems to be a side-by-side pair"
    assert squeezed(f"{pair}: {warning}") in printed
    assert printed.count(squeezed(warning)) == 1
    assert squeezed("cut out its left half") in printed
    run(monkeypatch, "predict", runs / "classification", pair)
    assert "warning" not in capsys.readouterr().out


def test_results_appear_when_all_are_complete(runs, photo, tmp_path, monkeypatch):
    output = tmp_path / "out"
    second = tmp_path / "second.png"
    write_image(second, (20, 20, 3), np.random.default_rng(0))
    save = Image.Image.save

    def fail_on_second(image, path, *more, **options):
        save(image, path, *more, **options)
        if Path(path).stem == "second":
            raise OSError("no space left on device")

    arguments = ("predict", runs / "translation", photo, second, "--output", output)
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", fail_on_second)
        with pytest.raises(SystemExit, match="no space left"):
            run(patch, *arguments)
    assert list(output.iterdir()) == []
    run(monkeypatch, *arguments)
    made = {path.name for path in output.iterdir()}
    assert made == {"photo.png", "second.png", "predictions.csv"}


def test_results_land_where_they_are_looked_for(runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder = runs / "translation"
    run(monkeypatch, "compare", folder)
    assert (runs / "comparison.png").exists()
    run(monkeypatch, "compare", folder, "--output", "made/here.png")
    run(monkeypatch, "compare", folder, "--output", "made")
    run(monkeypatch, "export", runs / "classification", "--output", "made")
    path = "made/new/w.safetensors"
    run(monkeypatch, "export", runs / "classification", "--output", path)
    made = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    expected = {
        "here.png",
        "comparison.png",
        "weights.safetensors",
        "new/w.safetensors",
    }
    assert made == {f"made/{name}" for name in expected}
    printed = squeezed(capsys.readouterr().out)
    assert squeezed(f"written: {runs / 'comparison.png'}") in printed


def test_a_damaged_image_is_named(runs, tmp_path, monkeypatch):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(SystemExit, match=r"broken\.png: not an image"):
        run(monkeypatch, "predict", runs / "classification", path)
