import math

import numpy as np
import pytest
from PIL import Image

from train import contact_sheet
from train.contact_sheet import (
    default_colors,
    labelled,
    overlay,
    paired,
    segmented,
)

RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)


def plain(color, height=10, width=10):
    return np.full((height, width, 3), color, np.uint8)


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def where(sheet, color):
    """Rows and columns of the pixels that have this very colour."""
    return np.nonzero((sheet == color).all(axis=-1))


def share(sheet, color):
    return (sheet == color).all(axis=-1).mean()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sheet.png"


def test_labelled_shows_images_in_reading_order(path):
    colors = [RED, GREEN, BLUE, (255, 0, 255), (0, 255, 255), (255, 255, 0)]
    labelled(map(plain, colors), range(6), "abcdef", path, title="six")
    sheet = read(path)
    rows, columns = zip(
        *([indices.mean() for indices in where(sheet, color)] for color in colors),
        strict=True,
    )
    assert columns[0] < columns[1] < columns[2]
    assert rows[2] < rows[3]
    assert columns[3:] == pytest.approx(columns[:3], abs=2)
    assert all(share(sheet, color) > 0.1 for color in colors)


def test_small_images_keep_crisp_pixels(path):
    board = np.where(np.indices((28, 28)).sum(axis=0)[..., None] % 2, RED, BLUE)
    labelled([np.uint8(board)] * 20, [0] * 20, ["board"], path, title="boards")
    sheet = read(path).astype(int)
    coloured = sheet[np.ptp(sheet, axis=-1) > 0]
    pure = (coloured == RED).all(axis=-1) | (coloured == BLUE).all(axis=-1)
    assert pure.mean() > 0.99


def test_grey_and_colour_images_of_any_size_share_a_sheet(path):
    images = [
        np.full((8, 8, 1), 90, np.uint8),
        plain(RED, 300, 500),
        plain(GREEN, 500, 300),
        plain(BLUE, 1, 1),
    ]
    labelled(images, [0, 1, 1, 0], ["grey", "colour"], path, title="mixed")
    sheet = read(path)
    for color in ((90,) * 3, RED, GREEN, BLUE):
        assert share(sheet, color) > 0.05
    for color, aspect in ((RED, 5 / 3), (GREEN, 3 / 5), (BLUE, 1)):
        rows, columns = where(sheet, color)
        assert np.ptp(columns) / np.ptp(rows) == pytest.approx(aspect, rel=0.03)


def test_long_names_are_cut_to_the_image(path):
    # Text of neighbours would run into the gap between the images.
    images, labels = [plain((90,) * 3)] * 12, [0] * 12
    labelled(images, labels, ["W" * 200], path, title="")
    long = read(path)
    labelled(images, labels, ["short"], path, title="")
    assert long.shape == pytest.approx(read(path).shape, abs=2)
    grey_columns = (long == 90).all(axis=-1).any(axis=0)
    first, last = np.nonzero(grey_columns)[0][[0, -1]]
    gaps = ~grey_columns[first:last]
    assert gaps.sum() > 10
    assert (long[:, first:last][:, gaps] == 255).all()


def test_shortened_text_fits_and_says_so():
    assert contact_sheet._shortened("cat", 1.0) == "cat"
    cut = contact_sheet._shortened("a very long name of a class", 1.0)
    assert cut.startswith("a very")
    assert cut.endswith("…")
    assert 0.8 < contact_sheet._text_width(cut) <= 1.0
    assert contact_sheet._shortened("cat", 0.0) == "…"


def test_overlay_mixes_colours_with_the_grey_image():
    image = np.array([[[0, 0, 0], [30, 60, 90], [255, 255, 255]]], np.uint8)
    colors = np.array([RED, (10, 20, 30)], np.uint8)
    result = overlay(image, np.array([[0, 1, 0]], np.uint8), colors)
    assert result.dtype == np.uint8
    assert result.tolist() == [[[166, 0, 0], [28, 34, 40], [255, 89, 89]]]


@pytest.mark.parametrize("ignore_label", [1, 255, -1])
def test_overlay_stripes_what_is_ignored(ignore_label):
    mask = np.full((6, 6), ignore_label)
    mask[:, :2] = 0
    result = overlay(np.zeros((6, 6, 1), np.uint8), mask, np.array([RED]), ignore_label)
    assert (result[:, :2] == (166, 0, 0)).all()
    diagonals = np.indices((6, 6)).sum(axis=0)[:, 2:]
    stripes = np.where(diagonals // 2 % 2, 166, 0)[..., None]
    np.testing.assert_array_equal(result[:, 2:], np.broadcast_to(stripes, (6, 4, 3)))


def test_overlay_refuses_values_without_a_class():
    with pytest.raises(IndexError):
        overlay(plain(RED, 1, 1), np.array([[2]]), default_colors(2), ignore_label=3)


def test_segmented_shows_the_photo_beside_its_mask(path):
    mask = np.zeros((40, 40), np.uint8)
    mask[20:] = 1
    photo = plain((100,) * 3, 40, 40)
    segmented([photo], [mask], "ab", path, title="halves", colors=[RED, GREEN])
    sheet = read(path)
    photo_rows, photo_columns = where(sheet, (100,) * 3)
    colours = overlay(photo, mask, np.array([RED, GREEN]))
    upper_rows, upper_columns = where(sheet, colours[0, 0])
    lower_rows, lower_columns = where(sheet, colours[-1, 0])
    assert photo_columns.max() < upper_columns.min()
    assert upper_rows.max() < lower_rows.min()
    assert np.ptp(upper_columns) == pytest.approx(np.ptp(photo_columns), abs=3)
    assert np.ptp(lower_columns) == pytest.approx(np.ptp(photo_columns), abs=3)
    assert 2 * np.ptp(upper_rows) == pytest.approx(np.ptp(photo_rows), abs=6)


def test_legend_has_the_classes_that_occur(path, monkeypatch):
    legends = []
    monkeypatch.setattr(
        contact_sheet, "_write_sheet", lambda *_, legend: legends.append(legend)
    )
    masks = [np.array([[3, 0]]), np.array([[0, 0], [0, 255]])]
    images = [np.zeros((*mask.shape, 3), np.uint8) for mask in masks]
    names = ["sky", "road", "car", "tree"]
    colors = [RED, GREEN, BLUE, (51, 102, 204)]
    for part in (slice(None), slice(1)):
        segmented(
            images[part],
            masks[part],
            names,
            path,
            title="",
            colors=colors,
            ignore_label=255,
        )
    with_ignored, without = legends
    assert [patch.get_label() for patch in with_ignored] == ["sky", "tree", "ignored"]
    assert [patch.get_label() for patch in without] == ["sky", "tree"]
    assert with_ignored[1].get_facecolor()[:3] == pytest.approx((0.2, 0.4, 0.8))
    assert with_ignored[2].get_hatch()


def test_legend_is_drawn_below_the_images(path):
    mask = np.array([[0, 2], [2, 0]])
    segmented(
        [plain((100,) * 3, 2, 2)] * 4,
        [mask] * 4,
        ["_background_", "absent", "there"],  # matplotlib hides some underscores
        path,
        title="legend",
        colors=[RED, GREEN, BLUE],
    )
    sheet = read(path)
    images_end = where(sheet, (100,) * 3)[0].max()
    assert where(sheet, RED)[0].min() > images_end
    assert where(sheet, BLUE)[0].min() > images_end
    assert len(where(sheet, GREEN)[0]) == 0


def test_paired_shows_the_input_left_of_the_target(path):
    pairs = [plain(RED), plain(RED)], [np.full((20, 20, 1), 90, np.uint8), plain(BLUE)]
    paired(*pairs, path, title="pairs")
    sheet = read(path)
    (reds,) = np.nonzero((sheet == RED).all(axis=-1).any(axis=0))
    (greys,) = np.nonzero((sheet == 90).all(axis=-1).any(axis=0))
    (blues,) = np.nonzero((sheet == BLUE).all(axis=-1).any(axis=0))
    assert reds.min() < greys.min()
    assert reds.min() < blues.min()
    assert share(sheet, RED) == pytest.approx(2 * share(sheet, BLUE), rel=0.02)


@pytest.mark.parametrize("count", [1, 2, 7, 16, 25, 36])
def test_sheets_have_a_size_to_look_at(path, count):
    images = [plain(RED, 28, 28)] * count
    labelled(images, [0] * count, ["red"], path, title="a title")
    height, width, _ = read(path).shape
    assert 300 <= width <= 1700
    assert 300 <= height <= 1700
    assert share(read(path), RED) > 0.6


def test_names_are_no_formulas_and_of_any_script(path):
    image = np.zeros((8, 8, 3), np.uint8)
    names = ["$5_10^$ x", "犬", "a$b"]
    contact_sheet.labelled([image] * 3, [0, 1, 2], names, path, title="$x$ 犬")
    masks = [np.arange(64, dtype=np.uint8).reshape(8, 8) % 3]
    contact_sheet.segmented([image], masks, names, path, title="1$")


def test_lengths_must_agree(path):
    images = [plain(RED)] * 2
    with pytest.raises(ValueError, match="zip"):
        labelled(images, [0], ["red"], path, title="")
    with pytest.raises(ValueError, match="zip"):
        segmented(images, [np.zeros((10, 10), int)], ["red"], path, title="")
    with pytest.raises(ValueError, match="zip"):
        paired(images, images[:1], path, title="")


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0, 8 / 3])
def test_layout_has_room_and_no_empty_row(aspect):
    for n in range(1, 65):
        rows, columns = contact_sheet._layout(n, aspect)
        assert (rows - 1) * columns < n <= rows * columns
        if n >= 9:
            assert n / (rows * columns) > 0.75
            assert abs(math.log(columns * aspect / rows / 1.5)) < 1.1


def test_default_colors_are_distinct_and_start_alike():
    colors = default_colors(256)
    assert colors.shape == (256, 3)
    assert colors.dtype == np.uint8
    assert len(np.unique(colors, axis=0)) == 256
    np.testing.assert_array_equal(default_colors(21), colors[:21])


def test_default_colors_of_few_classes_differ_much():
    neutral = [[0] * 3, [128] * 3, [255] * 3]
    colors = np.concatenate([neutral, default_colors(21)]).astype(float)
    distances = np.linalg.norm(colors[:, None] - colors, axis=-1)
    assert distances[~np.eye(24, dtype=bool)].min() >= 60
