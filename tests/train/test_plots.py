import math
import os
import re

import matplotlib
import numpy as np
import pytest
from matplotlib import style
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from train import plots
from train.plots import _common, images

RANDOM = np.random.default_rng(0)
NAN, INF = math.nan, math.inf
RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
NAMES = ["$5_10^$ x", "犬", "_a$b_"]  # no formulas, and of any script


def plain(color, height=10, width=10):
    return np.full((height, width, 3), color, np.uint8)


def gray(level, size=8):
    return np.full((size, size, 1), level, np.uint8)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def where(sheet, color):
    """Rows and columns of the pixels that have this very color."""
    return np.nonzero((sheet == color).all(axis=-1))


def share(sheet, color):
    return (sheet == color).all(axis=-1).mean()


def texts_of(artists):
    return [artist.get_text() for artist in artists]


def legend_of(owner):
    """The colors of the entries of a legend, by their label."""
    (legend,) = owner.legends if isinstance(owner, Figure) else [owner.get_legend()]
    colors = [
        handle.get_facecolor() if hasattr(handle, "get_hatch") else handle.get_color()
        for handle in legend.legend_handles
    ]
    return dict(zip(texts_of(legend.get_texts()), map(to_rgb, colors), strict=True))


def rgb(color):
    return pytest.approx(tuple(np.array(color) / 255))


@pytest.fixture
def path(tmp_path):
    return tmp_path / "figure.png"


@pytest.fixture
def figures(monkeypatch):
    """All figures that are saved, in their order."""
    found, savefig = [], Figure.savefig

    def spied(figure, *args, **options):
        found.append(figure)
        return savefig(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", spied)
    return found


# --------------------------- What holds for every figure ------------------------------


def draw_curves(path):
    names = {"losses": ["loss"], "metrics": ["accuracy"]}
    plots.save_curves(records((0, 1)), path, split="test", **names)


def draw_learning_curves(path):
    curves = {name: [learning_curve(3, 0.5)] * 2 for name in NAMES}
    plots.save_learning_curves(curves, path)


def draw_confusion_matrix(path):
    plots.save_confusion_matrix(np.arange(9).reshape(3, 3), NAMES, path)


def draw_bars(path):
    values = dict(zip(NAMES, (0.3, NAN, 1.0), strict=True))
    plots.save_bars(values, 0.65, path, label="$IoU$")


def draw_differences(path):
    found = [(name, (0.5, -0.1, 1.1), True) for name in NAMES]
    plots.save_differences({"$a$": found, "b": [], "c": found[:1]}, path)


def draw_profiles(path):
    plots.save_profiles({name: [1.0, 2.5, INF] for name in NAMES}, path)


def draw_images(path):
    columns = {"$a$ 犬": [gray(9)] * 3, "_b_": [gray(99)] * 3}
    plots.save_images(columns, path, captions=NAMES, title="$x$ 犬")


def draw_masks(path):
    mask = np.arange(64, dtype=np.uint8).reshape(8, 8) % 4
    masks = {"$a$": [mask], "犬": [mask]}
    plots.save_masks(
        [gray(9)], masks, path, class_names=NAMES, ignore_label=3, title="1$"
    )


EVERY = pytest.mark.parametrize(
    "draw",
    [
        draw_curves,
        draw_learning_curves,
        draw_confusion_matrix,
        draw_bars,
        draw_differences,
        draw_profiles,
        draw_images,
        draw_masks,
    ],
)


@EVERY
def test_figures_do_not_depend_on_the_settings(draw, tmp_path):
    draw(tmp_path / "usual.png")
    with matplotlib.rc_context():
        style.use("dark_background")
        matplotlib.rcParams.update({"font.size": 20, "savefig.bbox": "tight"})
        before = dict(matplotlib.rcParams)
        draw(tmp_path / "other.png")
        assert dict(matplotlib.rcParams) == before
    usual, other = (tmp_path / f"{name}.png" for name in ("usual", "other"))
    assert usual.read_bytes() == other.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["other.png", "usual.png"]


@EVERY
def test_figures_are_saved_whole_or_not_at_all(draw, path, monkeypatch):
    def full(figure, file, **_):
        file.write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(Figure, "savefig", full)
    with pytest.raises(OSError, match="no space"):
        draw(path)
    assert os.listdir(path.parent) == []
    path.write_bytes(b"an older figure")
    with pytest.raises(OSError, match="no space"):
        draw(path)
    assert path.read_bytes() == b"an older figure"
    assert os.listdir(path.parent) == [path.name]


def test_dollars_are_drawn(tmp_path):
    for name in ("a$b$", "ab"):
        plots.save_bars({name: 1.0}, 1.0, tmp_path / f"{len(name)}.png", label="")
    assert not np.array_equal(read(tmp_path / "4.png"), read(tmp_path / "2.png"))


def test_shortened_text_fits_and_says_so():
    assert _common.shortened("cat", 1.0) == "cat"
    cut = _common.shortened("a very long name of a class", 1.0)
    assert cut.startswith("a very")
    assert cut.endswith("…")
    assert 0.8 < _common.text_width(cut) <= 1.0
    assert _common.shortened("cat", 0.0) == "…"
    assert _common.shortened("", 0.0) == ""


# ------------------------------- Curves of runs ---------------------------------------


def records(seeds=(0,), epochs=range(1, 6), split="test"):
    return [
        {
            "seed": seed,
            "epoch": epoch,
            "train_loss": (3 + seed) / epoch,
            f"{split}_loss": (4 + seed) / epoch,
            "train_accuracy": 1 - (0.3 + 0.1 * seed) / epoch,
            f"{split}_accuracy": 1 - (0.5 + 0.1 * seed) / epoch,
            "train_gradient_norm": 1.0,
        }
        for seed in seeds
        for epoch in epochs
    ]


@pytest.fixture
def draw(figures, path):
    """Draws curves, and returns the left and the right axes."""

    def draw(records, losses=("loss",), metrics=("accuracy",), split="test"):
        plots.save_curves(records, path, losses=losses, metrics=metrics, split=split)
        height, width, _ = read(path).shape
        assert 800 < width < 1300
        assert 300 < height < 600
        return figures[-1].axes

    return draw


def data_of(line):
    return list(line.get_xdata()), pytest.approx(list(line.get_ydata()), nan_ok=True)


def labeled_lines(axes):
    return {x.get_label(): x for x in axes.lines if not x.get_label().startswith("_")}


def integer_ticks(axis):
    low, high = axis.get_view_interval()
    ticks = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
    assert ticks == [round(tick) for tick in ticks]
    return ticks


@pytest.mark.parametrize("split", ["test", "validation"])
def test_curves_of_one_seed(split, draw):
    for axes, name in zip(
        draw(records(split=split), split=split), ("loss", "accuracy"), strict=True
    ):
        lines = labeled_lines(axes)
        assert (
            list(lines) == [f"train {name}", f"{split} {name}"] == list(legend_of(axes))
        )
        assert len(axes.lines) == 2
        for part, dashes in (("train", "--"), (split, "-")):
            line = lines[f"{part} {name}"]
            values = [record[f"{part}_{name}"] for record in records(split=split)]
            assert data_of(line) == ([1, 2, 3, 4, 5], values)
            assert line.get_linestyle() == dashes
            assert line.get_marker() in ("", "None")
        assert axes.get_xlabel() == "epoch"
        assert axes.get_ylabel() == name
        assert integer_ticks(axes.xaxis) == [1, 2, 3, 4, 5]


def test_legends_hide_no_line(draw):
    for axes in draw(records((0, 1))):
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1
        assert legend.x1 <= axes.figure.bbox.x1


def test_curves_of_three_seeds_and_their_mean(draw, figures):
    shuffled = RANDOM.permutation(records((0, 1, 5))).tolist()
    for axes, name in zip(draw(shuffled), ("loss", "accuracy"), strict=True):
        for part, dashes in (("train", "--"), ("test", "-")):
            key = f"{part}_{name}"
            mean, *thin = sorted(
                (line for line in axes.lines if line.get_linestyle() == dashes),
                key=lambda line: -line.get_linewidth(),
            )
            each = [[r[key] for r in records((seed,))] for seed in (0, 1, 5)]
            assert [data_of(line) for line in thin] == [
                ([1, 2, 3, 4, 5], x) for x in each
            ]
            assert data_of(mean) == ([1, 2, 3, 4, 5], np.mean(each, axis=0).tolist())
            assert mean.get_linewidth() > 2 * max(x.get_linewidth() for x in thin)
            assert len({to_rgb(line.get_color()) for line in (mean, *thin)}) == 1
            assert mean.get_label() == f"{part} {name}"
        assert len(legend_of(axes)) == 2
    assert figures[-1].get_suptitle() == "thin lines: 3 seeds; thick lines: their mean"


def test_the_mean_is_drawn_where_all_seeds_have_a_value(draw):
    found = records((0, 1, 2))
    for record in found:
        if record["seed"] == 1 and record["epoch"] % 2 == 0:
            del record["test_loss"]
        if record["seed"] == 2 and record["epoch"] == 5:
            record["test_loss"] = INF  # diverged
    left, _ = draw(found)
    *thin, mean = (line for line in left.lines if line.get_linestyle() == "-")
    assert data_of(mean) == ([1, 3, 5], [5, 5 / 3, NAN])
    assert [list(line.get_xdata()) for line in thin] == [
        [1, 2, 3, 4, 5],
        [1, 3, 5],
        [1, 2, 3, 4, 5],
    ]
    assert math.isnan(thin[2].get_ydata()[-1])
    assert left.get_yscale() == "log"


def test_seeds_without_a_common_epoch_are_drawn_without_mean(draw):
    left, _ = draw(records((0,), (1, 2)) + records((1,), (3, 4)))
    assert [list(x.get_xdata()) for x in left.lines if x.get_linestyle() == "-"] == [
        [1, 2],
        [3, 4],
        [],
    ]
    assert list(legend_of(left)) == ["train loss", "test loss"]


def test_curves_of_two_networks_evaluated_now_and_then(draw):
    found = [
        {
            "seed": 0,
            "epoch": epoch,
            "train_generator_loss": 9.0,
            "train_discriminator_loss": 0.7,
            "train_generator_l1": 0.2,
            **({"test_l1": 0.3, "test_psnr": 20.0} if epoch % 2 else {}),
        }
        for epoch in (1, 2, 3)
    ]
    left, right = draw(
        found,
        losses=("generator_loss", "discriminator_loss", "loss"),
        metrics=("generator_l1", "discriminator_l1", "l1"),
    )
    assert list(labeled_lines(left)) == [
        "train generator loss",
        "train discriminator loss",
    ]
    assert list(labeled_lines(right)) == ["train generator l1", "test l1"]
    assert data_of(labeled_lines(right)["test l1"]) == ([1, 3], [0.3, 0.3])
    for axes in (left, right):
        colors = [to_rgb(line.get_color()) for line in axes.lines]
        assert len(set(colors)) == 2
        assert list(legend_of(axes).values()) == colors
    assert left.get_ylabel() == "loss"
    assert right.get_ylabel() == "l1"


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_one_epoch_is_drawn_as_dots(seeds, draw):
    for axes in draw(records(seeds, [1])):
        assert integer_ticks(axes.xaxis) == [1]
        for line in axes.lines:
            assert line.get_marker() == "o"
            assert list(line.get_markevery()) == [True]
        train, test = labeled_lines(axes).values()
        assert to_rgb(train.get_markerfacecolor()) == (1, 1, 1)
        assert to_rgb(test.get_markerfacecolor()) == to_rgb(test.get_color())


def test_what_stands_alone_between_gaps_is_a_dot(draw):
    found = records()
    found[1]["test_loss"] = found[3]["test_loss"] = NAN
    line = labeled_lines(draw(found)[0])["test loss"]
    assert list(line.get_markevery()) == [True, False, True, False, True]


def tick_labels(axis):
    low, high = axis.get_view_interval()
    ticks = zip(axis.get_ticklocs(), axis.get_ticklabels(), strict=True)
    return {t: label.get_text() for t, label in ticks if low <= t <= high}


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ((2.0, 1.0, 0.5), "log"),
        ((2.0, 1.0, 0.0), "linear"),
        ((2.0, -1.0, 0.5), "linear"),
        ((2.0, NAN, 0.5), "log"),
        ((NAN, NAN, NAN), "linear"),
        ((2.302, 2.301, 2.3), "log"),  # less than a step from 1 to 2 to 5
        ((1.8, 1.2, 0.9), "log"),  # one of the ticks at 1, 2 and 5
        ((9.0, 4.0, 2.2), "log"),
        ((1e3, 1e-6, 1e-12), "log"),  # many decades
    ],
)
def test_losses_are_on_a_log_scale_if_all_are_positive(values, scale, draw):
    found = [
        {"seed": 0, "epoch": epoch, "test_loss": value, "test_accuracy": 0.5}
        for epoch, value in enumerate(values, 1)
    ]
    left, right = draw(found)
    assert left.get_yscale() == scale
    assert right.get_yscale() == "linear"
    labels = tick_labels(left.yaxis)
    assert len(labels) >= 2
    for place, label in labels.items():
        assert float(label.replace("\N{MINUS SIGN}", "-")) == pytest.approx(place)


def test_nothing_is_drawn_of_no_records(draw):
    for axes in draw([]):
        assert not axes.lines
        assert axes.get_legend() is None


# ------------------------------ Curves of studies -------------------------------------


def learning_curve(epochs, accuracy, gradients=1):
    return [
        {
            "epoch": epoch,
            "gradient_evaluations": 10 * gradients * epoch,
            "seconds": 2.5 * gradients * epoch,
            "accuracy": accuracy + 0.01 * epoch,
        }
        for epoch in range(1, epochs + 1)
    ]


def test_learning_curves_have_mean_and_range_over_seeds(figures, path):
    curves = {
        "sgd": [learning_curve(3, accuracy) for accuracy in (0.5, 0.6, 0.9)],
        "pugd": [learning_curve(3, accuracy, 2) for accuracy in (0.7, 0.8)],
    }
    plots.save_learning_curves(curves, path, baselines=["sgd"])
    (figure,) = figures
    panels = figure.axes
    steps = [1, 2, 3], [10, 20, 30], [2.5, 5, 7.5]
    for axes, x, label in zip(
        panels, steps, ("epoch", "gradient evaluations", "seconds"), strict=True
    ):
        assert axes.get_xlabel() == label
        sgd, pugd = axes.lines
        assert data_of(sgd) == (x, [97 / 3, 94 / 3, 91 / 3])
        factor = 1 if label == "epoch" else 2
        assert data_of(pugd) == ([factor * i for i in x], [24, 23, 22])
        assert (sgd.get_linestyle(), pugd.get_linestyle()) == ("--", "-")
        for line, band, low, high in zip(
            axes.lines, axes.collections, (9, 19), (49, 29), strict=True
        ):
            corners = band.get_paths()[0].vertices
            start = corners[corners[:, 0] == line.get_xdata()[0], 1]
            assert start.min() == pytest.approx(low)
            assert start.max() == pytest.approx(high)
            assert to_rgb(band.get_facecolor()[0]) == to_rgb(line.get_color())
            assert 0 < band.get_alpha() < 0.5
    assert panels[0].get_ylabel() == "test error (%)"
    assert panels[0].get_yscale() == panels[2].get_yscale() == "log"
    assert panels[0].get_ylim() == panels[2].get_ylim()
    assert integer_ticks(panels[0].xaxis) == [1, 2, 3]
    colors = [to_rgb(line.get_color()) for line in panels[0].lines]
    assert legend_of(figure) == dict(zip(("sgd", "pugd"), colors, strict=True))
    assert "lowest" in figure.get_suptitle()


def test_learning_curves_end_with_the_shortest_seed(figures, path):
    seeds = [learning_curve(3, 0.5), learning_curve(2, 0.7)]
    plots.save_learning_curves({"sgd": seeds, "failed": []}, path)
    (line,) = figures[0].axes[0].lines
    assert data_of(line) == ([1, 2], [39, 38])
    assert list(legend_of(figures[0])) == ["sgd"]


def test_learning_curves_of_another_score_and_one_seed(figures, path):
    curve = [{**point, "iou": 1.0} for point in learning_curve(1, 0.5)]
    plots.save_learning_curves({"a": [curve]}, path, score="iou", ylabel="1 - IoU (%)")
    axes = figures[0].axes[0]
    assert data_of(axes.lines[0]) == ([1], [0])
    assert axes.lines[0].get_marker() == "o"
    assert axes.get_yscale() == "linear"  # zero has no logarithm
    assert axes.get_ylabel() == "1 - IoU (%)"
    assert figures[0].get_suptitle() == ""


def test_learning_curves_of_nothing(figures, path):
    plots.save_learning_curves({}, path)
    assert not figures[0].legends
    assert read(path).shape[1] > 1000


# ----------------------------- Scores of classes --------------------------------------


@pytest.mark.parametrize("classes", [2, 12, 13, 60])
def test_confusion_matrices_of_few_and_many_classes(classes, figures, path):
    names = [f"cost in $ {i}" for i in range(classes)]  # no formula
    matrix = RANDOM.integers(0, 30_000, (classes, classes))
    matrix[0] = 0  # a class without an example
    plots.save_confusion_matrix(matrix, names, path)
    assert max(read(path).shape) < 1300
    axes = figures[0].axes[0]
    shares = np.asarray(axes.images[0].get_array())
    assert (shares[0] == 0).all()
    assert shares[1:] == pytest.approx(matrix[1:] / matrix[1:].sum(axis=1)[:, None])
    assert axes.get_xlabel() == "predicted class"
    assert axes.get_ylabel() == "true class"
    for axis in (axes.xaxis, axes.yaxis):
        if classes <= 40:
            assert texts_of(axis.get_ticklabels()) == names
        else:
            assert integer_ticks(axis)[:2] != [0, 1]
    assert len(axes.texts) == (np.count_nonzero(matrix) if classes <= 12 else 0)


def test_the_counts_stand_in_their_cells(figures, path):
    matrix = np.array([[0, 9_999], [1_234_567, 12_345]])
    plots.save_confusion_matrix(matrix, ["a", "b"], path)
    axes = figures[0].axes[0]
    cells = {
        text.get_position(): (text.get_text(), text.get_color()) for text in axes.texts
    }
    assert cells == {
        (1, 0): ("9999", "white"),
        (0, 1): ("1M", "white"),
        (1, 1): ("12k", "black"),
    }
    # The cell at the upper right is as dark as can be, and the upper left white.
    pixels = read(path)
    box = axes.get_window_extent()
    dark = where(pixels, np.rint(255 * np.array(axes.images[0].cmap(1.0)[:3])))
    assert len(dark[0]) > 0.2 * box.width * box.height


def test_long_names_of_classes_are_cut(figures, path):
    plots.save_confusion_matrix(np.eye(2, dtype=int), ["W" * 300, ""], path)
    assert max(read(path).shape) < 1000
    (cut, _) = texts_of(figures[0].axes[0].get_xticklabels())
    assert re.fullmatch("W+…", cut)
    plots.save_bars({"W" * 300: 0.5}, 0.5, path, label="IoU")
    assert texts_of(figures[1].axes[0].get_yticklabels()) == [cut]


def test_bars_say_what_has_no_value(figures, path):
    values = {"cat $1": 0.3, "dog": NAN, "cow": 1.0}
    plots.save_bars(values, 0.65, path, label="IoU")
    axes = figures[0].axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.3, 0, 1]
    places = [bar.get_y() + bar.get_height() / 2 for bar in axes.patches]
    assert places == pytest.approx(list(axes.get_yticks()))
    assert [text.get_position()[1] for text in axes.texts] == pytest.approx(places)
    assert texts_of(axes.texts) == ["0.300", "none", "1.000"]
    assert texts_of(axes.get_yticklabels()) == list(values)
    assert axes.yaxis_inverted()  # the first value is at the top
    assert axes.get_xlabel() == "IoU"
    assert list(axes.lines[0].get_xdata()) == [0.65, 0.65]
    assert list(legend_of(figures[0])) == ["mean 0.650"]


def test_differences_have_their_intervals_and_a_filled_dot_if_clear(figures, path):
    found = {
        "sam": [("one", (0.5, 0.2, 0.8), True), ("two", (-1.0, -3.0, 1.0), False)],
        "pugd": [("two", (0.25, -0.5, 1.0), False)],
    }
    plots.save_differences(found, path)
    (figure,) = figures
    panels = [axes for axes in figure.axes if axes.get_title()]
    for axes, (name, studies) in zip(panels, found.items(), strict=True):
        assert axes.get_title() == name
        labels = [label.get_text() for label in axes.get_yticklabels()]
        assert labels == [study for study, _, _ in studies]
        top_first = axes.get_ylim()
        assert top_first[0] > top_first[1]
        *drawn, zero = map(data_of, axes.lines)
        assert zero[0] == [0, 0]
        dots = [line for line in axes.lines if line.get_marker() == "o"]
        for place, (_, (mean, low, high), clear) in enumerate(studies):
            assert drawn[2 * place : 2 * place + 2] == [
                ([low, high], [place, place]),
                ([mean], [place]),
            ]
            filled = dots[place].get_markerfacecolor() == dots[place].get_color()
            assert filled == clear


def test_profiles_rise_where_another_study_is_reached(figures, path):
    ratios = {"sgd": [1.0, 3.0, INF, 1.0], "sam": [INF, INF, INF, INF]}
    plots.save_profiles(ratios, path)
    (figure,) = figures
    (axes,) = figure.axes
    end = 1.1 * 3.0
    sgd, sam = axes.lines
    assert data_of(sgd) == ([1, 1, 1, 3, end], [0, 0.25, 0.5, 0.75, 0.75])
    assert data_of(sam) == ([1, end], [0, 0])
    assert sgd.get_drawstyle() == "steps-post"
    assert list(legend_of(figure)) == ["sgd", "sam"]


def test_bars_of_many_classes_have_a_bounded_size(path):
    values = {f"class {i}": i / 150 for i in range(150)}
    plots.save_bars(values, NAN, path, label="IoU")
    height, width, _ = read(path).shape
    assert width < 800
    assert height < 3000


# --------------------------------- Images ---------------------------------------------


def save_labeled(images, captions, path, **options):
    plots.save_images({"image": images}, path, captions=captions, **options)


def test_images_are_in_reading_order(path):
    colors = [RED, GREEN, BLUE, (255, 0, 255), (0, 255, 255), (255, 255, 0)]
    save_labeled(map(plain, colors), "abcdef", path, title="six")
    sheet = read(path)
    rows, columns = zip(
        *([indices.mean() for indices in where(sheet, color)] for color in colors),
        strict=True,
    )
    assert columns[0] < columns[1] < columns[2]
    assert rows[2] < rows[3]
    assert columns[3:] == pytest.approx(columns[:3], abs=2)
    assert all(share(sheet, color) > 0.1 for color in colors)


def test_captions_stand_above_their_images(figures, path):
    captions = ["cat", "$dog$\nsgd: cow 97 %", ""]
    levels = [50, 100, 150]
    save_labeled(map(gray, levels), captions, path, title="three $")
    (figure,) = figures
    assert figure.get_suptitle() == "three $"
    assert [axes.get_title() for axes in figure.axes] == captions
    assert [axes.images[0].get_array().max() for axes in figure.axes] == levels
    title = figure._suptitle.get_window_extent()
    for axes in figure.axes:
        text, picture = axes.title.get_window_extent(), axes.get_window_extent()
        assert text.y0 >= picture.y1
        assert text.y1 <= title.y0


def test_captions_of_two_lines_overlap_no_image(figures, path):
    save_labeled([gray(50)] * 12, ["a\nb\nc"] * 12, path)
    axes = figures[0].axes
    columns = sum(a.get_position().y0 == axes[0].get_position().y0 for a in axes)
    for upper, lower in zip(axes, axes[columns:], strict=False):
        assert lower.title.get_window_extent().y1 < upper.get_window_extent().y0


def test_small_images_keep_crisp_pixels(path):
    board = np.where(np.indices((28, 28)).sum(axis=0)[..., None] % 2, RED, BLUE)
    save_labeled([np.uint8(board)] * 20, ["board"] * 20, path, title="boards")
    sheet = read(path).astype(int)
    colored = sheet[np.ptp(sheet, axis=-1) > 0]
    pure = (colored == RED).all(axis=-1) | (colored == BLUE).all(axis=-1)
    assert pure.mean() > 0.99


def test_white_images_have_visible_edges(path):
    white = plain((255,) * 3, 40, 40)
    plots.save_images({"input": [white], "output": [white]}, path)
    drawn = read(path).min(axis=-1) < 250
    assert (drawn.mean(axis=1) > 0.9).sum() >= 2  # upper and lower edges
    sides = np.flatnonzero(drawn.mean(axis=0) > 0.8)
    assert (np.diff(sides, prepend=-9) > 1).sum() == 4  # left and right edges of both


def test_gray_and_color_images_of_any_size_share_a_sheet(path):
    found = [gray(90), plain(RED, 300, 500), plain(GREEN, 500, 300), plain(BLUE, 1, 1)]
    save_labeled(found, ["gray", "color", "color", "gray"], path, title="mixed")
    sheet = read(path)
    for color in ((90,) * 3, RED, GREEN, BLUE):
        assert share(sheet, color) > 0.05
    for color, aspect in ((RED, 5 / 3), (GREEN, 3 / 5), (BLUE, 1)):
        rows, columns = where(sheet, color)
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(aspect, rel=0.03)


@pytest.mark.parametrize("shape", [(1, 2000), (2000, 1)])
def test_sheets_of_long_images_have_a_bounded_size(shape, path):
    save_labeled([plain(RED, *shape)] * 3, "abc", path)
    assert max(read(path).shape) < 1700


def test_long_captions_are_cut_to_the_image(path):
    # Text of neighbors would run into the gap between the images.
    found = [plain((90,) * 3)] * 12
    save_labeled(found, ["W" * 200] * 12, path)
    long = read(path)
    save_labeled(found, ["short"] * 12, path)
    assert long.shape == pytest.approx(read(path).shape, abs=2)
    gray_columns = (long == 90).all(axis=-1).any(axis=0)
    first, last = np.nonzero(gray_columns)[0][[0, -1]]
    gaps = ~gray_columns[first:last]
    assert gaps.sum() > 10
    gaps[1:-1] &= gaps[:-2] & gaps[2:]  # without the edges of the images
    assert (long[:, first:last][:, gaps] == 255).all()


@pytest.mark.parametrize("count", [1, 2, 7, 16, 25, 36])
def test_sheets_have_a_size_to_look_at(path, count):
    save_labeled([plain(RED, 28, 28)] * count, ["red"] * count, path, title="a title")
    height, width, _ = read(path).shape
    assert 300 <= width <= 1700
    assert 300 <= height <= 1700
    assert share(read(path), RED) > 0.6


def test_a_sheet_has_a_largest_number_of_examples(path, figures, monkeypatch):
    monkeypatch.setattr(images, "MOST_EXAMPLES", 3)
    save_labeled(map(gray, (10, 20, 30, 40)), "abcd", path, title="t")
    (figure,) = figures
    assert figure.get_suptitle() == "t (the first 3 of 4)"
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0, 8 / 3])
def test_layout_has_room_and_no_empty_row(aspect):
    for n in range(1, 65):
        rows, columns = images._layout(n, aspect)
        assert (rows - 1) * columns < n <= rows * columns
        if n >= 9:
            assert n / (rows * columns) > 0.75
            assert abs(math.log(columns * aspect / rows / 1.5)) < 1.1


def test_layout_leaves_room_for_text():
    rows, columns = images._layout(256, 1.0, 1.2)
    assert 12.5 / columns >= 1.2
    assert (rows - 1) * columns < 256 <= rows * columns
    assert images._layout(3, 20.0, 24.0) == (3, 1)


def test_columns_are_side_by_side_under_their_names(path, figures):
    shades = {"input": 0, "$original$": 80, "random gradient": 160}
    columns = {
        name: np.full((2, 30, 60, 3), shade, np.uint8) for name, shade in shades.items()
    }
    columns["truth"] = np.full((2, 30, 60, 1), 240, np.uint8)
    plots.save_images(columns, path)
    pixels = read(path)
    height, width = pixels.shape[:2]
    # The middles of the cells, from left to right in the lower row.
    row = pixels[int(0.75 * height)]
    middles = [row[int((i + 0.5) / 4 * width)].tolist() for i in range(4)]
    assert middles == [[0] * 3, [80] * 3, [160] * 3, [240] * 3]
    assert width / height > 3
    titles = [axes.get_title() for axes in figures[0].axes]
    assert titles == [*columns, "", "", "", ""]


def test_the_input_is_left_of_its_target(path):
    columns = {
        "input": [plain(RED), plain(RED)],
        "target": [np.full((20, 20, 1), 90, np.uint8), plain(BLUE)],
    }
    plots.save_images(columns, path, title="pairs")
    sheet = read(path)
    (reds,) = np.nonzero((sheet == RED).all(axis=-1).any(axis=0))
    (grays,) = np.nonzero((sheet == 90).all(axis=-1).any(axis=0))
    (blues,) = np.nonzero((sheet == BLUE).all(axis=-1).any(axis=0))
    assert reds.min() < grays.min()
    assert reds.min() < blues.min()
    assert share(sheet, RED) == pytest.approx(2 * share(sheet, BLUE), rel=0.02)


def test_lengths_must_agree(path):
    two = [plain(RED)] * 2
    with pytest.raises(ValueError, match="1 captions for 2 examples"):
        save_labeled(two, ["red"], path)
    with pytest.raises(ValueError, match="zip"):
        plots.save_images({"a": two, "b": two[:1]}, path)
    masks = {"mask": [np.zeros((10, 10), int)]}
    with pytest.raises(ValueError, match="zip"):
        plots.save_masks(two, masks, path, class_names=["red"])
    assert not path.exists()


# --------------------------------- Masks ----------------------------------------------


def test_masks_are_beside_their_photo(path):
    mask = np.zeros((40, 40), np.uint8)
    mask[20:] = 1
    plots.save_masks(
        [plain((100,) * 3, 40, 40)],
        {"mask": [mask]},
        path,
        class_names="ab",
        colors=np.array([RED, GREEN], np.uint8),
    )
    sheet = read(path)
    photo_rows, photo_columns = where(sheet, (100,) * 3)
    rows, columns = where(sheet, RED)
    upper = rows <= photo_rows.max()  # below is the legend
    rows, columns = rows[upper], columns[upper]
    lower_rows, lower_columns = where(sheet, GREEN)
    lower = lower_rows <= photo_rows.max()
    lower_rows, lower_columns = lower_rows[lower], lower_columns[lower]
    assert photo_columns.max() < columns.min()
    assert rows.max() < lower_rows.min()
    assert np.ptp(columns) == pytest.approx(np.ptp(photo_columns), abs=3)
    assert np.ptp(lower_columns) == pytest.approx(np.ptp(photo_columns), abs=3)
    assert 2 * np.ptp(rows) == pytest.approx(np.ptp(photo_rows), abs=6)


@pytest.mark.parametrize("colors", [None, np.array([RED, GREEN, BLUE], np.uint8)])
def test_masks_and_their_legend_have_the_same_colors(colors, path, figures):
    truth = np.array([[0, 2], [2, 0]])
    plots.save_masks(
        [plain((1, 2, 3), 2, 2)] * 4,
        {"truth": [truth] * 4, "prediction": [truth[::-1]] * 4},
        path,
        class_names=["_background_", "absent", "$there$"],
        colors=colors,
    )
    first, _, third = plots.class_colors(3) if colors is None else colors
    (figure,) = figures
    assert [axes.get_title() for axes in figure.axes[:3]] == [
        "photo",
        "truth",
        "prediction",
    ]
    photo, painted, predicted = (a.images[0].get_array() for a in figure.axes[:3])
    assert (photo == (1, 2, 3)).all()
    assert (painted == [[first, third], [third, first]]).all()
    assert (predicted == painted[::-1]).all()
    assert legend_of(figure) == {"_background_": rgb(first), "$there$": rgb(third)}
    # The legend is drawn below the images, in the same colors.
    sheet = read(path)
    images_end = where(sheet, (1, 2, 3))[0].max()
    for color in (first, third):
        rows, _ = where(sheet, color)
        assert rows.min() < images_end
        assert (rows > images_end).sum() > 50


def test_legend_has_the_classes_that_occur():
    masks = [np.array([[3, 0]]), np.array([[0, 0], [0, 255]])]
    names = ["sky", "road", "car", "tree"]
    colors = np.array([RED, GREEN, BLUE, (51, 102, 204)], np.uint8)
    legend = images.class_legend(masks, names, colors, 255)
    assert [patch.get_label() for patch in legend] == ["sky", "tree", "ignored"]
    assert legend[1].get_facecolor()[:3] == pytest.approx((0.2, 0.4, 0.8))
    assert legend[2].get_hatch()
    legend = images.class_legend(masks[:1], names, colors, None)
    assert [patch.get_label() for patch in legend] == ["sky", "tree"]


@pytest.mark.parametrize("ignore_label", [1, 255, -1])
def test_ignored_pixels_are_striped(ignore_label):
    mask = np.full((6, 6), ignore_label)
    mask[:, :2] = 0
    colors = np.array([RED], np.uint8)
    found = images.paint(mask, colors, ignore_label)
    assert found.dtype == np.uint8
    assert (found[:, :2] == RED).all()
    diagonals = np.indices((6, 6)).sum(axis=0)[:, 2:]
    stripes = np.where(diagonals // 2 % 2, 240, 100)[..., None]
    np.testing.assert_array_equal(found[:, 2:], np.broadcast_to(stripes, (6, 4, 3)))
    (light, dark) = images.class_legend([mask[:, 2:]], [], colors, ignore_label)[0], 100
    assert light.get_facecolor()[:3] == rgb((240,) * 3)
    assert light.get_edgecolor()[:3] == rgb((dark,) * 3)


def test_the_photo_shows_through_its_mask(path, figures):
    image = np.array([[[0, 0, 0], [30, 60, 90], [255, 255, 255]]], np.uint8)
    colors = np.array([RED, (10, 20, 30)], np.uint8)
    mask = np.array([[0, 1, 0]], np.uint8)
    found = images.paint(mask, colors, None, image)
    assert found.dtype == np.uint8
    assert found.tolist() == [[[166, 0, 0], [28, 34, 40], [255, 89, 89]]]
    found = images.paint(np.array([[255, 255, 255]]), colors, 255, image)
    assert found.tolist() == [[[65] * 3, [86] * 3, [245] * 3]]
    plots.save_masks(
        [image], {"mask": [mask]}, path, class_names="ab", colors=colors, blend=True
    )
    shown = figures[0].axes[1].images[0].get_array()
    assert shown.tolist() == images.paint(mask, colors, None, image).tolist()


def test_values_without_a_class_are_refused():
    with pytest.raises(IndexError):
        images.paint(np.array([[2]]), plots.class_colors(2), 3)


# --------------------------------- Colors ---------------------------------------------


def test_colors_are_distinct_and_a_long_palette_begins_with_the_shorter():
    colors = plots.class_colors(256)
    assert colors.shape == (256, 3)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 256
    for n in (0, 1, 8, 9, 21):
        np.testing.assert_array_equal(plots.class_colors(n), colors[:n])


def test_colors_of_few_classes_differ_much():
    neutral = [[0] * 3, [128] * 3, [255] * 3]
    colors = np.concatenate([neutral, plots.class_colors(21)]).astype(float)
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1)
    assert distances[~np.eye(24, dtype=bool)].min() >= 60


def test_colors_repeat_beyond_the_largest_palette():
    colors = plots.class_colors(1000)
    assert len(np.unique(colors, axis=0)) == 520
    np.testing.assert_array_equal(colors[520:], colors[:480])
