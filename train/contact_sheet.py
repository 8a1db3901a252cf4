"""Contact sheets: pictures of a dataset's examples, to look at before training.

Small images keep crisp pixels; images of one sheet may differ in size and be grey
(height, width, 1) or in colour (height, width, 3), of dtype uint8.
"""

import bisect
import math
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # not pyplot, which would need a display
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath

Images = Sequence[np.ndarray] | np.ndarray

# Lengths on the sheet in inches.
_WIDTH = 15.0
_LARGEST_IMAGE = 3.0
_GAP = 0.12
_LINE = 0.24
_DPI = 100
_FONT_SIZE = 10  # points


def labelled(
    images: Images,
    labels: Sequence[int] | np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    title: str,
) -> None:
    """Writes a PNG of images, each with the name of its class above it.

    Args:
      images: n images.
      labels: n ints, indices into `class_names`.
      class_names: names; shown cut short where they are wider than an image.
      path: of the PNG file to write.
      title: of the sheet.

    Raises:
      ValueError: if there are not as many labels as images.

    Examples:
      >>> import tempfile
      >>> images = np.zeros((2, 9, 9, 1), np.uint8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "sheet.png"
      ...     labelled(images, [1, 0], ["cat", "dog"], path, title="in the dark")
      ...     path.read_bytes()[1:4]
      b'PNG'
    """
    examples, captions = [], []
    for image, label in zip(images, labels, strict=True):
        examples.append([image])
        captions.append(class_names[label])
    _write_sheet(examples, path, title, captions=captions)


def segmented(
    images: Images,
    masks: Sequence[np.ndarray] | np.ndarray,
    class_names: Sequence[str],
    path: str | Path,
    *,
    title: str,
    colors: Sequence[Sequence[int]] | np.ndarray | None = None,
    ignore_label: int | None = None,
) -> None:
    """Writes a PNG of photos, each beside its mask, with a legend of the classes.

    The legend has the classes that occur, and "ignored" with stripes if that occurs.

    Args:
      images: n images.
      masks: n int arrays (height, width), each of its image's size.
      class_names: names of the classes 0, 1, ...
      path: of the PNG file to write.
      title: of the sheet.
      colors: RGB, 0 to 255, of each class; `default_colors` if None.
      ignore_label: mask value of the pixels that have no class.

    Raises:
      ValueError: if there are not as many masks as images.
      IndexError: if a mask has a value that is no class and not `ignore_label`.

    Examples:
      >>> import tempfile
      >>> image, mask = np.zeros((9, 9, 3), np.uint8), np.eye(9, dtype=np.uint8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "sheet.png"
      ...     segmented([image], [mask], ["sky", "pole"], path, title="one pole")
      ...     path.read_bytes()[1:4]
      b'PNG'
    """
    colors = default_colors(len(class_names)) if colors is None else np.array(colors)
    pairs = [
        [image, overlay(image, mask, colors, ignore_label)]
        for image, mask in zip(images, masks, strict=True)
    ]
    values = np.unique(np.concatenate([np.unique(mask) for mask in masks])).tolist()
    legend = [
        Patch(color=colors[value] / 255, label=class_names[value])
        for value in values
        if value != ignore_label
    ]
    if ignore_label in values:
        legend.append(Patch(facecolor="white", hatch="//////", label="ignored"))
    _write_sheet(pairs, path, title, legend=legend)


def paired(inputs: Images, targets: Images, path: str | Path, *, title: str) -> None:
    """Writes a PNG of pairs of images, the input on the left of its target.

    Args:
      inputs: n images.
      targets: n images.
      path: of the PNG file to write.
      title: of the sheet.

    Raises:
      ValueError: if there are not as many targets as inputs.

    Examples:
      >>> import tempfile
      >>> image = np.zeros((9, 9, 3), np.uint8)
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "sheet.png"
      ...     paired([image], [255 - image], path, title="black to white")
      ...     path.read_bytes()[1:4]
      b'PNG'
    """
    _write_sheet(list(zip(inputs, targets, strict=True)), path, title)


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    colors: np.ndarray,
    ignore_label: int | None = None,
) -> np.ndarray:
    """Colours an image by its mask; ignored pixels get black and white stripes.

    The image shows through in grey, so that a class has the hue of its colour wherever
    it is.

    Args:
      image: uint8 (height, width, 1 or 3).
      mask: int (height, width).
      colors: uint8 (classes, 3), RGB.
      ignore_label: mask value of the pixels that have no class.

    Returns:
      uint8 (height, width, 3).

    Raises:
      IndexError: if the mask has a value that is no class and not `ignore_label`.

    Examples:
      >>> image = np.zeros((1, 2, 1), np.uint8)
      >>> red_and_blue = np.array([[255, 0, 0], [0, 0, 255]], np.uint8)
      >>> overlay(image, np.array([[0, 1]]), red_and_blue).tolist()
      [[[166, 0, 0], [0, 0, 166]]]
    """
    rows, columns = np.indices(mask.shape)
    width = max(2, min(mask.shape) // 60)
    stripes = (rows + columns) // width % 2
    paint = np.repeat(255 * stripes[..., None], 3, axis=-1)
    known = mask != ignore_label
    paint[known] = colors[mask[known]]
    grey = image.mean(axis=-1, keepdims=True)
    return np.rint(0.65 * paint + 0.35 * grey).astype(np.uint8)


def default_colors(n: int) -> np.ndarray:
    """Colours that are easy to tell apart, and from black, white and grey.

    Each is, of 512 colours, the one that looks most unlike all before it, so that a
    longer palette begins with the shorter ones.

    Args:
      n: number of colours; beyond 512 they repeat.

    Returns:
      uint8 (n, 3), RGB.

    Examples:
      >>> default_colors(3).tolist()
      [[30, 30, 240], [30, 240, 30], [240, 30, 30]]
    """
    levels = np.arange(30, 241, 30)
    grid = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(-1, 3)
    colors = np.concatenate([[[0] * 3, [128] * 3, [255] * 3], grid])
    lab = _cielab(colors)
    distances = np.linalg.norm(lab[:, None] - lab, axis=-1)
    chosen = [0, 1, 2]
    while len(chosen) < n + 3:
        chosen.append(distances[chosen].min(axis=0).argmax())
    return colors[chosen[3:]].astype(np.uint8)


def _cielab(rgb: np.ndarray) -> np.ndarray:
    """Moves colours (n, 3) to where their distances are as large as they look.

    CIELAB without its offset and its bend near black.
    """
    # The stimuli XYZ, 1 each for white; then lightness, green to red, blue to yellow.
    xyz = [[0.434, 0.376, 0.190], [0.213, 0.715, 0.072], [0.018, 0.109, 0.873]]
    lab = [[0, 116, 0], [500, -500, 0], [0, 200, -200]]
    return np.cbrt((rgb / 255) ** 2.2 @ np.transpose(xyz)) @ np.transpose(lab)


def _write_sheet(
    examples: Sequence[Sequence[np.ndarray]],
    path: str | Path,
    title: str,
    *,
    captions: Sequence[str] = (),
    legend: Sequence[Patch] = (),
) -> None:
    """Writes a grid of examples, each of equally many images in a row."""
    across = len(examples[0])
    sizes = [image.shape[:2] for example in examples for image in example]
    aspect = across * np.median([width / height for height, width in sizes])
    rows, columns = _layout(len(examples), aspect)
    width = min((_WIDTH + _GAP) / columns - _GAP, _LARGEST_IMAGE * across)
    height = width / aspect
    above = _LINE if captions else _GAP

    # The figure is the grid alone. Title and legend lie outside, where the crop to
    # what is drawn finds them.
    size = columns * (width + _GAP) - _GAP, rows * (height + above) - above
    figure = Figure(size, dpi=_DPI)
    figure.suptitle(_plain(title), y=1 + (above + _GAP / 2) / size[1], va="bottom")
    if legend:
        _add_legend(figure, legend, y=-_GAP / size[1])
    grid = figure.add_gridspec(
        rows,
        columns,
        left=0,
        right=1,
        bottom=0,
        top=1,
        wspace=_GAP / width,
        hspace=above / height,
    )
    for i, example in enumerate(examples):
        cell = grid[i].subgridspec(1, across, wspace=0.02)
        for j, image in enumerate(example):
            axes = figure.add_subplot(cell[j])
            _show(axes, image, width / across)
            if captions:
                caption = _shortened(captions[i], width)
                axes.set_title(_plain(caption), fontsize=_FONT_SIZE, pad=3)
    with warnings.catch_warnings():
        # A script that the font lacks: its names are boxes, the pictures are not.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, bbox_inches="tight", pad_inches=_GAP)


def _layout(n: int, aspect: float) -> tuple[int, int]:
    """Rows and columns of n cells: a sheet near 3:2, its last row as full as can be."""

    def flaws(columns: int) -> float:
        rows = math.ceil(n / columns)
        shape = abs(math.log(columns * aspect / rows / 1.5))
        return shape + 4 * (1 - n / (rows * columns))

    columns = min(range(1, n + 1), key=flaws)
    return math.ceil(n / columns), columns


def _show(axes: Axes, image: np.ndarray, width: float) -> None:
    """Shows a grey or colour image, about `width` inches wide."""
    enlarged = 2 * image.shape[1] <= width * _DPI
    axes.imshow(
        np.broadcast_to(image, (*image.shape[:2], 3)),
        interpolation="nearest" if enlarged else "auto",
    )
    axes.axis("off")


def _add_legend(figure: Figure, patches: Sequence[Patch], y: float) -> None:
    """Puts a legend below the figure, in as few rows as its width allows."""
    patch_width = 0.6  # with the space around it
    room = figure.get_figwidth() / 3
    labels = [_shortened(patch.get_label(), room) for patch in patches]
    entry = patch_width + max(map(_text_width, labels))
    rows = math.ceil(len(patches) / max(1, int(figure.get_figwidth() / entry)))
    figure.legend(
        handles=patches,
        labels=[_plain(label) for label in labels],
        ncols=math.ceil(len(patches) / rows),
        loc="upper center",
        bbox_to_anchor=(0.5, y),
        borderaxespad=0,
        fontsize=_FONT_SIZE,
        frameon=False,
        handlelength=1.4,
    )


def _plain(text: str) -> str:
    """Text in which a dollar does not begin a formula."""
    return text.replace("$", r"\$")


def _shortened(text: str, width: float) -> str:
    """Cuts text to a width in inches."""
    if _text_width(text) <= width:
        return text
    lengths = range(1, len(text))
    n = bisect.bisect(lengths, width, key=lambda n: _text_width(text[:n] + "…"))
    return text[:n].rstrip() + "…"


def _text_width(text: str) -> float:
    """Width of text on the sheet in inches."""
    return TextPath((0, 0), _plain(text), size=_FONT_SIZE).get_extents().width / 72
