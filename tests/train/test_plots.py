import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from train import plots

RANDOM = np.random.default_rng(0)


def records(split="test"):
    return [
        {
            "epoch": epoch,
            "train_loss": 3 / epoch,
            f"{split}_loss": 3.5 / epoch,
            "train_accuracy": 1 - 0.3 / epoch,
            f"{split}_accuracy": 1 - 0.5 / epoch,
            "train_gradient_norm": 1.0,
        }
        for epoch in range(1, 6)
    ]


def size_of(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert len(image.getcolors(1 << 24)) > 2  # something is drawn
        return image.size


@pytest.fixture
def drawn(monkeypatch):
    """Labels and values of all lines that are drawn."""
    lines, plot = {}, Axes.plot

    def spied(axes, x, y, *args, label, **options):
        lines[label] = (tuple(x), tuple(y))
        return plot(axes, x, y, *args, label=label, **options)

    monkeypatch.setattr(Axes, "plot", spied)
    return lines


@pytest.mark.parametrize("split", ["test", "validation"])
def test_curves_of_a_split(split, drawn, tmp_path):
    path = tmp_path / "curves.png"
    plots.save_curves(records(split), "accuracy", path, split=split)
    names = ("train loss", f"{split} loss", "train accuracy", f"{split} accuracy")
    assert set(drawn) == set(names)
    epochs, losses = drawn[f"{split} loss"]
    assert epochs == (1, 2, 3, 4, 5)
    assert losses[0] == 3.5
    assert size_of(path)[0] > 800


def test_curves_of_two_networks_evaluated_now_and_then(drawn, tmp_path):
    found = [
        {
            "epoch": epoch,
            "train_generator_loss": 9.0,
            "train_discriminator_loss": 0.7,
            "train_generator_l1": 0.2,
            **({"test_l1": 0.3, "test_psnr": 20.0} if epoch % 2 else {}),
        }
        for epoch in (1, 2, 3)
    ]
    plots.save_curves(found, "l1", tmp_path / "curves.png")
    assert set(drawn) == {
        "train generator loss",
        "train discriminator loss",
        "train generator l1",
        "test l1",
    }
    assert drawn["test l1"] == ((1, 3), (0.3, 0.3))


def test_curves_of_one_epoch(tmp_path):
    plots.save_curves(records()[:1], "accuracy", tmp_path / "curves.png")
    size_of(tmp_path / "curves.png")


@pytest.mark.parametrize("classes", [2, 12, 13, 60])
def test_confusion_matrices_of_few_and_many_classes(classes, tmp_path):
    path = tmp_path / "confusion.png"
    names = [f"cost in $ {i}" for i in range(classes)]  # no formula
    matrix = RANDOM.integers(0, 30_000, (classes, classes))
    matrix[0] = 0  # a class without an example
    plots.save_confusion_matrix(matrix, names, path)
    assert max(size_of(path)) < 1300


def test_bars_say_what_has_no_value(tmp_path):
    values = {"cat $1": 0.3, "dog": float("nan"), "cow": 1.0}
    plots.save_bars(values, 0.65, tmp_path / "bars.png", label="IoU")
    size_of(tmp_path / "bars.png")


def test_comparison_lays_images_out_in_rows_and_columns(tmp_path):
    path = tmp_path / "comparison.png"
    shades = ("input", 0), ("original gradient", 80), ("random gradient", 160)
    columns = [
        (name, np.full((2, 30, 60, 3), shade, np.uint8)) for name, shade in shades
    ]
    grey = np.full((2, 30, 60, 1), 240, np.uint8)
    plots.save_comparison(path, [*columns, ("truth", grey)])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    height, width = pixels.shape[:2]
    # The middles of the cells, from left to right in the lower row.
    row = pixels[int(0.75 * height)]
    middles = [row[int((i + 0.5) / 4 * width)].tolist() for i in range(4)]
    assert middles == [[0] * 3, [80] * 3, [160] * 3, [240] * 3]
    assert width / height > 3


def test_comparison_needs_as_many_images_in_each_column(tmp_path):
    columns = [("a", np.zeros((2, 4, 4, 3))), ("b", np.zeros((1, 4, 4, 3)))]
    with pytest.raises(ValueError, match="zip"):
        plots.save_comparison(tmp_path / "comparison.png", columns)


def test_masks_are_painted_and_ignored_pixels_hatched():
    colors = plots.class_colors(3)
    mask = np.zeros((20, 20), np.uint8)
    mask[:10] = 2
    mask[:, :10] = 255
    found = plots.painted(mask, colors, 255)
    assert found.dtype == np.uint8
    assert (found[:10, 10:] == colors[2]).all()
    assert (found[10:, 10:] == colors[0]).all()
    shades = np.unique(found[:, :10].reshape(-1, 3), axis=0)
    assert shades.tolist() == [[160] * 3, [220] * 3]


@pytest.mark.parametrize("classes", [3, 10, 40])
def test_colors_differ(classes):
    colors = plots.class_colors(classes)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == classes


def test_legend_has_the_classes_that_occur():
    masks = [np.array([[0, 2]]), np.array([[0, 255]])]
    legend = plots.class_legend(masks, ("a", "b", "c"), plots.class_colors(3), 255)
    assert [patch.get_label() for patch in legend] == ["a", "c", "ignored"]
