"""Sheets of images, and masks painted in the colors of their classes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
from jaxtyping import Integer, UInt8
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from train.plots._common import (
    FONT_SIZE,
    GAP,
    Colors,
    class_colors,
    new_figure,
    shortened,
    text_width,
)

Image: TypeAlias = UInt8[np.ndarray, "height width channels"]  # 1 or 3 channels
Mask: TypeAlias = Integer[np.ndarray, "height width"]

MOST_EXAMPLES = 256  # on one sheet

# Lengths in inches.
_SHEET_WIDTH = 12.5
_LARGEST_IMAGE = 2.5
_LINE = 0.15  # the height of a line of text
_READABLE = 1.2  # the least width of an image with text above it

_FRAME = "0.8"  # the gray of the line around an image, which may be white
_STRIPES = (240, 100)  # gray levels of ignored pixels


# -------------------------------- Sheets ----------------------------------------------


def save_images(
    columns: Mapping[str, Iterable[Image]],
    path: Path,
    *,
    title: str = "",
    captions: Sequence[str] = (),
    legend: Sequence[Patch] = (),
) -> None:
    """Draws examples in a grid. Each example is one image, or several side by side.

    The images may differ in size; small ones keep crisp pixels. Text that is wider than
    its image is cut. Of more than `MOST_EXAMPLES` examples the first are drawn, and the
    title says so.

    Args:
      columns: the images of all examples by name, for instance all inputs and all
        targets. If there are several columns, their names stand above them.
      path: the PNG file to write.
      title: the title of the sheet.
      captions: a text of one or more lines for each example, to write above it.
      legend: the entries of the legend below the images.

    Raises:
      ValueError: if the columns and captions differ in length.

    Examples:
      >>> import tempfile
      >>> image = np.zeros((9, 9, 3), np.uint8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "sheet.png"
      ...     save_images({"input": [image], "target": [255 - image]}, path)
      ...     path.read_bytes()[1:4]
      b'PNG'
    """
    examples = list(zip(*columns.values(), strict=True))
    captions = captions or [""] * len(examples)
    if len(captions) != len(examples):
        raise ValueError(f"{len(captions)} captions for {len(examples)} examples")
    if len(examples) > MOST_EXAMPLES:
        title += f" (the first {MOST_EXAMPLES} of {len(examples):,})"
        examples, captions = examples[:MOST_EXAMPLES], captions[:MOST_EXAMPLES]
    headers = list(columns) if len(columns) > 1 else [""]
    caption_lines = max(caption.count("\n") + (caption != "") for caption in captions)
    header_lines = int(len(columns) > 1)

    # A cell holds one example.
    sizes = [image.shape[:2] for example in examples for image in example]
    aspect = float(np.median([width / height for height, width in sizes]))
    aspect = len(columns) * min(max(aspect, 1 / 4), 4)
    least = len(columns) * (_READABLE if caption_lines or header_lines else 0)
    rows, across = _layout(len(examples), aspect, least)
    width = (_SHEET_WIDTH + GAP) / across - GAP
    width = max(least, min(width, _LARGEST_IMAGE * len(columns)))
    height = width / aspect
    above = GAP + _LINE * caption_lines

    # The figure is the grid alone. Title and legend lie outside of it, where the crop
    # to what is drawn finds them.
    size = across * (width + GAP) - GAP, rows * (height + above) - above
    with new_figure(path, size, crop=True) as figure:
        top = above + _LINE * header_lines
        shown = shortened(title, _SHEET_WIDTH)
        figure.suptitle(shown, y=1 + top / size[1], va="bottom", size=FONT_SIZE + 2)
        _add_legend(figure, legend, y=-GAP / size[1])
        grid = figure.add_gridspec(rows, across, left=0, right=1, bottom=0, top=1)
        grid.update(wspace=GAP / width, hspace=above / height)
        for i, (example, caption) in enumerate(zip(examples, captions, strict=True)):
            cell = grid[i].subgridspec(1, len(columns), wspace=0.02)
            for j, (image, header) in enumerate(zip(example, headers, strict=True)):
                axes = figure.add_subplot(cell[j])
                axes.imshow(np.broadcast_to(image, (*image.shape[:2], 3)))
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set(color=_FRAME, linewidth=0.5)
                lines = [header] if i < across else []
                lines += caption.split("\n") if j == 0 else []
                lines = [shortened(x, width / len(columns)) for x in lines if x]
                axes.set_title("\n".join(lines), size=FONT_SIZE, pad=4)


def save_masks(
    images: Sequence[Image],
    masks: Mapping[str, Sequence[Mask]],
    path: Path,
    *,
    class_names: Sequence[str],
    colors: Colors | None = None,
    ignore_label: int | None = None,
    blend: bool = False,
    title: str = "",
) -> None:
    """Draws photos beside their masks, with a legend of the classes that occur.

    Args:
      images: the photos.
      masks: the masks of all photos by name, for instance the true and the predicted
        ones.
      path: the PNG file to write.
      class_names: the names of the classes 0, 1, ...
      colors: the colors of the classes; `class_colors` if None.
      ignore_label: the value of pixels without a class.
      blend: whether the photo shows through its masks.
      title: the title of the sheet.

    Raises:
      ValueError: if there are not as many masks as photos.
      IndexError: if a mask has a value that is no class and not `ignore_label`.
    """
    colors = class_colors(len(class_names)) if colors is None else colors
    columns: dict[str, Sequence[Image]] = {"photo": images}
    for name, found in masks.items():
        columns[name] = [
            paint(mask, colors, ignore_label, image if blend else None)
            for image, mask in zip(images, found, strict=True)
        ]
    drawn = [mask for found in masks.values() for mask in found]
    legend = class_legend(drawn, class_names, colors, ignore_label)
    save_images(columns, path, title=title, legend=legend)


def _layout(n: int, aspect: float, least: float = 0) -> tuple[int, int]:
    """Returns rows and columns for n cells at least `least` inches wide.

    The sheet is near 3:2, and its last row as full as can be.
    """

    def flaws(columns: int) -> float:
        rows = math.ceil(n / columns)
        shape = abs(math.log(columns * aspect / rows / 1.5))
        return shape + 4 * (1 - n / (rows * columns))

    most = max(1, min(n, int((_SHEET_WIDTH + GAP) / (least + GAP))))
    columns = min(range(1, most + 1), key=flaws)
    return math.ceil(n / columns), columns


def _add_legend(figure: Figure, entries: Sequence[Patch], y: float) -> None:
    """Puts a legend below the figure, in as few rows as its width allows."""
    if not entries:
        return
    room = max(figure.get_figwidth() / 3, _READABLE)
    labels = [shortened(str(entry.get_label()), room) for entry in entries]
    entry_width = 0.6 + max(map(text_width, labels))
    rows = math.ceil(len(entries) / max(1, int(figure.get_figwidth() / entry_width)))
    figure.legend(
        entries,
        labels,
        ncols=math.ceil(len(entries) / rows),
        loc="upper center",
        bbox_to_anchor=(0.5, y),
        borderaxespad=0,
        frameon=False,
        handlelength=1.4,
    )


# --------------------------------- Masks ----------------------------------------------


def paint(
    mask: Mask, colors: Colors, ignore_label: int | None, image: Image | None = None
) -> Image:
    """Paints a mask in the colors of its classes; ignored pixels get gray stripes.

    Args:
      mask: the class of each pixel.
      colors: the color of each class.
      ignore_label: the value of pixels without a class.
      image: an image of the same size that shows through in gray.

    Returns:
      The painted mask, of 3 channels.

    Raises:
      IndexError: if the mask has a value that is no class and not `ignore_label`.

    Examples:
      >>> red_and_blue = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
      >>> paint(np.array([[0, 1]]), red_and_blue, 255).tolist()
      [[[255, 0, 0], [0, 0, 255]]]
    """
    rows, columns = np.indices(mask.shape)
    width = max(2, min(mask.shape) // 60)
    stripes = np.where((rows + columns) // width % 2, *_STRIPES)[..., None]
    ignored = np.isin(mask, [] if ignore_label is None else [ignore_label])
    painted = colors[np.where(ignored, 0, mask)].astype(float)
    painted = np.where(ignored[..., None], stripes, painted)
    if image is not None:
        painted = 0.65 * painted + 0.35 * image.mean(axis=-1, keepdims=True)
    return np.asarray(np.rint(painted), np.uint8)


def class_legend(
    masks: Sequence[Mask],
    class_names: Sequence[str],
    colors: Colors,
    ignore_label: int | None,
) -> list[Patch]:
    """Returns legend entries for the classes that occur, and for ignored pixels."""
    values = np.unique(np.concatenate([np.unique(mask) for mask in masks])).tolist()
    legend = [
        Patch(facecolor=colors[value] / 255, edgecolor="gray", label=class_names[value])
        for value in values
        if value != ignore_label
    ]
    if ignore_label in values:
        light, dark = (str(level / 255) for level in _STRIPES)
        striped = Patch(facecolor=light, edgecolor=dark, hatch="//////")
        striped.set_label("ignored")
        legend.append(striped)
    return legend
